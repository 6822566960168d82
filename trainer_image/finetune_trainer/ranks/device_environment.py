"""Chooses settings that depend on the device: environment variables of the workers for torch's allocator and for NCCL,
and whether DeepSpeed overlaps communication with computation.

The launcher adds the variables to those of each worker before the worker imports torch (`processes.py`), and the
DeepSpeed engine takes the value for DeepSpeed. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune_core.api.resources import Device


class Setting(NamedTuple):
    """A variable of the environment."""

    value: str
    reason: str
    """Why the variable has this value, as a sentence."""
    also: Collection[str] = ()
    """Other names of the same setting. Where one of them is set, the setting is left alone."""


@dataclass(frozen=True)
class DeviceSettings:
    """What to set for a device."""

    variables: Mapping[str, Setting]
    """Variables to set, by name. Variables that the user set are not among them."""
    overlap_communication: bool
    """See `overlaps_communication`."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables with their values."""
        return {name: setting.value for name, setting in self.variables.items()}


def device_environment(device: Device, *, ranks: int, scratch: Path, given: Mapping[str, str]) -> DeviceSettings:
    """Return what to set for ``ranks`` training processes that compute on ``device``.

    ``given`` is the environment of the pod, whose variables the user may have set with `podTemplate.env`; they win.
    torch writes its records of communication to ``scratch``, because the root of the container may be read-only.
    """
    wanted: dict[str, Setting] = {}
    if device == "GPU":
        wanted |= _allocator()
        if ranks > 1:
            wanted |= _communication(scratch)
    left = {
        name: setting
        for name, setting in wanted.items()
        if name not in given and not any(other in given for other in setting.also)
    }
    return DeviceSettings(left, overlap_communication=overlaps_communication(device, ranks=ranks))


def overlaps_communication(device: Device, *, ranks: int) -> bool:
    """Return DeepSpeed's `overlap_comm`: whether gradients are reduced, and weights gathered, while the next layers are
    computed. On the CPU, communication and computation share the cores, so an overlap gains nothing. A single process
    communicates with nobody."""
    return device == "GPU" and ranks > 1


def _allocator() -> dict[str, Setting]:
    return {
        "PYTORCH_ALLOC_CONF": Setting(
            "expandable_segments:True",
            "The lengths of micro-batches differ from step to step. Segments that can grow fit tensors of all sizes,"
            " while segments of fixed sizes leave gaps, which count as used memory.",
            also=("PYTORCH_CUDA_ALLOC_CONF",),
        ),
    }


def _communication(scratch: Path) -> dict[str, Setting]:
    return {
        "NCCL_DEBUG": Setting("WARN", "NCCL prints the cause of an error only at this level or a more detailed one."),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": Setting(
            "1", "After the timeout of a collective, torch writes down which rank did not take part."
        ),
        "TORCH_FR_BUFFER_SIZE": Setting(
            "2000",
            "torch keeps the last 2,000 collectives for this record.",
            also=("TORCH_NCCL_TRACE_BUFFER_SIZE",),
        ),
        "TORCH_FR_DUMP_TEMP_FILE": Setting(
            str(scratch / "collectives-of-rank-"),
            "The root of the container may be read-only.",
            also=("TORCH_NCCL_DEBUG_INFO_TEMP_FILE",),
        ),
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": Setting(
            "0",
            "torch's thread for NCCL would end the process at an error of CUDA, before the training thread can write"
            " its outcome. The training thread meets the same error at its next call of CUDA.",
        ),
    }
