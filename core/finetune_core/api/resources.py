"""`resources`: the number of pods, and the GPUs, CPUs and memory of each pod."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from finetune_core.api.base import QUANTITY_LENGTH, ApiModel, LabelValue, ObjectName, cel, int_or_string

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
    """CPU request and limit of each pod, for example `8` or `500m`. Absent: `status.plan.cpus`, or 8 without such a
    plan."""
    memory: Memory | None = None
    """Memory request and limit of each pod, at least `100M`. Absent: `status.plan.memoryBytes` in whole GiB, or 64Gi
    without such a plan."""
    shared_memory: VolatileMemory = "16Gi"
    """Size of /dev/shm in each pod, a folder in memory that NCCL and data loading use. The content of the folder counts
    towards `memory`, and the size must be less than `memory`, or less than 64Gi where `memory` is absent."""
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
