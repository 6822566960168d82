"""Lets a transformers or peft model train with the kernels of this room. The engine calls `use_fused_kernels` once,
after adapters were added, and before `Objective` and DeepSpeed take the model.

The forward functions of single modules are replaced. In training they call the kernels; otherwise the module's own code
computes, so that scores and exports are bit for bit those of transformers and peft. What is not recognized stays as it
is, and the report says why.

Nothing in the product calls this module yet.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as AdaptedLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from finetune_trainer.kernels import recognition
from finetune_trainer.kernels.dropped_product import Dropout
from finetune_trainer.kernels.gated_product import Activation, gated_product
from finetune_trainer.kernels.projections import Projection, project, project_gated
from finetune_trainer.kernels.rms_norm import Form, rms_norm
from finetune_trainer.kernels.rotary import rotate_queries_and_keys
from finetune_trainer.kernels.shared_inputs import find_shared_inputs
from finetune_trainer.loss.dropout import ExampleDropout

ADAPTER = "default"
"""The name of the adapter that is trained, in peft."""


class KernelPart(StrEnum):
    """The parts of a model that can be left plain."""

    NORMS = "Norms"
    """Root mean square norms."""
    ROTARY = "Rotary"
    """Rotary position embeddings."""
    GATED_PRODUCTS = "GatedProducts"
    """The product of activation and up in a feed-forward layer."""
    PROJECTIONS = "Projections"
    """Linear layers with an adapter, and those that read the same tensor."""
    GATED_PROJECTIONS = "GatedProjections"
    """The last linear layer of a gated feed-forward layer, without its input in memory. It is plain too where
    GATED_PRODUCTS is."""
    DROPOUT = "Dropout"
    """LoRA's dropout inside of the products with the matrices A."""


NOT_UNDER_ZERO_3 = frozenset({KernelPart.PROJECTIONS, KernelPart.GATED_PROJECTIONS, KernelPart.DROPOUT})
"""The parts that read weights of modules without calling the modules. ZeRO-3 gathers the weights of a module only when
the module is called."""


@dataclass(frozen=True)
class LeftPlain:
    """Modules that look like a part that has a kernel, and that compute with their own code."""

    part: KernelPart
    module: str
    """Their class, for example `Gemma3nTextMLP`."""
    reason: str
    """In the words that follow "because"."""
    count: int = 1


@dataclass(frozen=True)
class KernelReport:
    """What `use_fused_kernels` did to a model."""

    replaced: dict[KernelPart, int] = field(default_factory=dict)
    """Number of modules that train with a kernel, by part. `DROPOUT` counts the adapters."""
    left: tuple[LeftPlain, ...] = ()
    """What was left plain."""


def use_fused_kernels(model: nn.Module, *, plain: Collection[KernelPart] = ()) -> KernelReport:
    """Let ``model`` train with fused kernels, except for the parts ``plain``, and report what was replaced.

    Under ZeRO-3, ``plain`` must contain NOT_UNDER_ZERO_3. The function computes two tokens with the model, so that the
    model must be able to compute, unless `KernelPart.PROJECTIONS` is plain.
    """
    return _Installation(model, frozenset(plain)).run()


class _Installation:
    """One call of `use_fused_kernels`."""

    def __init__(self, model: nn.Module, plain: frozenset[KernelPart]) -> None:
        self._model = model
        self._plain = plain
        self._replaced: Counter[KernelPart] = Counter()
        self._left: Counter[tuple[KernelPart, str, str]] = Counter()
        self._known: dict[Any, Any] = {}
        """What was recognized, by class and settings, so that equal modules are tried once."""

    def run(self) -> KernelReport:
        for module in self._modules(KernelPart.NORMS):
            self._replace_norm(module)
        for module in self._modules(KernelPart.ROTARY):
            self._replace_rotation(module)
        # The groups are found before forward functions of feed-forward layers are replaced, which call their layers.
        self._replace_projections()
        for module in self._modules(KernelPart.GATED_PRODUCTS):
            self._replace_gated(module)
        left = tuple(LeftPlain(*key, count) for key, count in self._left.items())
        return KernelReport(dict(self._replaced), left)

    def _modules(self, part: KernelPart) -> Iterator[nn.Module]:
        """Yield the modules of the model whose forward function nobody has replaced, if ``part`` is wanted."""
        if part not in self._plain:
            yield from [module for module in self._model.modules() if "forward" not in vars(module)]

    def _leave(self, part: KernelPart, module: nn.Module, reason: str) -> None:
        self._left[part, type(module).__name__, reason] += 1

    def _once(self, key: Any, find: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]

    def _replace_norm(self, module: nn.Module) -> None:
        if not recognition.may_be_norm(module):
            return
        epsilon = recognition.epsilon_of(module)
        sizes = tuple(recognition.shape_of(parameter) for parameter in module.parameters())
        form = self._once((type(module), epsilon, sizes), lambda: recognition.norm_form(module))
        if form is None or epsilon is None:
            self._leave(KernelPart.NORMS, module, "it computes another formula, or has several inputs")
            return
        module.forward = partial(_norm, module, module.forward, epsilon, form)
        self._replaced[KernelPart.NORMS] += 1

    def _replace_rotation(self, module: nn.Module) -> None:
        rotate = recognition.rotation_of(module)
        if rotate is None:
            return
        if not self._once(rotate, lambda: recognition.turns_halves(rotate)):
            self._leave(KernelPart.ROTARY, module, "it turns other pairs of features, or each tensor by itself")
            return
        code = type(module).forward
        # A copy of the function with another rotation, so that other models with the same code stay as they are.
        names = {**code.__globals__, recognition.ROTATION: partial(_rotate, module, rotate)}
        own = types.FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
        own.__kwdefaults__ = code.__kwdefaults__
        module.forward = types.MethodType(own, module)
        self._replaced[KernelPart.ROTARY] += 1

    def _replace_projections(self) -> None:
        if KernelPart.PROJECTIONS in self._plain:
            return
        self._count_unfit_adapters()
        layers = [layer for layer in _linear_layers(self._model) if _why_not(layer) == ""]
        head = _head(self._model)
        groups = find_shared_inputs(self._model, [layer for layer in layers if layer is not head])
        in_groups = {layer for group in groups for layer in group}
        alone = [[layer] for layer in layers if layer not in in_groups and isinstance(layer, AdaptedLinear)]
        for group in [*groups, *alone]:
            SharedInput(group, dropout=KernelPart.DROPOUT not in self._plain).install()
            self._replaced[KernelPart.PROJECTIONS] += len(group)
            dropped = sum(_drops(layer) for layer in group)
            if dropped and KernelPart.DROPOUT not in self._plain:
                self._replaced[KernelPart.DROPOUT] += dropped

    def _count_unfit_adapters(self) -> None:
        for layer in _linear_layers(self._model):
            reason = _why_not(layer)
            if reason and isinstance(layer, AdaptedLinear):
                self._leave(KernelPart.PROJECTIONS, layer, reason)

    def _replace_gated(self, module: nn.Module) -> None:
        names = recognition.gate_layers(module)
        if not names:
            return
        activation = self._once(_settings(module), lambda: recognition.gate_activation(module))
        if activation is None:
            self._leave(KernelPart.GATED_PRODUCTS, module, "it computes another formula")
            return
        down = getattr(module, names[-1])
        last = None
        if KernelPart.GATED_PROJECTIONS not in self._plain:
            reason = _why_not(down, replaced=True)
            if not reason and (type(down) is nn.Linear or isinstance(down, AdaptedLinear)):
                last = SharedInput([down], dropout=KernelPart.DROPOUT not in self._plain)
                self._replaced[KernelPart.GATED_PROJECTIONS] += 1
            else:
                self._leave(KernelPart.GATED_PROJECTIONS, down, reason or "it is no plain linear layer")
        module.forward = partial(_gated, module, module.forward, names, activation, last)
        self._replaced[KernelPart.GATED_PRODUCTS] += 1


def _settings(module: nn.Module) -> Any:
    """Return what the formula of the gated layer ``module`` may depend on: its class, the class and the settings of its
    activation, and numbers that it holds."""
    numbers = tuple((name, value) for name, value in vars(module).items() if isinstance(value, bool | int | float))
    inner = tuple((name, type(child), repr(vars(child).get("act"))) for name, child in module.named_children())
    return type(module), numbers, inner


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    """Return the linear layers of ``model`` with their adapters, without the layers inside of adapters."""
    found: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for module in model.modules():
        if module in inner or not isinstance(module, nn.Linear | LoraLayer):
            continue
        # peft adapts some weights by wrapping their layer, and changes the weights while the layer computes.
        if isinstance(module, nn.Linear | AdaptedLinear):
            found.append(module)
        inner.update(module.modules())
    return found


def _head(model: Any) -> nn.Module | None:
    """Return the output head of ``model``, whose input the loss chooses."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head: nn.Module | None = inner.get_output_embeddings()
    return head


def _why_not(layer: nn.Module, *, replaced: bool = False) -> str:
    """Return why the linear layer ``layer`` can't be computed by `project`, or an empty text if it can. ``replaced``
    allows that its forward function was replaced."""
    if "forward" in vars(layer) and not replaced:
        return "its forward function was replaced before"
    if not isinstance(layer, AdaptedLinear):
        return "" if type(layer) is nn.Linear else "it is no plain linear layer"
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return "its base is no plain linear layer"
    if list(layer.lora_A) != [ADAPTER] or layer.lora_B[ADAPTER].bias is not None or layer.fan_in_fan_out:
        return "it has no adapter, several adapters, or an adapter with a bias"
    return "its adapter is a variant of LoRA such as DoRA" if layer.lora_variant else ""


def _drops(layer: nn.Module) -> bool:
    """Return whether ``layer`` has an adapter with dropout."""
    return isinstance(layer, AdaptedLinear) and getattr(layer.lora_dropout[ADAPTER], "p", 0) > 0


def _computes_gradients(module: nn.Module) -> bool:
    return module.training and bool(torch.is_grad_enabled())


def _norm(module: nn.Module, own: Any, epsilon: float, form: Form, x: torch.Tensor, **options: Any) -> torch.Tensor:
    """The forward function of a norm; ``own`` is that of its class."""
    weight = getattr(module, "weight", None) if form is not Form.BARE else None
    if options or not _computes_gradients(module) or (weight is not None and weight.dtype != x.dtype):
        result: torch.Tensor = own(x, **options)
        return result
    return rms_norm(x, weight, epsilon, form)


def _rotate(module: nn.Module, own: Any, query: torch.Tensor, key: torch.Tensor, *angles: Any, **options: Any) -> Any:
    """Take the place of ``own``, the function that turns queries and keys in the code of ``module``."""
    if options.get("unsqueeze_dim") == 1:
        options = {name: value for name, value in options.items() if name != "unsqueeze_dim"}
    angles = (*angles, *(options.pop(name) for name in ("cos", "sin") if name in options))
    fits = (
        len(angles) == 2
        and not options
        and query.ndim == 4
        and all(tensor.ndim == 3 and tensor.dtype == query.dtype for tensor in angles)
        and key.dtype == query.dtype
        and angles[0].shape[-1] <= query.shape[-1]
    )
    if not fits or not _computes_gradients(module):
        return own(query, key, *angles, **options)
    cosine, sine = (tensor.unsqueeze(1) for tensor in angles)
    return rotate_queries_and_keys(query, key, cosine, sine)


def _gated(
    module: nn.Module,
    own: Any,
    names: tuple[str, ...],
    activation: Activation,
    last: SharedInput | None,
    x: torch.Tensor,
) -> torch.Tensor:
    """The forward function of a gated feed-forward layer; ``own`` is that of its class."""
    if not _computes_gradients(module):
        result: torch.Tensor = own(x)
        return result
    if names == recognition.JOINT:
        gate, up = getattr(module, names[0])(x).chunk(2, dim=-1)
    else:
        gate, up = getattr(module, names[0])(x), getattr(module, names[1])(x)
    ready = last.ready_for(gate) if last is not None and gate.dtype == up.dtype else None
    if ready is None:
        output: torch.Tensor = getattr(module, names[-1])(gated_product(gate, up, activation))
        return output
    return project_gated(gate, up, activation, ready.layers[0], ready.dropout)


class _Ready(NamedTuple):
    """What `project` needs for a group of layers."""

    layers: list[Projection]
    dropout: Dropout | None


class SharedInput:
    """Linear layers that read the same tensor. The call of the first one computes all."""

    def __init__(self, members: Sequence[nn.Module], *, dropout: bool) -> None:
        """``members`` are in the order in which the model calls them. Without ``dropout``, layers with active dropout
        compute with their own code."""
        self._members = list(members)
        self._own = [member.forward for member in members]
        self._dropout = dropout
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def install(self) -> None:
        """Replace the forward functions of the members."""
        for number, member in enumerate(self._members):
            member.forward = partial(self._forward, number)

    def _forward(self, number: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x is self._input and number in self._outputs:
            output = self._outputs.pop(number)
            if not self._outputs:
                self._input = None
            return output
        ready = None if args or kwargs else self.ready_for(x)
        if ready is None:
            result: torch.Tensor = self._own[number](x, *args, **kwargs)
            return result
        if number or len(self._members) == 1:
            alone = _Ready([ready.layers[number]], _part_of(ready, number))
            return project(x, *alone)[0]
        first, *others = project(x, *ready, joined=True)
        self._outputs = dict(enumerate(others, start=1))
        self._input = x
        return first

    def ready_for(self, x: torch.Tensor) -> _Ready | None:
        """Return what `project` needs to compute all members for ``x``, None where their own code has to compute."""
        layers = [_projection(member) for member in self._members]
        tensors = [tensor for layer in layers if layer is not None for tensor in (layer.weight, layer.a, layer.b)]
        if (
            any(layer is None for layer in layers)
            or not all(map(_computes_gradients, self._members))
            or any(tensor is not None and tensor.dtype != x.dtype for tensor in tensors)
        ):
            return None
        adapted = [member for member in self._members if isinstance(member, AdaptedLinear)]
        found = [layer for layer in layers if layer is not None]
        drops = [_drops(member) for member in adapted]
        if not any(drops):
            return _Ready(found, None)
        dropouts = [member.lora_dropout[ADAPTER] for member in adapted]
        first = dropouts[0]
        if not self._dropout or any(
            not isinstance(dropout, ExampleDropout) or dropout.p != first.p or dropout.keys is not first.keys
            for dropout in dropouts
        ):
            return None
        keys = first.keys.value
        if keys is None or keys.shape != x.shape[:-1]:
            raise RuntimeError("dropout has no keys for these tokens")
        ranks = tuple(len(layer.a) for layer in found if layer.a is not None)
        return _Ready(found, Dropout(keys.flatten(), first.p, tuple(dropout.salt for dropout in dropouts), ranks))


def _projection(layer: nn.Module) -> Projection | None:
    """Return the tensors of the linear layer ``layer``, None where its adapter is merged or switched off."""
    if not isinstance(layer, AdaptedLinear):
        return Projection(layer.weight, layer.bias)
    if layer.disable_adapters or layer.merged:
        return None
    base, a, b = layer.base_layer, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return Projection(base.weight, base.bias, a, b, layer.scaling[ADAPTER])


def _part_of(ready: _Ready, number: int) -> Dropout | None:
    """Return the dropout of the layer ``number`` alone."""
    if ready.dropout is None or ready.layers[number].a is None:
        return None
    place = sum(layer.a is not None for layer in ready.layers[:number])
    whole = ready.dropout
    return Dropout(whole.keys, whole.p, whole.salts[place : place + 1], whole.ranks[place : place + 1])
