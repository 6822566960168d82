"""Fused kernels for linear layers with a LoRA adapter, and for the loss of a frozen output head. The kernels make fewer
passes over memory than torch's autograd.

`engine/engine.py` fuses the layers, and `head.py` uses the loss. The kernels compute the same values as peft and torch,
up to rounding. The fused layers are used in training only, so that scores and exports are bit for bit those of peft.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.nn import functional

from finetune_trainer.data.batches import IGNORED

ADAPTER = "default"


def fuse_adapters(model: nn.Module) -> int:
    """Let the linear layers of ``model`` that have a plain LoRA adapter (see `_is_plain`) train with fused kernels.
    Return the number of such layers. A layer whose LoRA dropout is active still computes as in peft.

    Do not call this under ZeRO-3, which gathers a module's weights only when the module's own `forward` is called. A
    fused layer reads the weights of its inner modules without calling them.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear) and _is_plain(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)
    return len(layers)


def _is_plain(layer: Linear) -> bool:
    """Return whether ``layer`` is a frozen `nn.Linear` with one adapter as in the LoRA paper (Hu et al., 2021), without
    variants such as DoRA."""
    return (
        type(layer.base_layer) is nn.Linear
        # No other forward function was set, neither by an earlier call of `fuse_adapters` nor by `LossHead`.
        and "forward" not in vars(layer)
        and not layer.base_layer.weight.requires_grad
        and (layer.base_layer.bias is None or not layer.base_layer.bias.requires_grad)
        and list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant
        and layer.lora_B[ADAPTER].bias is None
        and not layer.fan_in_fan_out
    )


def _forward(layer: Linear, unfused: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    dropout = layer.lora_dropout[ADAPTER]
    a, b, base = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.base_layer
    drops = layer.training and getattr(dropout, "p", 0) > 0
    plain = not (args or kwargs or drops or layer.disable_adapters or layer.merged)
    if plain and layer.training and torch.is_grad_enabled() and x.dtype == a.dtype == base.weight.dtype:
        return _AdaptedLinear.apply(x, base.weight, base.bias, a, b, layer.scaling[ADAPTER])
    return unfused(x, *args, **kwargs)


class _AdaptedLinear(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """Computes y = x W^T + bias + scaling (x A^T) B^T, for x (..., I), frozen W (O, I), A (r, I) and B (O, r).

    The adapter's part of y is added to y in place. In the backward pass, the adapter's part of the gradient of x is
    added to this gradient in place. So neither part exists as a tensor of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ a.T
        # The result must not be a view, because some models change it in place.
        output = functional.linear(flat.view(x.shape), weight, bias)
        output.view(-1, output.shape[-1]).addmm_(inner, b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        inner_gradient = (flat @ b).mul_(ctx.scaling)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (flat @ weight).addmm_(inner_gradient, a).view(x.shape)
        a_gradient = inner_gradient.T @ x.reshape(-1, x.shape[-1])
        b_gradient = (flat.T @ inner).mul_(ctx.scaling)
        return x_gradient, None, None, a_gradient, b_gradient, None


def frozen_head_loss(
    hidden: torch.Tensor,
    head: nn.Linear,
    targets: torch.Tensor,
    *,
    excluded: torch.Tensor | None,
    chunk_rows: int,
) -> torch.Tensor:
    """Return the summed negative log-likelihood, a scalar in nats and fp32, of ``targets`` (N,) given ``hidden`` (N, H)
    and a frozen ``head``.

    The tokens ``excluded`` get no probability. ``chunk_rows`` positions are computed at a time. The gradient with
    regard to ``hidden`` is computed in the forward pass, while the probabilities of a chunk are in memory, so logits
    are neither kept nor computed twice.
    """
    return _FrozenHeadLoss.apply(hidden, head.weight, head.bias, targets, excluded, chunk_rows)


class _FrozenHeadLoss(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """Computes the loss that `frozen_head_loss` returns, and its gradient. The gradient of -log softmax(W h)[t] with
    regard to h is W^T (softmax(W h) - onehot(t))."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        excluded: torch.Tensor | None,
        chunk_rows: int,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk_rows):
            part = slice(start, start + chunk_rows)
            logits = functional.linear(hidden[part], weight, bias).float()
            if excluded is not None:
                logits.index_fill_(1, excluded, float("-inf"))
            is_supervised = (targets[part] != IGNORED).unsqueeze(1)
            target = targets[part].clamp(min=0).unsqueeze(1)
            log_probabilities = logits.log_softmax(-1)
            # Token 0, which takes the place of a missing target, may be excluded: minus infinity times 0 is NaN.
            total -= log_probabilities.gather(1, target).masked_fill(~is_supervised, 0).sum()
            log_probabilities.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=log_probabilities.dtype))
            torch.mm(log_probabilities.to(weight.dtype), weight, out=gradient[part])
            gradient[part].mul_(is_supervised)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * factor.to(gradient.dtype), None, None, None, None, None
