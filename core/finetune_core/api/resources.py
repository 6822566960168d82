"""`resources`: the number of pods, and the GPUs, CPUs and memory of each pod."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from finetune_core.api.base import ENTRIES, QUANTITY_LENGTH, ApiModel, LabelValue, ObjectName, cel, int_or_string

MEBIBYTE = 1 << 20
"""Number of bytes in one MiB."""
TEBIBYTE = 1 << 40
"""Number of bytes in one TiB."""
LEAST_MEMORY, MOST_MEMORY = 100 * MEBIBYTE, 99 * TEBIBYTE
"""Smallest and largest number of bytes that `memory` takes."""
MOST_CPUS = 9999
"""Largest number of CPUs that `cpu` takes."""
DEFAULT_CPU, DEFAULT_MEMORY = "8", "64Gi"
"""CPUs and memory of each pod where neither the job nor its plan says them."""

_CPU = r"^([1-9][0-9]{1,6}m|[1-9][0-9]{0,3}(\.[0-9]{1,3})?|0\.[0-9]{0,2}[1-9]0{0,2})$"
_LARGE = r"[1-9][0-9]{0,4}(\.[0-9]{1,3})?(Gi|G)|[1-9][0-9]?(\.[0-9]{1,3})?(Ti|T)"
_MEMORY = rf"^([1-9][0-9]{{2,6}}(Mi|M)|{_LARGE})$"
_VOLATILE = rf"^([1-9][0-9]{{0,6}}(Mi|M)|{_LARGE})$"
_AMOUNT = r"^([1-9][0-9]{0,3}|[1-9][0-9]{0,6}[KMG]i)$"

Cpu = Annotated[
    Annotated[int, Field(ge=1, le=MOST_CPUS)] | Annotated[str, Field(max_length=QUANTITY_LENGTH, pattern=_CPU)],
    WithJsonSchema(int_or_string(_CPU, least=1, most=MOST_CPUS)),
]
"""A CPU quantity, for example `4`, `"1.5"` or `500m`."""
Memory = Annotated[
    Annotated[int, Field(ge=LEAST_MEMORY, le=MOST_MEMORY)]
    | Annotated[str, Field(max_length=QUANTITY_LENGTH, pattern=_MEMORY)],
    WithJsonSchema(int_or_string(_MEMORY, least=LEAST_MEMORY, most=MOST_MEMORY)),
]
"""A memory quantity, for example `64Gi` or `500Mi`. The smallest string is `100M`. An integer is a number of bytes, at
least 100 MiB."""
VolatileMemory = Annotated[
    Annotated[int, Field(ge=MEBIBYTE, le=99 * TEBIBYTE)]
    | Annotated[str, Field(max_length=QUANTITY_LENGTH, pattern=_VOLATILE)],
    WithJsonSchema(int_or_string(_VOLATILE, least=MEBIBYTE, most=99 * TEBIBYTE)),
]
"""The size of a volume, or the size limit of a folder in memory or on disk, for example `16Gi`. The smallest string is
`1M`. An integer is a number of bytes, at least 1 MiB."""
Amount = Annotated[
    Annotated[int, Field(ge=1, le=9999)] | Annotated[str, Field(max_length=QUANTITY_LENGTH, pattern=_AMOUNT)],
    WithJsonSchema(int_or_string(_AMOUNT, least=1, most=9999)),
]
"""How much of an extended resource a pod asks for: a number of devices, for example `1`, or an amount of memory in huge
pages, for example `5120Mi`."""

GPU_RESOURCE = "nvidia.com/gpu"
"""Name of the extended resource of NVIDIA's device plugin."""
EXTENDED_LIMIT = 8
"""Largest number of entries of `extended`."""
EXTENDED_NAME_LENGTH = 128
"""Largest number of characters of a name in `extended`."""
DEVICE_CLASS_PREFIX = "deviceclass.resource.kubernetes.io/"
"""Beginning of the only names below kubernetes.io that a container may ask for: the extended resources that Kubernetes
makes of the device classes of Dynamic Resource Allocation (`ResourceDeviceClassPrefix` in k8s.io/api/resource/v1)."""
HUGE_PAGES = "hugepages-"
"""Beginning of the names of huge pages. The rest of such a name is the size of a page."""
_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DOMAIN_AND_NAME = f"{_LABEL}([.]{_LABEL})*/[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?"
EXTENDED_NAME = f"^({_DOMAIN_AND_NAME}|{HUGE_PAGES}[1-9][0-9]{{0,3}}[KMG]i)$"
"""Regular expression that a name in `extended` must match: a domain and a name, or huge pages with the size of a page.
Kubernetes' `IsExtendedResourceName` (pkg/apis/core/v1/helper) also refuses the names for which `EXTENDED_NAMES_RULE`
has conditions."""
EXTENDED_NAMES_RULE = (
    f"self.all(name, name.size() <= {EXTENDED_NAME_LENGTH} && name.matches('{EXTENDED_NAME}')"
    f" && !name.startsWith('requests.') && (!name.startsWith('{HUGE_PAGES}') || !name.contains('/'))"
    f" && (!name.contains('kubernetes.io/') || name.startsWith('{DEVICE_CLASS_PREFIX}')))"
)
EXTENDED_AMOUNTS_RULE = (
    f"self.all(name, name.startsWith('{HUGE_PAGES}') ? type(self[name]) == string && self[name].endsWith('i')"
    " : !name.contains('/') || type(self[name]) == int || !self[name].endsWith('i'))"
)
EXTENDED_RULES = (
    (
        f"!('{GPU_RESOURCE}' in self)",
        f"`extended` must not have {GPU_RESOURCE}: `gpusPerNode` is the number of GPUs",
    ),
    (
        EXTENDED_NAMES_RULE,
        "`extended` must have names of extended resources with a domain, such as `rdma/hca_shared_devices_a` or"
        " `vpc.amazonaws.com/efa`, or of huge pages, such as `hugepages-2Mi`",
    ),
    (
        EXTENDED_AMOUNTS_RULE,
        "`extended` must have a whole number for each device, such as 1, and an amount for huge pages, such as 5120Mi",
    ),
)
"""CEL rules about `extended`, each with its message. The rules are about the whole map, because a structural schema
can't bound the keys of a map."""


Device = Literal["GPU", "CPU"]
"""Kind of device that the trainer computes on."""
NODES_LIMIT = 99
"""Largest number of nodes, and so of pods, of a job. The name of a pod ends with the index of the pod, and has room for
an index of two digits."""


class ScratchSpec(ApiModel):
    """The scratch folder of each pod. The folder contains the downloaded model and data, the tokenised rows, and the
    files of checkpoints and of the artifact until they are uploaded."""

    size: VolatileMemory
    """Size of the folder, for example `200Gi`. Where the folder is on the node's own disk, the kubelet evicts a pod
    that uses more."""
    storage_class_name: ObjectName | None = None
    """StorageClass of a volume that is made for each pod and deleted with the pod (a generic ephemeral volume). Absent:
    the folder is on the disk that the node gives to its pods (an emptyDir), and `size` is part of the pod's request and
    limit of `ephemeral-storage`."""


class ResourcesSpec(ApiModel):
    """The machines of an attempt: `nodes` pods with `gpusPerNode` GPUs each. Each GPU gets one training process, and a
    pod without GPUs has one training process."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.device == 'CPU' || self.gpusPerNode >= 1",
                "`gpusPerNode` must be at least 1 unless `device` is CPU",
            ),
        )
    )

    nodes: Annotated[int, Field(ge=1, le=NODES_LIMIT)] = 1
    """Number of pods. All GPUs of a pod are in one machine."""
    gpus_per_node: Annotated[int, Field(ge=0, le=16)] = 1
    """Number of GPUs (`nvidia.com/gpu`) of each pod. 0 is allowed only with `device: CPU`."""
    device: Device = "GPU"
    """Device that the trainer computes on. With GPU the trainer fails when it finds no GPU, and never computes on the
    CPU instead."""
    gpu_product: LabelValue = "NVIDIA-A100-SXM4-80GB"
    """GPU product of the nodes for pods with GPUs: the value that the node label `nvidia.com/gpu.product` must have.
    Empty: any GPU."""
    cpu: Cpu | None = None
    """CPU request of each pod, for example `8` or `500m`. The number of threads of each process follows from it.
    Absent: `status.plan.cpus`, or 8 without such a plan."""
    limit_cpu: bool = False
    """true makes the CPU request also the CPU limit, as a namespace with a quota on `limits.cpu` needs it, and the
    static CPU manager of the kubelet, which gives a pod whole CPUs of its own. false: the pods have no CPU limit, and
    use CPUs of their node that no other pod needs."""
    memory: Memory | None = None
    """Memory request and limit of each pod, at least `100M`. Absent: `status.plan.memoryBytes` in whole GiB, or 64Gi
    without such a plan."""
    shared_memory: VolatileMemory = "16Gi"
    """Size of /dev/shm in each pod, a folder in memory that NCCL and data loading use. The content of the folder counts
    towards `memory`, and the size must be less than `memory`, or less than 64Gi where `memory` is absent."""
    extended: Annotated[
        dict[str, Amount], Field(max_length=EXTENDED_LIMIT, json_schema_extra=cel(*EXTENDED_RULES)), ENTRIES
    ] = {}
    """Other resources of each training pod, as request and limit: extended resources, such as the network devices
    `rdma/hca_shared_devices_a: 1` and `vpc.amazonaws.com/efa: 32`, and huge pages, such as `hugepages-2Mi: 5120Mi`. The
    names are those of the cluster's device plugins. The preflight check asks for none of these."""
    scratch: ScratchSpec | None = None
    """Size and place of the scratch folder of each pod. Absent: the disk that the node gives to its pods, with a
    request and a limit of `ephemeral-storage` that follow from the sizes of model and data, which the preflight check
    finds. Where these sizes are not known, 1 GiB is requested, and there is no limit."""

    @property
    def processes_per_node(self) -> int:
        """Number of training processes in each pod: one per GPU, and one in a pod without GPUs."""
        return max(1, self.gpus_per_node)

    @property
    def processes(self) -> int:
        """Number of training processes over all pods (the world size)."""
        return self.nodes * self.processes_per_node
