"""Finds the linear layers of a model that read the same tensor, such as those of queries, keys and values.

`install.py` lets `projections.py` compute the layers of a group together. Which layers share an input follows from the
code of a model, and not from the names of its layers. So the model computes a text of two tokens once, and the tensors
that the layers get are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from finetune_trainer.model.packed_attention import note_borders


def find_shared_inputs(model: nn.Module, layers: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Return groups of ``layers`` of ``model`` that get the same tensor, one directly after the other. Each group is in
    the order of the calls. A layer that is called several times or never, or alone with its input, is in no group."""
    calls: list[tuple[nn.Module, torch.Tensor]] = []

    def noted(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # The tensor itself is kept, because another tensor could take its place in memory.
        if inputs and isinstance(inputs[0], torch.Tensor):
            calls.append((module, inputs[0]))

    hooks = [layer.register_forward_pre_hook(noted) for layer in layers]
    try:
        _compute_two_tokens(model)
    finally:
        for hook in hooks:
            hook.remove()
    counted = Counter(module for module, _ in calls)
    groups: list[list[nn.Module]] = []
    before: torch.Tensor | None = None
    for module, tensor in calls:
        if before is tensor and groups:
            groups[-1].append(module)
        else:
            groups.append([module])
        before = tensor
    return [group for group in groups if len(group) > 1 and all(counted[module] == 1 for module in group)]


def _compute_two_tokens(model: nn.Module) -> None:
    """Call ``model`` as in an evaluation, and leave its modules in the mode in which they were."""
    device = next(model.parameters()).device
    # The borders of an earlier micro-batch would divide the two tokens.
    note_borders(None)
    modes = [module.training for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=device), use_cache=False)
    finally:
        for module, training in zip(model.modules(), modes, strict=True):
            module.training = training
