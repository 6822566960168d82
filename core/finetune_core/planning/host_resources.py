"""Makes the requests and limits of a training container out of planned and chosen amounts: memory of the host, CPUs,
GPUs, and extended resources such as network devices for RDMA. Also says whether the container may lock memory.

The functions return values for the container of a pod, as `operator/finetune_operator/objects` writes them, and judge
the names and amounts that a job sets itself. How much memory and how many CPUs a pod needs is computed elsewhere.

Nothing in the product calls this module yet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune_core.planning.scratch import GIBIBYTE

GPU_RESOURCE = "nvidia.com/gpu"
"""Name of the resource of NVIDIA's device plugin."""
LOCK_MEMORY = "IPC_LOCK"
"""The capability that lets a container lock any amount of memory. Network devices for RDMA register the memory that
they read, and the kernel locks registered memory. Without the capability the limit of the node's container runtime
holds, which is 8 MiB with the defaults of systemd."""
_HUGE_PAGES = re.compile(r"hugepages-([1-9][0-9]*)(Ki|Mi|Gi)")
_NAME = re.compile(r"(?!.{254})[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_SIZES = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
_SIZE = re.compile(r"([1-9][0-9]{0,11})(Ki|Mi|Gi)")


@dataclass(frozen=True, kw_only=True)
class PlannedHost:
    """What the plan of a job says about one pod."""

    gpus: int
    """GPUs of the pod. 0 where the job computes on CPUs."""
    cpus: int
    memory_bytes: int
    """Memory of the host, with /dev/shm."""


@dataclass(frozen=True, kw_only=True)
class HostChoices:
    """What a job sets itself. Absent values are planned."""

    cpu: str | None = None
    """CPU quantity: `96`."""
    memory: str | None = None
    """Memory quantity: `1000Gi`."""
    limit_cpu: bool = False
    """Whether the request of CPUs is also the limit. The static CPU manager of the kubelet gives whole CPUs only to
    pods whose limits are their requests."""
    extended: Mapping[str, str] = field(default_factory=dict)
    """Other resources by name: `rdma/hca_shared_devices_a: "1"`, `vpc.amazonaws.com/efa: "32"`, `hugepages-2Mi:
    5120Mi`."""
    lock_memory: bool = False
    """Whether the container gets the capability IPC_LOCK. Namespaces with the Pod Security level `restricted` refuse
    such pods."""


@dataclass(frozen=True, kw_only=True)
class ContainerResources:
    """Requests, limits and capabilities of the training container."""

    requests: Mapping[str, str]
    limits: Mapping[str, str]
    added_capabilities: Sequence[str]


def host_resources(planned: PlannedHost, choices: HostChoices) -> ContainerResources:
    """Return the resources of the training container of each pod. What the job sets wins over what is planned. The
    caller has refused the choices for which `extended_problem` returns a sentence."""
    memory = choices.memory or f"{-(-planned.memory_bytes // GIBIBYTE)}Gi"
    cpu = choices.cpu or str(planned.cpus)
    requests = {"cpu": cpu, "memory": memory}
    limits = {"memory": memory}
    # With GPUs a limit of CPUs only slows the processes down. Without GPUs there is a limit, because the number of
    # threads, and with it the last bits of each sum, follows from the limit, and must not follow from the size of the
    # node.
    if choices.limit_cpu or not planned.gpus:
        limits["cpu"] = cpu
    # Kubernetes wants the same request and limit for everything that it can't share out.
    whole = dict(choices.extended) | ({GPU_RESOURCE: str(planned.gpus)} if planned.gpus else {})
    return ContainerResources(
        requests=requests | whole,
        limits=limits | whole,
        added_capabilities=[LOCK_MEMORY] if choices.lock_memory else [],
    )


def extended_problem(name: str, amount: str) -> str | None:
    """Return what is wrong with a resource that a job names itself, as the end of a sentence about the name, or None.

    Kubernetes knows two kinds: extended resources, which have a domain and come in whole numbers, and huge pages, whose
    amount is a multiple of the size of a page.
    """
    pages = _HUGE_PAGES.fullmatch(name)
    if pages is not None:
        page, size = int(pages[1]) * _SIZES[pages[2]], _SIZE.fullmatch(amount)
        if size is None or int(size[1]) * _SIZES[size[2]] % page:
            return f"must be a multiple of {pages[1]}{pages[2]}, such as {4 * int(pages[1])}{pages[2]}"
        return None
    if name == GPU_RESOURCE:
        return "must not be set here: resources.gpusPerNode sets it"
    if "/" not in name:
        return "must be the name of an extended resource, such as rdma/hca_shared_devices_a, or hugepages-2Mi"
    domain = name.partition("/")[0]
    if domain == "kubernetes.io" or domain.endswith(".kubernetes.io") or domain.startswith("requests."):
        return "must not be a name that Kubernetes keeps for itself"
    if _NAME.fullmatch(name) is None:
        return "must be a domain and a name of at most 63 letters, digits, `-`, `_` and `.`"
    if re.fullmatch(r"[1-9][0-9]{0,5}", amount) is None:
        return "must be a whole number from 1 to 999999"
    return None
