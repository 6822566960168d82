"""Finds and marks the leaf modules of ZeRO-3. DeepSpeed gathers the weights of a leaf module and the weights of all
modules in it together.

ZeRO-3 gathers the weights of a module when the module is called. For some modules this moment is too late, or comes too
often. `engine.py` turns these modules into leaf modules before it makes DeepSpeed's engine.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper


def make_leaf_modules(model: torch.nn.Module, head: torch.nn.Module | None) -> None:
    """Make leaf modules of those modules of ``model`` that ZeRO-3 must gather as a whole. ``head`` is the output head,
    None where the model has none."""
    from deepspeed.utils import set_z3_leaf_module

    # The head computes the loss in chunks. A gather for each chunk would hang, because ranks may compute different
    # numbers of chunks.
    heads = [head] if head is not None else []
    for module in (*heads, *modules_that_read_inner_weights(model), *modules_of_experts(model)):
        set_z3_leaf_module(module, True)
        if any(parameter.requires_grad for parameter in module.parameters()):
            module.register_forward_pre_hook(_let_an_input_require_a_gradient)


def _let_an_input_require_a_gradient(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return ``inputs``, the positional arguments of a trained leaf module, with the first floating-point tensor among
    them replaced by an equal tensor that requires a gradient. Return None where nothing must change.

    DeepSpeed reduces the gradients of all weights of a leaf module when torch reports that the gradients of the
    module's inputs are computed. Without an input that requires a gradient, torch reports this before any gradient in
    the module is computed, and DeepSpeed reduces zeros. A first layer behind a frozen embedding has no such input.
    """
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    if not torch.is_grad_enabled() or any(value.requires_grad for value in tensors):
        return None
    first = next((value for value in tensors if value.is_floating_point()), None)
    if first is None:
        return None
    return tuple(value.detach().requires_grad_() if value is first else value for value in inputs)


def modules_of_experts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the mixtures of experts that have the weights of all experts in one inner module. Such a mixture calls its
    inner module once for each expert that gets a token.

    ZeRO-3 gathers the weights of a module when the module is called. Each rank computes different tokens, so the ranks
    would call the inner module at different times and wait for each other. The weights of the inner module must
    therefore be gathered together with the whole mixture.
    """
    return [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts"
        and [any(True for _ in inner.parameters()) for inner in module.children()].count(True) == 1
    ]


def modules_that_read_inner_weights(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the outermost modules of peft that read weights of the modules in them without calling these modules.

    ZeRO-3 gathers the weights of a module when the module is called, so the weights of the inner modules must be
    gathered together with those of the outer module. The modules found are the wrappers of expert weights, and the
    layers with DoRA, which compute the norms of the base model's weight.

    Embeddings are left out. The input of a trained leaf module must require a gradient, and an embedding reads
    integers, which can't. DeepSpeed gathers each weight of an embedding at the first access to the weight.
    """
    found: list[torch.nn.Module] = []
    inner: set[torch.nn.Module] = set()
    for module in model.modules():
        if (
            module not in inner
            and isinstance(module, LoraLayer)
            and not isinstance(module.get_base_layer(), torch.nn.Embedding)
            and (isinstance(module, ParamWrapper) or module.lora_variant)
        ):
            found.append(module)
            inner.update(module.modules())
    return found
