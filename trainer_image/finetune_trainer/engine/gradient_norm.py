"""The norm of a gradient, and the factor that clips the gradient.

The plain engine and, at ZeRO stages 1 and 2, the DeepSpeed engine compute both here, with the bits of DeepSpeed's own
code (`scaled_global_norm` and `unscale_and_clip_grads` in deepspeed/runtime/zero/stage_1_and_2.py). DeepSpeed computes
the norm in each update, and copies each gradient to fp64 for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

NORM_ELEMENTS = 1 << 22
"""The squares of this number of values are added up in fp64 at a time: 32 MiB. In fp32, torch's norm on the CPU is
wrong by half a percent for 67 million values."""
CLIPPING_EPSILON = 1e-6
"""A number that is added to the norm before the gradient is clipped, as in torch and DeepSpeed."""


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of the values of all ``tensors``, a scalar in fp32. The squares are added up in
    fp64, piece by piece, and the sum is rounded to fp32, so that the root of the sum has the bits of DeepSpeed's
    norm."""
    norms = [
        torch.linalg.vector_norm(piece, dtype=torch.float64)
        for tensor in tensors
        for piece in tensor.reshape(-1).split(NORM_ELEMENTS)
    ]
    return torch.stack(norms).square().sum().float() if norms else torch.zeros(())


def clipping_factor(norm: float, largest: float) -> float:
    """Return the factor for a gradient with the L2 norm ``norm``, so that its norm is at most ``largest``. The factor
    is 1 where ``largest`` is 0, which means no clipping. All steps are computed in fp32, as in ZeRO stages 1 and 2 of
    DeepSpeed, so that the factor has the same bits."""
    if largest == 0:
        return 1.0
    quotient = (torch.tensor(norm) + CLIPPING_EPSILON) / largest
    return float(1.0 / quotient.clamp(min=1.0))
