"""Rotary position embeddings (Su et al., 2021) in three kernels in bf16 for a tensor, or for queries and keys that lie
side by side in memory, and in fp32 in five. The backward pass gets cosine and sine only, which all layers share.

`install.py` puts `rotate_queries_and_keys` into the attention of models that turn the first half of the features
against the second half, as Llama does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def plain_rotation(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Return ``x`` (..., F) with its first R features turned, by the formula: the reference for recognizing the code of
    models and in tests. ``cosine`` and ``sine`` have R features."""
    size = cosine.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    mixed = turned * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((mixed.to(x.dtype), rest), dim=-1)


def plain_rotations(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `rotate_queries_and_keys` returns, by the formula."""
    return plain_rotation(query, cosine, sine), plain_rotation(key, cosine, sine)


def rotate_queries_and_keys(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``query`` and ``key``, (B, heads, T, F), with their first R features turned by the angles whose
    ``cosine`` and ``sine``, (B, 1, T, R), are given. All tensors have the same type."""
    turned: tuple[torch.Tensor, torch.Tensor] = _Rotation.apply(query, key, cosine, sine)
    return turned


class _Rotation(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cosine, sine)
        ctx.set_materialize_grads(False)
        both = side_by_side(query, key)
        if both is None:
            return _turned(query, cosine, sine, back=False), _turned(key, cosine, sine, back=False)
        turned = _turned(both, cosine, sine, back=False)
        heads = query.shape[1]
        return alias(turned[:, :heads]), alias(turned[:, heads:])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch has no types here
    def backward(
        ctx: Any, query_gradient: torch.Tensor | None, key_gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        both = None
        if query_gradient is not None and key_gradient is not None:
            both = side_by_side(query_gradient, key_gradient)
        if both is not None and query_gradient is not None:
            turned = _turned(both, cosine, sine, back=True)
            heads = query_gradient.shape[1]
            return turned[:, :heads], turned[:, heads:], None, None
        gradients = (
            _turned(gradient, cosine, sine, back=True) if wanted and gradient is not None else None
            for gradient, wanted in zip((query_gradient, key_gradient), ctx.needs_input_grad, strict=False)
        )
        return *gradients, None, None


def _turned(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, back: bool) -> torch.Tensor:
    """Return ``x`` turned by the angles, or turned ``back``. The heads of a token stay side by side in memory."""
    batch, heads, length, features = x.shape
    turned = torch.empty((batch, length, heads, features), dtype=x.dtype, device=x.device).transpose(1, 2)
    size = cosine.shape[-1]
    half = size // 2
    torch.mul(x[..., :size], cosine, out=turned[..., :size])
    # Forward: first * cosine - second * sine, and second * cosine + first * sine. The way back is the transposed
    # matrix, so each half is multiplied by the sine of the other half.
    own, other = sine[..., :half], sine[..., half:]
    if back:
        own, other = other, own
    sign = -1 if back else 1
    _add_product(turned[..., :half], x[..., half:size], own, sign=-sign)
    _add_product(turned[..., half:size], x[..., :half], other, sign=sign)
    if size < features:
        turned[..., size:].copy_(x[..., size:])
    return turned


def _add_product(total: torch.Tensor, x: torch.Tensor, angles: torch.Tensor, *, sign: int) -> None:
    """Add ``x`` * ``angles``, with the sign ``sign``, to ``total`` in place.

    In bf16 this is one kernel, which rounds once. In fp32 the product is rounded before it is added, as in the code of
    the models, so that the results have the same bits: AdamW would make differences of a weight out of them.
    """
    if total.dtype == torch.float32:
        total.add_(x * angles, alpha=sign)
    else:
        total.addcmul_(x, angles, value=sign)


def side_by_side(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor | None:
    """Return one tensor over the memory of ``first`` (B, H1, T, F) and ``second`` (B, H2, T, F), with the shape
    (B, H1 + H2, T, F). Return None where the heads of ``second`` do not follow those of ``first`` in memory."""
    others = [(tensor.shape[0], *tensor.shape[2:]) for tensor in (first, second)]
    if (
        others[0] != others[1]
        or first.untyped_storage()._cdata != second.untyped_storage()._cdata
        or first.stride() != second.stride()
        or first.dtype != second.dtype
        or second.storage_offset() - first.storage_offset() != first.shape[1] * first.stride(1)
    ):
        return None
    shape = (first.shape[0], first.shape[1] + second.shape[1], *first.shape[2:])
    return first.as_strided(shape, first.stride())


def alias(part: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the memory of ``part`` that autograd does not take for a view. Some models change the
    results of their layers in place, which torch refuses for views that an autograd function returns."""
    return torch.empty(0, dtype=part.dtype, device=part.device).set_(
        part.untyped_storage(), part.storage_offset(), part.shape, part.stride()
    )
