"""Measures a step: the time of its parts and the memory, both on one rank, and the model FLOPs utilisation (MFU) of all
devices.

`loop.py` measures every step. The values of rank 0 go into the step log and the reports.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from finetune_core.planning.flops import ModelShape, peak_flops, training_flops, utilisation
from finetune_trainer.model.structure import ModelStructure

PAGE_BYTES = 4096
DATA, FORWARD, BACKWARD, UPDATE = "data", "forward", "backward", "update"
PARTS = (DATA, FORWARD, BACKWARD, UPDATE)


class Stopwatch:
    """Adds up the time of the parts of steps in seconds. On a GPU all parts but DATA are timed with CUDA events, so
    that the CPU does not wait for the GPU."""

    def __init__(self, device: torch.device) -> None:
        """Start without a measured part. ``device`` is the device that computes the steps."""
        self._gpu = device.type == "cuda"
        self._spent: dict[str, float] = {}
        self._marks: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to the part ``name``."""
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

    def take(self) -> Mapping[str, float]:
        """Return the time of each part since the last call, 0.0 for a part without any. The CPU does not wait for the
        GPU: what the GPU has not finished yet counts in the next call."""
        waiting = []
        for part, first, last in self._marks:
            if last.query():
                self._spent[part] = self._spent.get(part, 0.0) + first.elapsed_time(last) / 1000
            else:
                waiting.append((part, first, last))
        self._marks = waiting
        spent, self._spent = self._spent, {}
        return {part: spent.get(part, 0.0) for part in PARTS}


def memory_usage(device: torch.device, proc: Path = Path("/proc/self")) -> tuple[int, int]:
    """Return the memory in use and its peak so far, in bytes: what torch has allocated on the GPU, or the resident
    memory of this process on a CPU. ``proc`` is the folder of the process in the file system /proc."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    now = int((proc / "statm").read_text().split()[1]) * PAGE_BYTES
    for line in (proc / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return now, max(now, int(line.split()[1]) * 1024)
    return now, now


def model_shape(structure: ModelStructure, trained: int, *, adapters: bool) -> ModelShape | None:
    """Return the numbers that a model's FLOPs depend on, None where the configuration does not have them.

    ``trained`` is the number of trained parameters. `matrix_parameters` leaves out the weights of the input embedding,
    because a lookup in the embedding is no matrix multiplication. If the output head shares these weights, they are
    counted, because the head multiplies with them.
    """
    config = structure.model.config.get_text_config()
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if layers is None or heads is None:
        return None
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
    weights = sum(parameter.numel() for parameter in structure.model.parameters())
    looked_up = 0 if structure.tied else structure.model.get_input_embeddings().weight.numel()
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
    """Return the model FLOPs utilisation of a step that took ``seconds`` on ``devices`` GPUs, between 0 and 1. None on
    a CPU, where the model's shape or the GPU's peak is not known, and for a skipped step, which takes 0 seconds.

    ``lengths`` are the lengths of all examples of the step, in tokens without padding.
    """
    if shape is None or device.type != "cuda":
        return None
    flops = training_flops(shape, sum(lengths), sum(length * length for length in lengths))
    return utilisation(flops, seconds, devices, peak_flops(torch.cuda.get_device_name(device)))
