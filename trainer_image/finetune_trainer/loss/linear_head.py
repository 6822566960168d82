"""The loss of a linear output head, trained or frozen, with its gradients computed in the forward pass.

`head.py` calls `linear_head_loss`. Otherwise the logits of each chunk of positions would be computed again in the
backward pass, which is a third of the head's work. The price is the memory of the gradients between the forward and the
backward pass: those of the hidden states, and of a trained weight as many bytes as the weight. Where no gradient is
wanted, as in an evaluation, no gradient is computed and no memory is taken for one.

At ZeRO-3, too, the gradient of the sharded weight is right: the head is a leaf module, so that its weight is whole from
the beginning of the head's forward pass to its end, and nothing reads the weight in the backward pass. DeepSpeed
gathers the weight again before the backward pass of the head, and reduces the gradient when autograd accumulates it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from finetune_trainer.data.batches import IGNORED

SCALED_ROWS_BYTES = 1 << 26
"""Number of bytes of a gradient that the CPU multiplies by the factor of the loss at a time. The CPU makes a copy in
fp32 of what it multiplies, and a GPU makes none."""


def linear_head_loss(
    hidden: torch.Tensor,
    head: nn.Linear,
    targets: torch.Tensor,
    *,
    excluded: torch.Tensor | None,
    chunk_rows: int,
    factor: float = 1.0,
) -> torch.Tensor:
    """Return the summed negative log-likelihood, a scalar in nats and fp32, of ``targets`` (N,) given ``hidden`` (N, H)
    and a linear ``head``.

    The tokens ``excluded`` get no probability. ``chunk_rows`` positions are computed at a time. Gradients flow to
    ``hidden``, and to weight and bias of ``head`` as far as they are trained. They can be computed once: a second
    backward pass through the result raises RuntimeError.

    ``factor`` is what the caller will multiply the result by before the backward pass. The gradients are right whatever
    the caller multiplies by. With this factor, though, they are rounded as autograd rounds them, which multiplies by
    the factor before it multiplies the matrices. Raises ValueError unless ``factor`` is positive and finite.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"the factor of a loss must be positive and finite: {factor}")
    # Inside of the function, torch reports that no gradients are computed, whatever the caller wants.
    graded = torch.is_grad_enabled()
    loss: torch.Tensor = _LinearHeadLoss.apply(
        hidden, head.weight, head.bias, targets, excluded, chunk_rows, factor, graded
    )
    return loss


class _LinearHeadLoss(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """Computes the loss that `linear_head_loss` returns, and its gradients. With d = softmax(W h + b) - onehot(t), the
    gradient of -log softmax(W h + b)[t] with regard to h is W^T d, with regard to W it is d h^T, and with regard to b
    it is d. The forward pass computes f d in place of d, where f is the expected factor of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        excluded: torch.Tensor | None,
        chunk_rows: int,
        expected: float,
        graded: bool,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        factor = torch.full((), expected, dtype=torch.float32, device=hidden.device)
        wanted = [graded and needed for needed in ctx.needs_input_grad[:3]]
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight) if wanted[1] else None
        of_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        for start in range(0, len(hidden), chunk_rows):
            part = slice(start, start + chunk_rows)
            logits = functional.linear(hidden[part], weight, bias).float()
            if excluded is not None:
                logits.index_fill_(1, excluded, float("-inf"))
            is_supervised = (targets[part] != IGNORED).unsqueeze(1)
            target = targets[part].clamp(min=0).unsqueeze(1)
            values = logits.log_softmax(-1)
            # The memory of a chunk is freed before more memory is needed. Logits are the largest tensors of a step.
            del logits
            # Token 0, which takes the place of a missing target, may be excluded: minus infinity times 0 is NaN.
            total -= values.gather(1, target).masked_fill(~is_supervised, 0).sum()
            if any(wanted):
                # This is the operator of autograd, so that the gradients have the same bits. It reads each value
                # before it writes the value's gradient in the same place.
                of_values = torch.zeros_like(values).scatter_(1, target, is_supervised * -factor)
                of_logits = torch.ops.aten._log_softmax_backward_data.out
                of_logits(of_values, values, -1, values.dtype, out=values)
                del of_values
                difference = values.to(weight.dtype)
                if of_hidden is not None:
                    torch.mm(difference, weight, out=of_hidden[part])
                if of_weight is not None:
                    of_weight.addmm_(difference.T, hidden[part])
                if of_bias is not None:
                    of_bias += difference.sum(0)
                del difference
            del values
        ctx.gradients, ctx.factor = (of_hidden, of_weight, of_bias), factor
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch has no types here
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of an output head can be computed once only")
        gradients, ctx.gradients = ctx.gradients, None
        # The quotient of two tensors is exactly 1 where the factor is the expected one. A GPU multiplies by the
        # reciprocal of a number that is no tensor, which can round to another value.
        further = factor / ctx.factor
        # A GPU would have to wait for the comparison, and multiplying by 1 changes nothing.
        if further.device.type != "cpu" or further != 1:
            for gradient in gradients:
                if gradient is not None:
                    _scale(gradient, further)
        return *gradients, None, None, None, None, None


def _scale(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply ``gradient`` by the scalar ``factor`` in place, because a second tensor of the weight's size would be
    the largest of the step.

    The product is computed in fp32 and rounded once. A factor that is rounded to bf16 first would change all gradients
    of the model by the same up to 0.2%, and their norm with them.
    """
    rows = len(gradient)
    if gradient.device.type == "cpu":
        rows = max(1, SCALED_ROWS_BYTES * rows // max(1, gradient.nbytes))
    for part in gradient.split(max(1, rows)):
        # torch computes in the type of ``factor`` only where this is no scalar.
        part.mul_(factor.view(1))
