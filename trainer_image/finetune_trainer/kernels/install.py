"""Lets a transformers or peft model train with the kernels of this room. The engine calls `use_fused_kernels` once,
after adapters were added, and before `Objective` and DeepSpeed take the model.

The forward functions of single modules are replaced. In training they call the kernels; otherwise the module's own code
computes, so that scores and exports are bit for bit those of transformers and peft. What looks like one of the parts
and is not recognized stays as it is, and the report says why.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from peft.tuners.lora import Linear as AdaptedLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from finetune_trainer.kernels import recognition
from finetune_trainer.kernels.calls import are_plain, computes_gradients, runs_only_its_code
from finetune_trainer.kernels.gated_product import Activation, gated_product, plain_gated_product
from finetune_trainer.kernels.parts import KernelPart
from finetune_trainer.kernels.projections import project_gated
from finetune_trainer.kernels.recognition import Misfit
from finetune_trainer.kernels.rms_norm import Form, rms_norm
from finetune_trainer.kernels.rotary import rotate_queries_and_keys
from finetune_trainer.kernels.shared_inputs import TrialError, find_shared_inputs
from finetune_trainer.kernels.shared_projections import SharedInput, drops, why_not

REPLACED = "its forward function was replaced before"


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
    """Number of modules that train with a kernel, by part. `DROPOUT` counts the adapters with dropout among
    `PROJECTIONS`."""
    left: tuple[LeftPlain, ...] = ()
    """What was left plain."""

    @property
    def description(self) -> str:
        """What trains with a kernel and what does not, as a line for the log."""
        replaced = ", ".join(f"{count} {part}" for part, count in self.replaced.items()) or "none"
        left = "; ".join(f"{found.part} of {found.count} {found.module} ({found.reason})" for found in self.left)
        return f"fused kernels: {replaced}" + (f"; plain: {left}" if left else "")


def use_fused_kernels(model: nn.Module, *, plain: Collection[KernelPart] = ()) -> KernelReport:
    """Let ``model`` train with fused kernels, except for the parts ``plain``, and report what was replaced.

    Under ZeRO-3, ``plain`` must contain NOT_UNDER_ZERO_3 of `parts.py`. The function computes two tokens with the
    model, so that the model must have its weights, unless `KernelPart.PROJECTIONS` is plain. torch's random streams
    stay where they are.
    """
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        return _Installation(model, frozenset(plain)).run()


class _Installation:
    """One call of `use_fused_kernels`."""

    def __init__(self, model: nn.Module, plain: frozenset[KernelPart]) -> None:
        self._model = model
        self._plain = plain
        self._replaced: Counter[KernelPart] = Counter()
        self._left: Counter[tuple[KernelPart, str, str]] = Counter()
        self._rotations: dict[Callable[..., Any], Misfit | None] = {}
        """Why each function that turns queries and keys can't be replaced."""
        self._rotating: set[nn.Module] = set()
        """The attention layers whose queries and keys the kernel turns."""
        self._projected: set[nn.Module] = set()
        """The linear layers whose forward function this object replaced."""
        self._names = {module: name for name, module in model.named_modules()}

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

    def _replace_norm(self, module: nn.Module) -> None:
        if not recognition.may_be_norm(module):
            return
        epsilon, form = recognition.epsilon_of(module), recognition.norm_form(module)
        if isinstance(form, Misfit) or epsilon is None:
            self._leave(KernelPart.NORMS, module, str(form))
            return
        module.forward = partial(_norm, module, module.forward, epsilon, form)
        self._replaced[KernelPart.NORMS] += 1

    def _replace_rotation(self, module: nn.Module) -> None:
        rotate = recognition.rotation_of(module)
        if rotate is None:
            return
        if rotate not in self._rotations:
            self._rotations[rotate] = recognition.why_not_turned(rotate)
        misfit = self._rotations[rotate]
        if misfit is not None:
            self._leave(KernelPart.ROTARY, module, str(misfit))
            return
        code = type(module).forward
        # A copy of the function with another rotation, so that other models with the same code stay as they are.
        names = {**code.__globals__, recognition.ROTATION: partial(_rotate, rotate)}
        fused = types.FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
        fused.__kwdefaults__ = code.__kwdefaults__
        module.forward = partial(_turning, module, module.forward, types.MethodType(fused, module))
        self._rotating.add(module)
        self._replaced[KernelPart.ROTARY] += 1

    def _replace_projections(self) -> None:
        if KernelPart.PROJECTIONS in self._plain:
            return
        layers = []
        for layer in _linear_layers(self._model):
            reason = REPLACED if "forward" in vars(layer) else why_not(layer)
            if not reason:
                layers.append(layer)
            elif isinstance(layer, AdaptedLinear):
                self._leave(KernelPart.PROJECTIONS, layer, reason)
        groups = self._find_groups(layers)
        in_groups = {layer for group in groups for layer in group}
        alone = [[layer] for layer in layers if layer not in in_groups and isinstance(layer, AdaptedLinear)]
        for group in [*groups, *alone]:
            parent = self._parent_of(group)
            # The code of the kernel's rotation takes queries and keys that lie side by side. Other code may need each
            # output in one piece, as `view` does.
            joined = parent in self._rotating
            SharedInput(group, dropout=KernelPart.DROPOUT not in self._plain, joined=joined).install(parent)
            self._projected.update(group)
            self._replaced[KernelPart.PROJECTIONS] += len(group)
            dropped = sum(drops(layer) for layer in group)
            if dropped and KernelPart.DROPOUT not in self._plain:
                self._replaced[KernelPart.DROPOUT] += dropped

    def _find_groups(self, layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
        """Return the groups of ``layers`` that read the same tensor. Where the model can't compute a trial, each layer
        is computed by itself."""
        model = _without_adapters(self._model)
        head = model.get_output_embeddings()
        try:
            return find_shared_inputs(self._model, [layer for layer in layers if layer is not head])
        except TrialError as error:
            self._leave(KernelPart.PROJECTIONS, model, f"its layers can't be grouped: two tokens raise {error}")
            return []

    def _parent_of(self, group: Sequence[nn.Module]) -> nn.Module:
        """Return the innermost module that contains all of ``group``."""
        paths = [self._names[layer].split(".")[:-1] for layer in group]
        common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]
        parent: nn.Module = self._model.get_submodule(".".join(common))
        return parent

    def _replace_gated(self, module: nn.Module) -> None:
        names = recognition.gate_layers(module)
        if not names:
            return
        activation = recognition.gate_activation(module)
        if isinstance(activation, Misfit):
            self._leave(KernelPart.GATED_PRODUCTS, module, str(activation))
            return
        last = self._last_layer(getattr(module, names[-1]))
        module.forward = partial(_gated, module, module.forward, names, activation, last)
        self._replaced[KernelPart.GATED_PRODUCTS] += 1

    def _last_layer(self, down: nn.Module) -> SharedInput | None:
        """Return ``down``, the last layer of a gated layer, for `_gated`, or None where ``down`` has to be called."""
        if KernelPart.GATED_PROJECTIONS in self._plain:
            return None
        reason = why_not(down)
        if "forward" in vars(down) and down not in self._projected:
            reason = REPLACED
        if reason:
            self._leave(KernelPart.GATED_PROJECTIONS, down, reason)
            return None
        self._replaced[KernelPart.GATED_PROJECTIONS] += 1
        return SharedInput([down], dropout=KernelPart.DROPOUT not in self._plain)


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


def _without_adapters(model: Any) -> Any:
    """Return the transformers model in ``model``, which may be a peft model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _norm(module: nn.Module, own: Any, epsilon: float, form: Form, *inputs: Any, **options: Any) -> torch.Tensor:
    """The forward function of a norm; ``own`` is that of its class."""
    weight = getattr(module, "weight", None) if form is not Form.BARE else None
    x = inputs[0] if len(inputs) == 1 and not options and computes_gradients(module) else None
    other = weight is not None and x is not None and (weight.dtype != x.dtype or weight.shape != x.shape[-1:])
    if x is None or other or not are_plain(x, weight):
        result: torch.Tensor = own(*inputs, **options)
        return result
    return rms_norm(x, weight, epsilon, form)


def _turning(module: nn.Module, own: Any, fused: Any, *inputs: Any, **options: Any) -> Any:
    """The forward function of an attention layer; ``own`` is that of its class, and ``fused`` calls `_rotate`."""
    return (fused if computes_gradients(module) else own)(*inputs, **options)


def _rotate(own: Any, *inputs: Any, **options: Any) -> Any:
    """Take the place of ``own``, the function that turns queries and keys in the code of a model."""
    others = {name: value for name, value in options.items() if not (name == "unsqueeze_dim" and value == 1)}
    tensors = [*inputs, *(others.pop(name) for name in ("cos", "sin") if name in others)]
    if others or len(inputs) < 2 or len(tensors) != 4 or not _can_turn(*tensors):
        return own(*inputs, **options)
    query, key, cosine, sine = tensors
    return rotate_queries_and_keys(query, key, cosine.unsqueeze(1), sine.unsqueeze(1))


def _can_turn(query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> bool:
    """Return whether the tensors have the shapes and the type that the kernel knows. It gives no gradients of
    angles."""
    angles = (cosine, sine)
    return (
        are_plain(query, key, *angles)
        and query.ndim == key.ndim == 4
        and query.dtype == key.dtype
        and all(x.ndim == 3 and x.dtype == query.dtype and not x.requires_grad for x in angles)
        and cosine.shape[-1] <= query.shape[-1]
    )


def _gated(
    module: nn.Module,
    own: Any,
    names: tuple[str, ...],
    activation: Activation,
    last: SharedInput | None,
    *inputs: Any,
    **options: Any,
) -> torch.Tensor:
    """The forward function of a gated feed-forward layer; ``own`` is that of its class."""
    others = [child for name, child in module.named_children() if name not in names]
    simple = len(inputs) == 1 and not options and computes_gradients(module)
    # The kernel does not call the activation, so nothing else may depend on the call.
    if not simple or not all(runs_only_its_code(inner) for child in others for inner in child.modules()):
        result: torch.Tensor = own(*inputs, **options)
        return result
    (x,) = inputs
    if names == recognition.JOINT:
        gate, up = getattr(module, names[0])(x).chunk(2, dim=-1)
    else:
        gate, up = getattr(module, names[0])(x), getattr(module, names[1])(x)
    down = getattr(module, names[-1])
    output: torch.Tensor
    if gate.dtype != up.dtype or not are_plain(gate, up):
        output = down(plain_gated_product(gate, up, activation))
        return output
    ready = last.ready_for(gate) if last is not None and last.stands_for(down) else None
    if ready is None:
        output = down(gated_product(gate, up, activation))
        return output
    return project_gated(gate, up, activation, ready.layers[0], ready.dropout)
