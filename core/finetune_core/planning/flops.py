"""Arithmetic of a training token, and the share of a device's peak that it takes (MFU). Pure; the trainer reports with
it, and a plan can estimate with it.

Counted is what the model needs, not what a program happens to do: recomputed activations and padding are no work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PEAK_FLOPS: Sequence[tuple[str, float]] = (
    ("H200", 989.4e12),
    ("H100 PCIe", 756.0e12),
    ("H100", 989.4e12),
    ("H800", 989.4e12),
    ("A100", 312.0e12),
    ("A800", 312.0e12),
    ("L40S", 362.0e12),
    ("L40", 181.0e12),
    ("L4", 121.0e12),
    ("A10G", 70.0e12),
    ("A10", 125.0e12),
)
"""Dense bf16 peak by a part of the device's name, the first match counts (the vendor's data sheets, no sparsity)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What the arithmetic of a model depends on."""

    layers: int
    attention_width: int
    """Heads times the width of a head."""
    matrix_parameters: int
    """All parameters but the input embedding, whose rows are only looked up; a head that is tied to it counts."""
    trained_parameters: int
    """Equal to ``matrix_parameters`` or more where every parameter is trained."""
    adapters: bool
    """Whether only adapters are trained and the model is frozen."""


def forward_flops(shape: ModelShape, tokens: int, squared_lengths: int) -> float:
    """Return the FLOPs of a forward pass over sequences with ``tokens`` tokens in all.

    Two per parameter and token, and causal attention: half of 4 * layers * width * length per token, so that it grows
    with ``squared_lengths``, the sum of the squares of the sequences' lengths.
    """
    return 2.0 * shape.matrix_parameters * tokens + 2.0 * shape.layers * shape.attention_width * squared_lengths


def training_flops(shape: ModelShape, tokens: int, squared_lengths: int) -> float:
    """Return the FLOPs of forward and backward pass.

    The backward pass is twice the forward one; with adapters on a frozen model the half of it that makes weight
    gradients is needed for the adapters alone: 2 + adapters / frozen (NeMo's helper for LoRA counts so).
    """
    factor = 2.0 + shape.trained_parameters / shape.matrix_parameters if shape.adapters else 3.0
    return factor * forward_flops(shape, tokens, squared_lengths)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a device by its name, None where it is not known (a CPU)."""
    return next((peak for part, peak in PEAK_FLOPS if part in device_name), None)


def utilisation(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Return MFU from 0 to 1, None without a peak or without time."""
    return flops / seconds / (devices * peak) if peak is not None and seconds > 0 else None
