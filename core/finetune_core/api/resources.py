"""The machines that an attempt runs on: `resources`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from finetune_core.api.base import QUANTITY_LENGTH, ApiModel, LabelValue, cel, int_or_string

MEBIBYTE = 1 << 20
TEBIBYTE = 1 << 40

_CPU = r"^([1-9][0-9]{1,6}m|[1-9][0-9]{0,3}(\.[0-9]{1,3})?|0\.[0-9]{0,2}[1-9]0{0,2})$"
_LARGE = r"[1-9][0-9]{0,4}(\.[0-9]{1,3})?(Gi|G)|[1-9][0-9]?(\.[0-9]{1,3})?(Ti|T)"
_MEMORY = rf"^([1-9][0-9]{{2,6}}(Mi|M)|{_LARGE})$"
_VOLATILE = rf"^([1-9][0-9]{{0,6}}(Mi|M)|{_LARGE})$"

Cpu = Annotated[
    Annotated[int, Field(ge=1, le=9999)] | Annotated[str, Field(max_length=QUANTITY_LENGTH, pattern=_CPU)],
    WithJsonSchema(int_or_string(_CPU, least=1, most=9999)),
]
"""`4`, `"1.5"`, `500m`."""
Memory = Annotated[
    Annotated[int, Field(ge=100 * MEBIBYTE, le=99 * TEBIBYTE)]
    | Annotated[str, Field(max_length=QUANTITY_LENGTH, pattern=_MEMORY)],
    WithJsonSchema(int_or_string(_MEMORY, least=100 * MEBIBYTE, most=99 * TEBIBYTE)),
]
"""`64Gi`, `500Mi`; a plain number counts bytes."""
VolatileMemory = Annotated[
    Annotated[int, Field(ge=MEBIBYTE, le=99 * TEBIBYTE)]
    | Annotated[str, Field(max_length=QUANTITY_LENGTH, pattern=_VOLATILE)],
    WithJsonSchema(int_or_string(_VOLATILE, least=MEBIBYTE, most=99 * TEBIBYTE)),
]
"""Size of a folder in memory or on the node's disk."""


Device = Literal["GPU", "CPU"]
NODES_LIMIT = 99
"""SHORT"""


class ResourcesSpec(ApiModel):
    """Machines: `nodes` pods with `gpusPerNode` GPUs each; one training process a GPU (one a pod without)."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.device == 'CPU' || self.gpusPerNode >= 1",
                "`gpusPerNode` must be at least 1 unless `device` is CPU",
            ),
        )
    )

    nodes: Annotated[int, Field(ge=1, le=NODES_LIMIT)] = 1
    """Number of pods, each on the GPUs of one machine."""
    gpus_per_node: Annotated[int, Field(ge=0, le=16)] = 1
    """`nvidia.com/gpu` of each pod; 0 only with `device: CPU`."""
    device: Device = "GPU"
    """What the trainer computes on. With GPU it never falls back to the CPU."""
    gpu_product: LabelValue = "NVIDIA-A100-SXM4-80GB"
    """Node label `nvidia.com/gpu.product` that pods with GPUs are bound to; empty means any."""
    cpu: Cpu = "8"
    """CPU request and limit of each pod."""
    memory: Memory = "64Gi"
    """Memory request and limit of each pod, at least 100Mi."""
    shared_memory: VolatileMemory = "16Gi"
    """Size of /dev/shm, which NCCL and data loading use; it counts towards `memory` and must be less."""

    @property
    def processes_per_node(self) -> int:
        """SHORT"""
        return max(1, self.gpus_per_node)

    @property
    def processes(self) -> int:
        """SHORT"""
        return self.nodes * self.processes_per_node
