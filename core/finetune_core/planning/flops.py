"""Computes the FLOPs of a model's training, and the model FLOPs utilisation (MFU): the FLOP/s that the model needs, as
a share of the peak FLOP/s of all devices.

The trainer's `reporting/meter.py` computes the reported MFU with these functions. Only arithmetic that the model needs
is counted, so recomputed activations and padding do not count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

PEAK_FLOPS: Sequence[tuple[str, float]] = (
    ("B200", 2250.0e12),
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
"""For each kind of GPU: a text that the device's name contains, and the peak of dense bf16 arithmetic (without
sparsity) in FLOP/s, from the vendor's data sheets. The text must not go on with a digit: an RTX A1000 is no A100. Where
a device's name contains the texts of several entries, the first of these entries counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of a model that determine its FLOPs."""

    layers: int
    attention_width: int
    """Number of attention heads times the width of a head."""
    matrix_parameters: int
    """Number of all parameters except those of the input embedding, because an embedding is a table lookup without
    arithmetic. The parameters of an output head count, also where the head shares them with the input embedding."""
    trained_parameters: int
    """Number of trained parameters. Where every parameter is trained, this is at least ``matrix_parameters``."""
    adapters: bool
    """Whether only adapters are trained and the model's own parameters are frozen."""


def forward_flops(shape: ModelShape, tokens: int, squared_lengths: int) -> float:
    """Return the FLOPs of a forward pass over sequences that have ``tokens`` tokens together.

    Each parameter of a matrix takes 2 FLOPs per token. Causal attention takes 2 * layers * width * length FLOPs per
    token, half of what attention without a mask takes. Summed over the tokens of all sequences, that is 2 * layers *
    width times ``squared_lengths``, the sum of the squares of the sequences' lengths.
    """
    return 2.0 * shape.matrix_parameters * tokens + 2.0 * shape.layers * shape.attention_width * squared_lengths


def training_flops(shape: ModelShape, tokens: int, squared_lengths: int) -> float:
    """Return the FLOPs of a forward and a backward pass.

    The backward pass takes twice the FLOPs of the forward pass, so both passes together take 3 times the FLOPs of the
    forward pass. Half of the backward pass computes gradients of weights. With LoRA, these are computed only for the
    adapters. LoRA therefore takes 2 + r times the FLOPs of the forward pass, where r is ``trained_parameters`` divided
    by ``matrix_parameters``. NeMo's helper for LoRA uses the same formula.
    """
    factor = 2.0 + shape.trained_parameters / shape.matrix_parameters if shape.adapters else 3.0
    return factor * forward_flops(shape, tokens, squared_lengths)


def peak_flops(device_name: str) -> float | None:
    """Return the peak of a device's dense bf16 arithmetic in FLOP/s, or None for a device that is not in `PEAK_FLOPS`,
    such as a CPU."""
    return next((peak for part, peak in PEAK_FLOPS if re.search(rf"{part}(?!\d)", device_name)), None)


def utilisation(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Return the model FLOPs utilisation from 0 to 1: ``flops`` per second as a share of ``peak`` times ``devices``.
    None where the peak is not known or no time has passed."""
    return flops / seconds / (devices * peak) if peak is not None and seconds > 0 else None
