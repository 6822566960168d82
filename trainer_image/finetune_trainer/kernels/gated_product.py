"""The product of a gated feed-forward layer, activation(gate) * up (Shazeer, 2020: SwiGLU and GeGLU). The backward pass
gets both inputs, and computes the activation again.

`install.py` puts `gated_product` into the layers that are recognized, or the function of `projections.py` that also
contains the layer's last product.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

ATEN = torch.ops.aten


class Activation(StrEnum):
    """The activations of gated layers for which ATen has a kernel for each direction."""

    SILU = "silu"
    GELU = "none"
    GELU_TANH = "tanh"


def activate(gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return the activation of ``gate``, a tensor of the same shape."""
    if activation is Activation.SILU:
        return functional.silu(gate)
    return functional.gelu(gate, approximate=activation.value)


def plain_gated_product(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return what `gated_product` returns, by the formula: the reference for recognizing modules and in tests."""
    return activate(gate, activation) * up


def activation_backward(gradient: torch.Tensor, gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return the gradient of ``gate`` where ``gradient`` is that of its activation."""
    found: torch.Tensor = (
        ATEN.silu_backward(gradient, gate)
        if activation is Activation.SILU
        else ATEN.gelu_backward(gradient, gate, approximate=activation.value)
    )
    return found


def gated_product(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return activation(``gate``) * ``up``, all of one shape and type."""
    product: torch.Tensor = _GatedProduct.apply(gate, up, activation)
    return product


def gated_product_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, active: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of ``gate`` and ``up``. ``active`` is the activation of ``gate``; it is overwritten."""
    gate_gradient = activation_backward(gradient * up, gate, activation)
    return gate_gradient, active.mul_(gradient)


class _GatedProduct(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activate(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch has no types here
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        active = activate(gate, ctx.activation)
        return *gated_product_backward(gradient, gate, up, active, ctx.activation), None
