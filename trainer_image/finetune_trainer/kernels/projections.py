"""Linear layers that read the same input, with or without LoRA adapters, as one autograd function.

`install.py` groups the layers, for example those of queries, keys and values, and calls `project`. The last linear
layer of a gated feed-forward layer goes through `project_gated`, which keeps the two inputs of the gated product and
computes the product again in the backward pass.

The matrices A of a group are multiplied with the input in one product, so that the input is read once. The adapter's
part of an output, or of the input's gradient, is where the large product then adds its own part, so that it costs no
pass over memory of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from finetune_trainer.kernels.dropped_product import (
    Dropout,
    dropped_gradient_of_a,
    dropped_inner,
    dropped_input_gradient,
)
from finetune_trainer.kernels.gated_product import Activation, activate, gated_product_backward
from finetune_trainer.kernels.rotary import alias


class Projection(NamedTuple):
    """A linear layer x W^T + bias + scaling (dropout(x) A^T) B^T."""

    weight: torch.Tensor
    """W, of shape (O, I)."""
    bias: torch.Tensor | None = None
    """Shape (O,)."""
    a: torch.Tensor | None = None
    """A, of shape (r, I). None for a layer without an adapter."""
    b: torch.Tensor | None = None
    """B, of shape (O, r)."""
    scaling: float = 1.0

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The TENSORS tensors of the layer."""
        return self.weight, self.bias, self.a, self.b


TENSORS = 4
"""Number of tensors in a projection. `torch.autograd.Function` takes tensors as single arguments only."""


@dataclass(frozen=True)
class _Fixed:
    """What the functions need beside tensors."""

    scalings: tuple[float, ...]
    dropout: Dropout | None
    joined: bool = False


def project(
    x: torch.Tensor, layers: Sequence[Projection], dropout: Dropout | None = None, *, joined: bool = False
) -> list[torch.Tensor]:
    """Return the outputs (..., O) of ``layers`` for ``x`` (..., I). ``dropout`` acts between x and the matrices A.

    With ``joined``, the first two outputs of a token lie side by side in memory, as `rotary.py` likes queries and keys.
    """
    fixed = _Fixed(tuple(layer.scaling for layer in layers), dropout, joined and len(layers) > 1)
    return list(_Projections.apply(x, fixed, *_tensors(layers)))


def project_gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: Activation,
    layer: Projection,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Return the output of ``layer`` for activation(``gate``) * ``up``, all of the shape (..., I)."""
    output: torch.Tensor = _GatedProjection.apply(
        gate, up, activation, _Fixed((layer.scaling,), dropout), *_tensors([layer])
    )
    return output


def _tensors(layers: Sequence[Projection]) -> list[torch.Tensor | None]:
    return [tensor for layer in layers for tensor in layer.tensors]


def _layers(tensors: Sequence[torch.Tensor | None], fixed: _Fixed) -> list[Projection]:
    """Return the projections that `_tensors` took apart."""
    layers = []
    for number, scaling in enumerate(fixed.scalings):
        weight, bias, a, b = tensors[number * TENSORS : (number + 1) * TENSORS]
        assert weight is not None
        layers.append(Projection(weight, bias, a, b, scaling))
    return layers


class _Needed(NamedTuple):
    """What the backward pass reads, beside weights."""

    x: bool
    """The input: for the gradients of weights W and matrices A."""
    inner: bool
    """The products with the matrices A: for the gradients of matrices B."""


def _needed(wanted: Sequence[bool]) -> _Needed:
    """Return what the backward pass reads. ``wanted`` says which gradients of the tensors of `_tensors` are wanted."""
    return _Needed(any(wanted[0::TENSORS]) or any(wanted[2::TENSORS]), any(wanted[3::TENSORS]))


class _Projections(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fixed: _Fixed, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        layers, needed = _layers(tensors, fixed), _needed(ctx.needs_input_grad[2:])
        outputs, inner, all_a = _forward(x, layers, fixed)
        ctx.save_for_backward(x if needed.x else None, inner if needed.inner else None, all_a, *tensors)
        ctx.fixed, ctx.shape = fixed, x.shape
        # A layer whose output nobody uses gets no gradient, as in plain torch, and not zeros, which an optimizer with
        # weight decay would apply.
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch has no types here
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, inner, all_a, *tensors = ctx.saved_tensors
        layers = _layers(tensors, ctx.fixed)
        flat = x.reshape(-1, x.shape[-1]) if x is not None else None
        x_gradient, found = _backward(
            gradients, flat, layers, inner, all_a, ctx.fixed, ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        )
        return x_gradient.view(ctx.shape) if x_gradient is not None else None, None, *found


class _GatedProjection(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: Activation,
        fixed: _Fixed,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        product, needed = activate(gate, activation).mul_(up), _needed(ctx.needs_input_grad[4:])
        (output,), inner, all_a = _forward(product, _layers(tensors, fixed), fixed)
        ctx.save_for_backward(gate, up, inner if needed.inner else None, all_a, *tensors)
        ctx.activation, ctx.fixed = activation, fixed
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch has no types here
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, inner, all_a, *tensors = ctx.saved_tensors
        layers, wanted = _layers(tensors, ctx.fixed), ctx.needs_input_grad
        active = activate(gate, ctx.activation)
        product = active * up if _needed(wanted[4:]).x else None
        flat = product.reshape(-1, product.shape[-1]) if product is not None else None
        needs_product = wanted[0] or wanted[1]
        product_gradient, found = _backward(
            (gradient,), flat, layers, inner, all_a, ctx.fixed, needs_product, wanted[4:]
        )
        if product_gradient is None:
            return None, None, None, None, *found
        # Nothing reads the product any more, and it is as large as what is computed now.
        del product, flat
        parts = gated_product_backward(product_gradient.view(gate.shape), gate, up, active, ctx.activation)
        return *parts, None, None, *found


def _forward(
    x: torch.Tensor, layers: Sequence[Projection], fixed: _Fixed
) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    """Return the outputs of ``layers``, the products of ``x`` with all matrices A (tokens, sum of ranks), and these
    matrices (sum of ranks, I). The last two are None where no layer has an adapter."""
    flat = x.reshape(-1, x.shape[-1])
    matrices = [layer.a for layer in layers if layer.a is not None]
    inner = all_a = None
    if matrices:
        all_a = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
        inner = flat @ all_a.T if fixed.dropout is None else dropped_inner(flat, all_a, fixed.dropout)
    places = _places(x, layers, joined=fixed.joined)
    for place, layer, part in zip(places, layers, _parts(inner, layers), strict=True):
        rows = place.view(-1, place.shape[-1])
        if part is None or layer.b is None:
            _linear(flat, layer, rows)
            continue
        # The small product is written first, and the large product adds to it, so that no kernel only adds.
        start = layer.bias if layer.bias is not None else rows
        torch.addmm(start, part, layer.b.T, beta=layer.bias is not None, alpha=layer.scaling, out=rows)
        rows.addmm_(flat, layer.weight.T)
    return places, inner, all_a


def _places(x: torch.Tensor, layers: Sequence[Projection], *, joined: bool) -> list[torch.Tensor]:
    """Return memory for the outputs of ``layers``. No output is a view, because some models change the outputs in
    place. With ``joined``, the first two lie side by side."""
    sizes, shape = [len(layer.weight) for layer in layers], x.shape[:-1]

    def memory(size: int) -> torch.Tensor:
        return torch.empty((*shape, size), dtype=x.dtype, device=x.device)

    together = [alias(part) for part in memory(sum(sizes[:2])).split(sizes[:2], dim=-1)] if joined else []
    return [*together, *(memory(size) for size in sizes[len(together) :])]


def _linear(flat: torch.Tensor, layer: Projection, rows: torch.Tensor) -> None:
    """Write the output of ``layer`` without its adapter to ``rows``."""
    if layer.bias is None:
        torch.mm(flat, layer.weight.T, out=rows)
    else:
        torch.addmm(layer.bias, flat, layer.weight.T, out=rows)


def _parts(inner: torch.Tensor | None, layers: Sequence[Projection]) -> list[torch.Tensor | None]:
    """Return for each layer its columns of ``inner``, None for a layer without an adapter."""
    if inner is None:
        return [None for _ in layers]
    parts = iter(inner.split([len(layer.a) for layer in layers if layer.a is not None], dim=1))
    return [next(parts) if layer.a is not None else None for layer in layers]


def _backward(
    gradients: Sequence[torch.Tensor | None],
    flat: torch.Tensor | None,
    layers: Sequence[Projection],
    inner: torch.Tensor | None,
    all_a: torch.Tensor | None,
    fixed: _Fixed,
    needs_x: bool,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Return the gradient (tokens, I) of the input ``flat``, and those of the tensors of ``layers`` in the order of
    `_tensors`. ``needs_x`` and ``needed`` say which gradients are wanted. ``flat`` and ``inner`` are None where
    `_needed` says so, and a gradient is None for an output that is not used."""
    found: list[torch.Tensor | None] = [None] * len(needed)
    if all(gradient is None for gradient in gradients):
        return None, found
    needs_a = any(needed[2::TENSORS])
    inner_gradient = _memory_like_inner(gradients, all_a) if all_a is not None and (needs_x or needs_a) else None
    zipped = zip(gradients, layers, _parts(inner, layers), _parts(inner_gradient, layers), strict=True)
    for number, (gradient, layer, part, part_gradient) in enumerate(zipped):
        if gradient is None:
            if part_gradient is not None:
                part_gradient.zero_()
            continue
        rows = gradient.reshape(-1, gradient.shape[-1])
        weight, bias, _, b = range(number * TENSORS, (number + 1) * TENSORS)
        if part_gradient is not None and layer.b is not None:
            # With beta=0 the first argument has no effect.
            torch.addmm(part_gradient, rows, layer.b, beta=0, alpha=layer.scaling, out=part_gradient)
        if needed[b] and part is not None and layer.b is not None:
            found[b] = torch.addmm(layer.b, rows.T, part, beta=0, alpha=layer.scaling)
        if needed[weight] and flat is not None:
            found[weight] = rows.T @ flat
        if needed[bias]:
            found[bias] = rows.sum(0)
    x_gradient = _input_gradient(gradients, layers, inner_gradient, all_a, fixed) if needs_x else None
    if needs_a and inner_gradient is not None and flat is not None:
        if fixed.dropout is None:
            a_gradient = inner_gradient.T @ flat
        else:
            a_gradient = dropped_gradient_of_a(inner_gradient, flat, fixed.dropout)
        adapted = [number for number, layer in enumerate(layers) if layer.a is not None]
        ranks = [len(layer.a) for layer in layers if layer.a is not None]
        for number, part in zip(adapted, a_gradient.split(ranks), strict=True):
            if needed[number * TENSORS + 2] and gradients[number] is not None:
                found[number * TENSORS + 2] = part
    return x_gradient, found


def _memory_like_inner(gradients: Sequence[torch.Tensor | None], all_a: torch.Tensor) -> torch.Tensor:
    """Return memory for the gradient (tokens, sum of ranks) of the products with the matrices A."""
    first = next(gradient for gradient in gradients if gradient is not None)
    rows = first.numel() // first.shape[-1]
    return torch.empty((rows, len(all_a)), dtype=first.dtype, device=first.device)


def _input_gradient(
    gradients: Sequence[torch.Tensor | None],
    layers: Sequence[Projection],
    inner_gradient: torch.Tensor | None,
    all_a: torch.Tensor | None,
    fixed: _Fixed,
) -> torch.Tensor | None:
    """Return the gradient (tokens, I) of the input. The small product is first, and the large products add to it."""
    total: torch.Tensor | None = None
    if inner_gradient is not None and all_a is not None:
        if fixed.dropout is None:
            total = inner_gradient @ all_a
        else:
            total = dropped_input_gradient(inner_gradient, all_a, fixed.dropout)
    # In the order of autograd, which begins with the layer that was computed last. So the sum has the bits of autograd
    # in fp32, as far as the product that adds does not add up in parts.
    for gradient, layer in reversed(list(zip(gradients, layers, strict=True))):
        if gradient is None:
            continue
        rows = gradient.reshape(-1, gradient.shape[-1])
        total = rows @ layer.weight if total is None else total.addmm_(rows, layer.weight)
    return total
