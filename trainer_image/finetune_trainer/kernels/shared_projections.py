"""Linear layers of a model that train with `projections.py`: a layer with an adapter alone, or layers that read the
same tensor together.

`install.py` makes a `SharedInput` for each. Whether the adapters of a layer are plain LoRA, and whether they are
switched on, is asked at each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as AdaptedLinear
from torch import nn

from finetune_trainer.kernels.calls import are_plain, computes_gradients, has_no_hooks, runs_only_its_code
from finetune_trainer.kernels.dropped_product import Dropout
from finetune_trainer.kernels.projections import Projection, project
from finetune_trainer.kernels.shared_inputs import version_of
from finetune_trainer.loss.dropout import ExampleDropout

ADAPTER = "default"
"""The name of the adapter that is trained, in peft."""


def why_not(layer: nn.Module) -> str:
    """Return why the linear layer ``layer`` can't be computed by `project`, or an empty text if it can."""
    if not isinstance(layer, AdaptedLinear):
        return "" if type(layer) is nn.Linear else "it is no plain linear layer"
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return "its base is no plain linear layer"
    if list(layer.lora_A) != [ADAPTER] or layer.lora_B[ADAPTER].bias is not None or layer.fan_in_fan_out:
        return "it has no adapter, several adapters, or an adapter with a bias"
    return "its adapter is a variant of LoRA such as DoRA" if layer.lora_variant else ""


def drops(layer: nn.Module) -> bool:
    """Return whether ``layer`` has an adapter with dropout."""
    return isinstance(layer, AdaptedLinear) and getattr(layer.lora_dropout[ADAPTER], "p", 0) > 0


class Ready(NamedTuple):
    """What `project` needs for a group of layers."""

    layers: list[Projection]
    dropout: Dropout | None


class _Pending(NamedTuple):
    """The outputs of layers that the model has not called yet."""

    source: torch.Tensor
    """The input of the layers."""
    version: int | None
    """The version of ``source`` with which the outputs were computed. A change in place makes another version."""
    outputs: dict[int, torch.Tensor]


class SharedInput:
    """Linear layers that read the same tensor. The call of the first one computes all."""

    def __init__(self, members: Sequence[nn.Module], *, dropout: bool, joined: bool = False) -> None:
        """``members`` are in the order in which the model calls them. Without ``dropout``, layers with active dropout
        compute with their own code. For ``joined`` see `project`."""
        self._members = list(members)
        self._own = [member.forward for member in members]
        self._before = [vars(member).get("forward") for member in members]
        self._dropout, self._joined = dropout, joined
        self._pending: _Pending | None = None

    def install(self, parent: nn.Module) -> None:
        """Replace the forward functions of the members. ``parent`` is a module whose call contains those of all
        members. If the members are called without a call of ``parent``, with the same tensor, and their weights change
        between two of these calls, the later call returns the output for the old weights."""
        for number, member in enumerate(self._members):
            member.forward = partial(self._forward, number)
        if len(self._members) > 1:
            # Outputs that were computed and not called for would stay in memory, with all that autograd keeps for them.
            # There are such outputs where the code of ``parent`` raises, as recomputation does when it has all it
            # needs.
            parent.register_forward_hook(self._forget, always_call=True)

    def _forget(self, *_: Any) -> None:
        self._pending = None

    def _forward(self, number: int, *inputs: Any, **options: Any) -> torch.Tensor:
        if len(inputs) != 1 or options:
            result: torch.Tensor = self._own[number](*inputs, **options)
            return result
        (x,) = inputs
        pending = self._pending if self._is_pending(x) else None
        if pending is not None and number in pending.outputs and computes_gradients(self._members[number]):
            output = pending.outputs.pop(number)
            self._pending = pending if pending.outputs else None
            return output
        # The other layers are computed before they are called, and their hooks may set their weights.
        together = len(self._members) == 1 or all(map(has_no_hooks, self._members))
        ready = self.ready_for(x) if together else None
        if ready is None:
            return self._own[number](x)
        if len(self._members) == 1:
            return project(x, *ready)[0]
        if pending is not None:
            # The layer is called again with the same input.
            return project(x, [ready.layers[number]], _part_of(ready, number))[0]
        outputs = dict(enumerate(project(x, *ready, joined=self._joined)))
        output = outputs.pop(number)
        self._pending = _Pending(x, version_of(x), outputs)
        return output

    def _is_pending(self, x: torch.Tensor) -> bool:
        """Return whether outputs for ``x`` are computed already. ``x`` must be the same tensor with the same
        numbers."""
        pending = self._pending
        return pending is not None and pending.source is x and pending.version == version_of(x) is not None

    def stands_for(self, layer: nn.Module) -> bool:
        """Return whether ``layer`` is the only member and need not be called, because it has no hooks and still has the
        forward function that it had when this object was made."""
        return self._members == [layer] and vars(layer).get("forward") is self._before[0] and has_no_hooks(layer)

    def ready_for(self, x: torch.Tensor) -> Ready | None:
        """Return what `project` needs to compute all members for ``x``, None where their own code has to compute."""
        if not all(map(computes_gradients, self._members)) or not are_plain(x):
            return None
        layers: list[Projection] = []
        for member in self._members:
            layer = _projection(member)
            tensors = layer.tensors if layer is not None else ()
            if layer is None or not are_plain(*tensors) or any(y is not None and y.dtype != x.dtype for y in tensors):
                return None
            layers.append(layer)
        adapted = [member for member in self._members if isinstance(member, AdaptedLinear)]
        if not any(map(drops, adapted)):
            return Ready(layers, None)
        dropouts = [member.lora_dropout[ADAPTER] for member in adapted]
        first = dropouts[0]
        if not self._dropout or any(
            not isinstance(dropout, ExampleDropout)
            or not dropout.training
            or dropout.p != first.p
            or dropout.keys is not first.keys
            for dropout in dropouts
        ):
            return None
        keys = first.keys.value
        if keys is None or keys.shape != x.shape[:-1]:
            raise RuntimeError("dropout has no keys for these tokens")
        ranks = tuple(len(layer.a) for layer in layers if layer.a is not None)
        return Ready(layers, Dropout(keys.flatten(), first.p, tuple(dropout.salt for dropout in dropouts), ranks))


def _projection(layer: nn.Module) -> Projection | None:
    """Return the tensors of the linear layer ``layer``, None where its own code has to compute: where its adapter is
    merged, switched off or not plain any more, and where a call of a module in it would run more than the module's
    code."""
    if not isinstance(layer, AdaptedLinear):
        return Projection(layer.weight, layer.bias)
    if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER] or why_not(layer):
        return None
    base, a, b = layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    if not all(map(runs_only_its_code, (base, a, b, layer.lora_dropout[ADAPTER]))):
        return None
    return Projection(base.weight, base.bias, a.weight, b.weight, layer.scaling[ADAPTER])


def _part_of(ready: Ready, number: int) -> Dropout | None:
    """Return the dropout of the layer ``number`` alone."""
    if ready.dropout is None or ready.layers[number].a is None:
        return None
    place = sum(layer.a is not None for layer in ready.layers[:number])
    whole = ready.dropout
    return Dropout(whole.keys, whole.p, whole.salts[place : place + 1], whole.ranks[place : place + 1])
