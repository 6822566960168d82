"""The products of LoRA's matrices A with a dropped input, without the dropped input in memory.

Each adapter has a mask of its own (`loss/dropout.py`). In plain torch, each mask and each dropped input is written to
memory and read again, which triples the traffic of a training step. The three operators of this module read the input
once for all adapters that share it. On CUDA they are the kernels of `dropped_product_cuda.py`, which compute the masks
in registers. On the CPU they are plain torch: the reference.

`projections.py` calls the three functions. T is the number of tokens, I that of input features, and R the sum of the
ranks of the adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.kernels import dropped_product_cuda as cuda
from finetune_trainer.loss.dropout import keep_mask


@dataclass(frozen=True)
class Dropout:
    """The dropout of adapters that share an input."""

    keys: torch.Tensor
    """Shape (T,), int64: the dropout key of each token."""
    p: float
    salts: tuple[int, ...]
    """A number for each adapter, with which its masks differ from those of other adapters."""
    ranks: tuple[int, ...]
    """The rank of each adapter."""


NAMESPACE = "finetune"
OPERATORS = getattr(torch.ops, NAMESPACE)


def dropped_inner(x: torch.Tensor, a: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """Return the products (T, R) of the dropped ``x`` (T, I) with the rows of ``a`` (R, I)."""
    product: torch.Tensor = torch.ops.finetune.dropped_inner(
        x, dropout.keys, a, dropout.salts, dropout.ranks, dropout.p
    )
    return product


def dropped_gradient_of_a(gradient: torch.Tensor, x: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """Return the gradient (R, I) of the matrices A, where ``gradient`` (T, R) is that of `dropped_inner`."""
    found: torch.Tensor = torch.ops.finetune.dropped_gradient_of_a(
        gradient, x, dropout.keys, dropout.salts, dropout.ranks, dropout.p
    )
    return found


def dropped_input_gradient(gradient: torch.Tensor, a: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """Return the gradient (T, I) of x, where ``gradient`` (T, R) is that of `dropped_inner`."""
    d = dropout
    found: torch.Tensor = OPERATORS.dropped_input_gradient(gradient, d.keys, a, d.salts, d.ranks, d.p)
    return found


def _adapters(
    keys: torch.Tensor, salts: Sequence[int], ranks: Sequence[int], features: int, p: float
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield for each adapter its rows of the matrices A, and its mask (T, ``features``)."""
    start = 0
    for salt, rank in zip(salts, ranks, strict=True):
        yield slice(start, start + rank), keep_mask(keys ^ salt, features, p)
        start += rank


def _inner(
    x: torch.Tensor, keys: torch.Tensor, a: torch.Tensor, salts: Sequence[int], ranks: Sequence[int], p: float
) -> torch.Tensor:
    inner = _empty_inner(x, keys, a, salts, ranks, p)
    for rows, kept in _adapters(keys, salts, ranks, x.shape[1], p):
        inner[:, rows] = (x * kept * (1 / (1 - p))) @ a[rows].T
    return inner


def _empty_inner(x: torch.Tensor, _keys: torch.Tensor, a: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty((len(x), len(a)), dtype=x.dtype, device=x.device)


def _gradient_of_a(
    gradient: torch.Tensor,
    x: torch.Tensor,
    keys: torch.Tensor,
    salts: Sequence[int],
    ranks: Sequence[int],
    p: float,
) -> torch.Tensor:
    found = _empty_gradient_of_a(gradient, x)
    for rows, kept in _adapters(keys, salts, ranks, x.shape[1], p):
        found[rows] = gradient[:, rows].T @ (x * kept * (1 / (1 - p)))
    return found


def _empty_gradient_of_a(gradient: torch.Tensor, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty((gradient.shape[1], x.shape[1]), dtype=x.dtype, device=x.device)


def _input_gradient(
    gradient: torch.Tensor, keys: torch.Tensor, a: torch.Tensor, salts: Sequence[int], ranks: Sequence[int], p: float
) -> torch.Tensor:
    found = torch.zeros((len(gradient), a.shape[1]), dtype=a.dtype, device=a.device)
    for rows, kept in _adapters(keys, salts, ranks, a.shape[1], p):
        found += (gradient[:, rows] @ a[rows]) * kept * (1 / (1 - p))
    return found


def _empty_input_gradient(gradient: torch.Tensor, _keys: torch.Tensor, a: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty((len(gradient), a.shape[1]), dtype=a.dtype, device=a.device)


def _on_cuda(kernel: Any, plain: Any) -> Any:
    """Return the function of an operator on CUDA: ``kernel``, or ``plain`` for tensors of a type that the kernels do
    not take, and where there are no tokens, because CUDA refuses a kernel without blocks."""
    return lambda first, *others: (kernel if first.dtype in cuda.VALUES and len(first) else plain)(first, *others)


_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
"""Makes the operators known to torch. They have no gradients, because `projections.py` calls them inside of an autograd
function."""
for _name, _arguments, _plain, _kernel, _meta in (
    (
        "dropped_inner",
        "(Tensor x, Tensor keys, Tensor a, int[] salts, int[] ranks, float p) -> Tensor",
        _inner,
        cuda.dropped_inner,
        _empty_inner,
    ),
    (
        "dropped_gradient_of_a",
        "(Tensor gradient, Tensor x, Tensor keys, int[] salts, int[] ranks, float p) -> Tensor",
        _gradient_of_a,
        cuda.dropped_gradient_of_a,
        _empty_gradient_of_a,
    ),
    (
        "dropped_input_gradient",
        "(Tensor gradient, Tensor keys, Tensor a, int[] salts, int[] ranks, float p) -> Tensor",
        _input_gradient,
        cuda.dropped_input_gradient,
        _empty_input_gradient,
    ),
):
    _LIBRARY.define(_name + _arguments)
    for _place, _function in (("CPU", _plain), ("CUDA", _on_cuda(_kernel, _plain)), ("Meta", _meta)):
        _LIBRARY.impl(_name, _function, _place)
