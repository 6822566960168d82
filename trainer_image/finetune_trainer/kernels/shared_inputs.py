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
from finetune_trainer.pod.errors import first_line, library_boundary


class TrialError(Exception):
    """The code of a model can't compute two tokens. The text is the first line of what the code raised."""


def find_shared_inputs(model: nn.Module, layers: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Return groups of ``layers`` of ``model`` that get the same tensor, one directly after the other. Each group is in
    the order of the calls. A layer that is called several times or never, or alone with its input, is in no group.

    Raises TrialError where the model can't compute two tokens, for example because it asks for more than tokens.
    """
    calls: list[tuple[nn.Module, torch.Tensor, int | None]] = []

    def noted(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # The tensor itself is kept, because another tensor could take its place in memory.
        if inputs and isinstance(inputs[0], torch.Tensor):
            calls.append((module, inputs[0], version_of(inputs[0])))

    hooks = [layer.register_forward_pre_hook(noted) for layer in layers]
    try:
        _compute_two_tokens(model)
    finally:
        for hook in hooks:
            hook.remove()
    counted = Counter(module for module, _, _ in calls)
    groups: list[list[nn.Module]] = []
    before: torch.Tensor | None = None
    version_before: int | None = None
    for module, tensor, version in calls:
        if before is tensor and version == version_before is not None:
            groups[-1].append(module)
        else:
            groups.append([module])
        before, version_before = tensor, version
    return [group for group in groups if len(group) > 1 and all(counted[module] == 1 for module in group)]


def version_of(tensor: torch.Tensor) -> int | None:
    """Return a number that each change of ``tensor`` in place raises. Return None for a tensor of torch's inference
    mode, which has no such number."""
    return None if tensor.is_inference() else tensor._version


def _as_trial_error(error: BaseException) -> TrialError:
    return TrialError(first_line(error))


def _compute_two_tokens(model: nn.Module) -> None:
    """Call ``model`` as in an evaluation, and leave its modules in the mode in which they were."""
    device = next(model.parameters()).device
    # The borders of an earlier micro-batch would divide the two tokens.
    note_borders(None)
    modes = [module.training for module in model.modules()]
    model.eval()
    try:
        # Memory that is missing here would be missing in training too.
        with torch.no_grad(), library_boundary(_as_trial_error, torch.OutOfMemoryError):
            model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=device), use_cache=False)
    finally:
        for module, training in zip(model.modules(), modes, strict=True):
            module.training = training
