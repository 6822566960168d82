"""Makes the requests and limits of a training container out of its amounts: CPUs, memory, and resources that can't be
shared out, such as GPUs, network devices for RDMA and huge pages.

`operator/finetune_operator/objects/pod_template.py` calls `host_resources`. How much memory and how many CPUs a pod
needs is computed elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ContainerResources:
    """Requests and limits of a container, as Kubernetes writes them."""

    requests: Mapping[str, str]
    limits: Mapping[str, str]


def host_resources(*, cpu: str, memory: str, whole: Mapping[str, int | str], limit_cpu: bool) -> ContainerResources:
    """Return requests and limits of the training container of each pod. ``cpu`` and ``memory`` are quantities, such as
    `96` and `1000Gi`. ``whole`` has the amounts of the other resources by name: for these, Kubernetes wants a limit
    that is the request. ``limit_cpu`` says whether the request of CPUs is also the limit.

    The CPUs have no limit by default: at a limit the kernel stops all threads of the pod until the next period of 100
    ms, although CPUs of the node are free. Memory always has a limit, because a pod that used more than it asked for
    would take the memory of other pods.
    """
    limits = {"memory": memory} | {name: str(amount) for name, amount in whole.items()}
    requests = {"cpu": cpu} | limits
    return ContainerResources(requests=requests, limits=requests if limit_cpu else limits)
