"""Computes the requests and limits of a training container: memory of the host, CPUs, GPUs, and extended resources such
as network devices for RDMA, and whether the container may lock memory.

The functions return values for the container of a pod, as `operator/finetune_operator/objects` writes them. Each value
has its reason, which a plan can show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MEBIBYTE = 1 << 20
"""Number of bytes in one MiB."""
GIBIBYTE = 1 << 30
"""Number of bytes in one GiB."""
GPU_RESOURCE = "nvidia.com/gpu"
"""Name of the resource of NVIDIA's device plugin."""
CPUS_PER_GPU = 8
"""CPUs that are requested for each GPU. A process of the training keeps two CPUs busy, Python's and torch's thread for
the backward pass, and NCCL, the upload of checkpoints and the tokenising of rows use the others at times. Machines with
8 GPUs have 96 CPUs or more."""
CPUS_WITHOUT_GPU = 8
GPU_PROCESS_BYTES = 4 * GIBIBYTE
"""Memory of the host that a process takes for Python, torch's libraries, the context of CUDA and the buffers of
NCCL."""
CPU_PROCESS_BYTES = 3 * GIBIBYTE // 2
"""Memory that a process without a GPU takes for Python and torch's libraries."""
POD_BYTES = GIBIBYTE
"""Memory of the launcher, of the program that fetches the model, and of small files in memory."""
SPARE_SHARE = 0.1
"""Share of all memory that is added, because the sizes are estimates and the kernel counts pages of files for a
while."""
LOCK_MEMORY = "IPC_LOCK"
"""The capability that lets a container lock any amount of memory. Network devices for RDMA register the memory that
they read, and the kernel locks registered memory. Without the capability the limit of the node's container runtime
holds, which is 8 MiB with the defaults of systemd."""
_HUGE_PAGES = re.compile(r"hugepages-([1-9][0-9]*)(Ki|Mi|Gi)")
_NAME = re.compile(r"(?!.{254})[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_SIZES = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
_SIZE = re.compile(r"([1-9][0-9]{0,11})(Ki|Mi|Gi)")


@dataclass(frozen=True, kw_only=True)
class HostDemand:
    """What the ranks of one pod need of the host, in bytes where nothing else is said."""

    processes: int
    """Training processes of the pod, one for each GPU."""
    gpus: int
    """GPUs of the pod. 0 where the job computes on CPUs."""
    snapshot_bytes: int
    """One snapshot of the training state of all ranks of the pod together: 12 bytes for each trained parameter, divided
    by the number of pods."""
    snapshots: int = 2
    """How many snapshots a rank holds at once at most."""
    staging_bytes: int = 0
    """Pinned buffers of all ranks of the pod together."""
    load_bytes: int = 0
    """Largest amount that loading the model takes, over all ranks of the pod together. It is free again before the
    first snapshot."""
    offload_bytes: int = 0
    """Optimizer state and parameters that the ranks of the pod keep in the memory of the host."""
    shared_memory_bytes: int = 0
    """Size of /dev/shm, which counts towards the memory of the container."""


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
    reasons: Mapping[str, str]
    """Why each planned value is what it is, as a sentence, by the name of the resource."""


def host_resources(demand: HostDemand, choices: HostChoices) -> ContainerResources:
    """Return the resources of the training container of each pod. The caller has refused the choices for which
    `extended_problem` returns a sentence."""
    reasons: dict[str, str] = {}
    memory = choices.memory
    if memory is None:
        planned = host_memory_bytes(demand)
        memory = f"{-(-planned // GIBIBYTE)}Gi"
        reasons["memory"] = _memory_reason(demand)
    cpu = choices.cpu
    if cpu is None:
        cpu = str(CPUS_PER_GPU * demand.gpus if demand.gpus else CPUS_WITHOUT_GPU)
        reasons["cpu"] = (
            f"{CPUS_PER_GPU} CPUs for each GPU" if demand.gpus else f"{CPUS_WITHOUT_GPU} CPUs without a GPU"
        )
    requests = {"cpu": cpu, "memory": memory}
    limits = {"memory": memory}
    # On CPUs the number of threads, and with it the last bits of each sum, follows from the limit and must not follow
    # from the size of the node.
    if choices.limit_cpu or not demand.gpus:
        limits["cpu"] = cpu
    # Kubernetes wants the same request and limit for everything that it can't share out.
    whole = dict(choices.extended) | ({GPU_RESOURCE: str(demand.gpus)} if demand.gpus else {})
    return ContainerResources(
        requests=requests | whole,
        limits=limits | whole,
        added_capabilities=[LOCK_MEMORY] if choices.lock_memory else [],
        reasons=reasons,
    )


def host_memory_bytes(demand: HostDemand) -> int:
    """Return how much memory of the host a pod needs, in bytes."""
    process = GPU_PROCESS_BYTES if demand.gpus else CPU_PROCESS_BYTES
    # The memory for loading is free again when the first snapshot is taken.
    largest = max(demand.load_bytes, demand.snapshots * demand.snapshot_bytes)
    standing = POD_BYTES + demand.processes * process + demand.staging_bytes + demand.offload_bytes
    return int((standing + largest + demand.shared_memory_bytes) * (1 + SPARE_SHARE))


def _memory_reason(demand: HostDemand) -> str:
    process = GPU_PROCESS_BYTES if demand.gpus else CPU_PROCESS_BYTES
    parts = {
        f"{demand.processes} processes": POD_BYTES + demand.processes * process,
        f"{demand.snapshots} snapshots of the training state": demand.snapshots * demand.snapshot_bytes,
        "loading the model": demand.load_bytes,
        "pinned buffers": demand.staging_bytes,
        "offload": demand.offload_bytes,
        "shared memory": demand.shared_memory_bytes,
    }
    texts = [f"{size / GIBIBYTE:.1f} GiB for {name}" for name, size in parts.items() if size]
    return ", ".join(texts) + f", and {SPARE_SHARE:.0%} to spare; loading ends before the first snapshot"


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
