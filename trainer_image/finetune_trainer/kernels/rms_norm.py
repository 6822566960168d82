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
    output: torch.Tensor = _RMSNorm.apply(x, x if _has_two_gradients(x) else None, weight, epsilon, form)
    return output


def has_backward_kernel(x: torch.Tensor) -> bool:
    """Return whether ATen has a kernel for the backward pass on the device of ``x``. On the CPU, ATen has none."""
    return bool(x.device.type != "cpu")


def _has_two_gradients(x: torch.Tensor) -> bool:
    """Return whether the gradient of ``x`` is passed on as two terms, as by the code of the models in fp32: the code
    reads ``x`` for the mean of the squares and for the quotient, and autograd adds each term alone to the gradient of
    the residual connection. The sum of the two terms, added to that gradient, would have other last bits.

    On the CPU two terms cost no further pass over memory. On a GPU, ATen's kernel returns the sum.
    """
    return not has_backward_kernel(x) and x.dtype == torch.float32


class _RMSNorm(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """The norm of ``x``. ``again`` is ``x`` too where the gradient has two terms, so that the second term has a place,
    and else None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        again: torch.Tensor | None,
        weight: torch.Tensor | None,
        epsilon: float,
        form: Form,
    ) -> torch.Tensor:
        scale = weight if form is Form.SCALED else None
        output, reciprocal = ATEN._fused_rms_norm(x, [x.shape[-1]], scale, epsilon)
        if form is Form.CENTERED and weight is not None:
            normalized = output if x.dtype == reciprocal.dtype else x * reciprocal
            torch.mul(normalized, 1 + weight.to(reciprocal.dtype), out=output)
        ctx.save_for_backward(x, weight, reciprocal)
        ctx.form, ctx.terms = form, 1 if again is None else 2
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch has no types here
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, reciprocal = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        if has_backward_kernel(x):
            return *_fused_gradients(gradient, x, reciprocal, weight, ctx.form, (of_x, of_weight)), None, None
        weight_gradient = _weight_gradient(gradient, x, reciprocal) if of_weight else None
        if not of_x:
            return None, None, weight_gradient, None, None
        if weight is not None:
            # In fp32, as in the code of the models, so that the gradient is rounded once.
            wide = weight.to(reciprocal.dtype)
            gradient = gradient * (wide if ctx.form is Form.SCALED else 1 + wide)
        of_quotient, of_mean = _terms(gradient, x, reciprocal)
        if ctx.terms == 2:
            return of_quotient, of_mean, weight_gradient, None, None
        return of_mean.add_(of_quotient).to(x.dtype), None, weight_gradient, None, None


def _fused_gradients(
    gradient: torch.Tensor,
    x: torch.Tensor,
    reciprocal: torch.Tensor,
    weight: torch.Tensor | None,
    form: Form,
    wanted: tuple[bool, bool],
) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
    """Return the gradients of ``x`` and ``weight`` by ATen's kernel for GPUs, as far as they are ``wanted``, and
    between them None in the place of the second term. ``reciprocal`` (..., 1) is one divided by the root mean
    square."""
    fused, shape = ATEN._fused_rms_norm_backward, [x.shape[-1]]
    if form is not Form.CENTERED or weight is None:
        found = fused(gradient, x, shape, reciprocal, weight, list(wanted))
        return found[0] if wanted[0] else None, None, found[1] if wanted[1] else None
    # The gradient of the weight does not depend on the weight, so it is the same in both forms.
    weight_gradient = fused(gradient, x, shape, reciprocal, weight, [False, True])[1] if wanted[1] else None
    if not wanted[0]:
        return None, None, weight_gradient
    # In fp32, as in the code of the models, so that the gradient is rounded once.
    wide, gradient = x.to(reciprocal.dtype), gradient * (1 + weight.to(reciprocal.dtype))
    return fused(gradient, wide, shape, reciprocal, None, [True, False])[0].to(x.dtype), None, weight_gradient


def _weight_gradient(gradient: torch.Tensor, x: torch.Tensor, reciprocal: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the weight by the operations of autograd, which has the bits of autograd in fp32."""
    return (x * reciprocal).mul_(gradient).flatten(0, -2).sum(0).to(gradient.dtype)


def _terms(gradient: torch.Tensor, x: torch.Tensor, reciprocal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two terms of the gradient of ``x``, where ``gradient`` is that of the quotient: with r for
    ``reciprocal`` and F features, g r, and -x r^3 sum(g x) / F, which comes from the mean of the squares. The
    operations are those of autograd, and so are the bits in fp32."""
    of_reciprocal = (gradient * x.to(reciprocal.dtype)).sum(-1, keepdim=True)
    of_mean = of_reciprocal.mul_(-0.5).mul_(reciprocal.pow(3)).div_(x.shape[-1])
    return gradient * reciprocal, (x.to(reciprocal.dtype) * 2).mul_(of_mean)
