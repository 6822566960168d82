"""What a step took: time by its parts, memory, and the share of the devices' peak. Measured on this rank."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finetune_core.planning.flops import ModelShape, peak_flops, training_flops, utilisation
from finetune_trainer.model.structure import Skeleton

PAGE_BYTES = 4096
DATA, FORWARD, BACKWARD, UPDATE = "data", "forward", "backward", "update"


class Stopwatch:
    """Adds up the time of a step's parts; on a GPU in the order of its own work, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing."""
        self._gpu = device.type == "cuda"
        self._spent: dict[str, float] = {}
        self._marks: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block's time as ``name``'s."""
        if self._gpu and name != DATA:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._marks.append((name, first, last))
            return
        began = time.perf_counter()
        yield
        self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - began

    def seconds(self, name: str) -> float:
        """Return what ``name`` took; on a GPU after its work is done."""
        for part, first, last in self._marks:
            last.synchronize()
            self._spent[part] = self._spent.get(part, 0.0) + first.elapsed_time(last) / 1000
        self._marks.clear()
        return self._spent.get(name, 0.0)


def memory_of(device: torch.device, proc: Path = Path("/proc/self")) -> tuple[int, int]:
    """Return memory in use and its peak so far, in bytes: of the GPU, on the CPU resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    now = int((proc / "statm").read_text().split()[1]) * PAGE_BYTES
    for line in (proc / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return now, max(now, int(line.split()[1]) * 1024)
    return now, now


def shape_of(bones: Skeleton, trained: int, *, adapters: bool) -> ModelShape | None:
    """Return what the arithmetic of a model depends on, None for one whose configuration does not tell.

    ``trained`` is the number of trained parameters. A tied embedding is looked up at the input and multiplied at the
    output: it counts once.
    """
    config = bones.model.config.get_text_config()
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if layers is None or heads is None:
        return None
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
    weights = sum(parameter.numel() for parameter in bones.model.parameters())
    looked_up = 0 if bones.tied else bones.model.get_input_embeddings().weight.numel()
    return ModelShape(
        layers=layers,
        attention_width=width,
        matrix_parameters=weights - looked_up,
        trained_parameters=trained,
        adapters=adapters,
    )


def mfu(
    shape: ModelShape | None, lengths: list[int], seconds: float, *, devices: int, device: torch.device
) -> float | None:
    """Return the model FLOPs utilisation of a step over sequences of real ``lengths``; None on a CPU."""
    if shape is None or device.type != "cuda":
        return None
    flops = training_flops(shape, sum(lengths), sum(length * length for length in lengths))
    return utilisation(flops, seconds, devices, peak_flops(torch.cuda.get_device_name(device)))
