"""Dense layers with LoRA, and the loss under a frozen output head, in fewer passes over memory than autograd takes.

Both compute what peft and torch compute, up to rounding; they are for training, so that what is scored and exported
stays bit for bit what peft computes.
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
    """Let the adapted dense layers of ``model`` train in fewer passes; return how many there are.

    Not under ZeRO-3, where the weights are gathered for one small module at a time.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear) and _is_plain(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)
    return len(layers)


def _is_plain(layer: Linear) -> bool:
    """Whether ``layer`` is a frozen `nn.Linear` with one adapter of the paper's kind."""
    return (
        type(layer.base_layer) is nn.Linear
        # Nobody has taken its place: neither an earlier call nor the head's loss (`LossHead`).
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
    """y = x W^T + bias + scaling (x A^T) B^T of x (..., I), frozen W (O, I), A (r, I) and B (O, r): the adapter's part
    is added to y and to x's gradient by the product that makes it, so neither exists on its own."""

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
        output = functional.linear(flat, weight, bias).addmm_(inner, b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scaling = scaling
        return output.view(*x.shape[:-1], -1)

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
    removed: torch.Tensor | None,
    chunk_rows: int,
) -> torch.Tensor:
    """Return the summed negative log-likelihood (nats, fp32) of ``targets`` (N,) under ``head`` over ``hidden`` (N, H).

    ``removed`` tokens get no probability; ``chunk_rows`` positions are computed at once. The gradient is made together
    with the loss, while a chunk of probabilities is there, so logits are neither kept nor computed twice.
    """
    return _FrozenHeadLoss.apply(hidden, head.weight, head.bias, targets, removed, chunk_rows)


class _FrozenHeadLoss(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """The gradient of -log softmax(W h)[t] with regard to h is (softmax(W h) - onehot(t)) W."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        removed: torch.Tensor | None,
        chunk_rows: int,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk_rows):
            part = slice(start, start + chunk_rows)
            logits = functional.linear(hidden[part], weight, bias).float()
            if removed is not None:
                logits.index_fill_(1, removed, float("-inf"))
            counted = (targets[part] != IGNORED).unsqueeze(1)
            wanted = targets[part].clamp(min=0).unsqueeze(1)
            chances = logits.log_softmax(-1)
            total -= (chances.gather(1, wanted) * counted).sum()
            chances.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=chances.dtype))
            torch.mm(chances.to(weight.dtype), weight, out=gradient[part])
            gradient[part].mul_(counted)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * factor.to(gradient.dtype), None, None, None, None, None
