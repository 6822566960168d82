"""Root mean square normalization (Zhang and Sennrich, 2019) in one kernel for each direction. The backward pass gets
the input and one number for each token.

A weight 1 + w takes three kernels forward and four backward, because ATen's kernel takes weights of the type of the
input only. 1 + w would be rounded to bf16, or the normalized input would be rounded once more than in the code of the
models, which multiplies in fp32.

`install.py` puts `rms_norm` into the modules whose code computes one of the forms of `Form`.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch.autograd.function import once_differentiable

ATEN = torch.ops.aten


class Form(Enum):
    """How the code of a model applies the weight. x is the normalized input, and w the weight of the module."""

    SCALED = "w * x"
    """Llama and most families."""
    CENTERED = "(1 + w) * x"
    """Gemma 1 to 3."""
    BARE = "x"
    """A norm without a weight."""


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, form: Form) -> torch.Tensor:
    """Return what `rms_norm` returns, by the formula and in fp32: the reference for recognizing modules and in
    tests."""
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    if weight is not None:
        normalized = normalized * (1 + weight.float() if form is Form.CENTERED else weight.float())
    return normalized.to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, form: Form) -> torch.Tensor:
    """Return ``x`` (..., F) divided by the root of the mean of its squares plus ``epsilon`` over the last dimension,
    multiplied by ``weight`` (F,) as ``form`` says. ``weight`` is None for `Form.BARE`, and has the type of ``x``."""
    output: torch.Tensor = _RMSNorm.apply(x, weight, epsilon, form)
    return output


class _RMSNorm(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, form: Form) -> torch.Tensor:
        scale = weight if form is Form.SCALED else None
        output, reciprocal = ATEN._fused_rms_norm(x, [x.shape[-1]], scale, epsilon)
        if form is Form.CENTERED and weight is not None:
            normalized = output if x.dtype == reciprocal.dtype else x * reciprocal
            torch.mul(normalized, 1 + weight.to(reciprocal.dtype), out=output)
        ctx.save_for_backward(x, weight, reciprocal)
        ctx.form = form
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch has no types here
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, reciprocal = ctx.saved_tensors
        weighed = weight is not None and ctx.needs_input_grad[1]
        if ctx.form is Form.SCALED:
            return *_backward(gradient, x, reciprocal, weight, (ctx.needs_input_grad[0], weighed)), None, None
        # The gradient of the weight does not depend on the weight, so it is the same in both forms.
        weight_gradient = _backward(gradient, x, reciprocal, weight, (False, True))[1] if weighed else None
        x_gradient = None
        if ctx.needs_input_grad[0]:
            wide = x
            if weight is not None:
                # In fp32, as in the code of the models, so that the gradient is rounded once.
                wide, gradient = x.to(reciprocal.dtype), gradient * (1 + weight.to(reciprocal.dtype))
            x_gradient, _ = _backward(gradient, wide, reciprocal, None, (True, False))
        return x_gradient.to(x.dtype) if x_gradient is not None else None, weight_gradient, None, None


def _backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    reciprocal: torch.Tensor,
    weight: torch.Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of ``x`` and ``weight``, as far as they are ``wanted``, for a norm that multiplies by
    ``weight``. ``reciprocal`` (..., 1) is one divided by the root mean square."""
    if x.device.type != "cpu":
        found = ATEN._fused_rms_norm_backward(gradient, x, [x.shape[-1]], reciprocal, weight, list(wanted))
        return found[0] if wanted[0] else None, found[1] if wanted[1] else None
    # ATen has no such kernel for the CPU.
    wide = gradient.to(reciprocal.dtype)
    normalized = x * reciprocal
    weight_gradient = (wide * normalized).flatten(0, -2).sum(0).to(gradient.dtype) if wanted[1] else None
    if not wanted[0]:
        return None, weight_gradient
    scaled = wide * weight if weight is not None else wide
    mean = (scaled * normalized).mean(-1, keepdim=True)
    return ((scaled - normalized * mean) * reciprocal).to(gradient.dtype), weight_gradient
