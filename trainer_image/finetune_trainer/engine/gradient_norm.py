"""The norm of a gradient, and the factor that clips the gradient.

The plain engine and, at ZeRO stages 1 and 2, the DeepSpeed engine compute both here, with the bits of DeepSpeed's own
code (`scaled_global_norm` and `unscale_and_clip_grads` in deepspeed/runtime/zero/stage_1_and_2.py). DeepSpeed computes
the norm in each update, and copies each gradient to fp64 for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

NORM_ELEMENTS = 1 << 22
"""The squares of this number of values are added up in fp64 at a time: 32 MiB. In fp32, torch's norm on the CPU is
wrong by half a percent for 67 million values."""
CPU_NORM_ELEMENTS = 1 << 18
"""The same on a CPU: 2 MiB, which stay in a cache between the two passes over it. More would also take time because
the system hands out large pieces of memory page by page, and does so anew in each step."""
CLIPPING_EPSILON = 1e-6
"""A number that is added to the norm before the gradient is clipped, as in torch and DeepSpeed."""


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of the values of all ``tensors``, a scalar in fp32. All tensors must be on one
    device.

    The squares are added up in fp64, piece by piece, and the sum is rounded to fp32, so that the root of the sum has
    the bits of DeepSpeed's norm. All pieces are copied into the same memory, and small tensors together.
    """
    values = [tensor.reshape(-1) for tensor in tensors if tensor.numel()]
    if not values:
        return torch.zeros(())
    device = values[0].device
    size = min(CPU_NORM_ELEMENTS if device.type == "cpu" else NORM_ELEMENTS, sum(tensor.numel() for tensor in values))
    room = torch.empty(size, dtype=torch.float64, device=device)
    squares = []
    for pieces in _pieces(values, size):
        sizes = [piece.numel() for piece in pieces]
        copies = room[: sum(sizes)]
        torch._foreach_copy_(list(copies.split(sizes)), pieces)
        squares.append(torch.dot(copies, copies))
    return torch.stack(squares).sum().float()


def _pieces(values: Sequence[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """Yield the flat tensors ``values`` in their order, cut so that those of a list have ``size`` values together, and
    those of the last list at most as many."""
    taken: list[torch.Tensor] = []
    free = size
    for tensor in values:
        start = 0
        while start < tensor.numel():
            piece = tensor[start : start + free]
            taken.append(piece)
            start, free = start + piece.numel(), free - piece.numel()
            if not free:
                yield taken
                taken, free = [], size
    if taken:
        yield taken


def clipping_factor(norm: float, largest: float) -> float:
    """Return the factor for a gradient with the L2 norm ``norm``, so that its norm is at most ``largest``. The factor
    is 1 where ``largest`` is 0, which means no clipping. All steps are computed in fp32, as in ZeRO stages 1 and 2 of
    DeepSpeed, so that the factor has the same bits."""
    if largest == 0:
        return 1.0
    quotient = (torch.tensor(norm) + CLIPPING_EPSILON) / largest
    return float(1.0 / quotient.clamp(min=1.0))
