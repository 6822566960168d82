"""Finds out which formula the code of a module computes, by trying the code on a few numbers.

`install.py` replaces only what is recognized here. Nearly all families of transformers have classes of their own with
the same few formulas, and new versions add classes. A table of classes would leave out new ones, and would replace code
that changed. So a module is recognized by what it computes: a copy of the module with small random weights is called,
and its results are compared with the plain form of each kernel. A copy is used, because ZeRO-3 may hold the weights of
the module elsewhere, and the model may be on the meta device.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from finetune_trainer.kernels.gated_product import Activation, activate
from finetune_trainer.kernels.rms_norm import Form, plain_rms_norm
from finetune_trainer.kernels.rotary import plain_rotation

EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""Names under which norms keep the number that they add to the mean of the squares."""
ROTATION = "apply_rotary_pos_emb"
"""The name of the function that turns queries and keys, in the module of each model's code."""
JOINT, SEPARATE = ("gate_up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj")
"""Names of the layers in a gated feed-forward layer, where gate and up are one linear layer and where they are two."""


def epsilon_of(module: nn.Module) -> float | None:
    """Return the number that the norm ``module`` adds to the mean of the squares, None where ``module`` has none."""
    found = [value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)]
    return found[0] if found else None


def may_be_norm(module: nn.Module) -> bool:
    """Return whether ``module`` is a norm with at most a weight for each feature."""
    parameters = dict(module.named_parameters())
    return (
        epsilon_of(module) is not None
        and "norm" in type(module).__name__.lower()
        and not list(module.children())
        and set(parameters) <= {"weight"}
        and all(len(shape_of(parameter)) == 1 for parameter in parameters.values())
    )


def norm_form(module: nn.Module) -> Form | None:
    """Return which form of root mean square normalization the norm ``module`` computes, None where it computes
    another formula or has several inputs."""
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    weight = next(module.parameters(), None)
    features = shape_of(weight)[0] if weight is not None else 24
    generator = _generator()
    # The rows have different sizes, so that a form with another epsilon is not taken for the same.
    x = torch.randn((4, features), generator=generator) * torch.tensor([[1.0], [30.0], [0.01], [0.001]])
    values = torch.randn(features, generator=generator)
    copied = _with(module, parameters={"weight": nn.Parameter(values)} if weight is not None else {})
    epsilon = epsilon_of(module)
    for form in (Form.BARE,) if weight is None else (Form.SCALED, Form.CENTERED):
        wanted = plain_rms_norm(x, values if weight is not None else None, epsilon or 0.0, form)
        if _computes(copied, [x], wanted):
            return form
    return None


def gate_layers(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers of ``module`` if it may be a gated feed-forward layer, else an empty tuple."""
    children = {name for name, _ in module.named_children()}
    return next((names for names in (SEPARATE, JOINT) if children >= set(names)), ())


def gate_activation(module: nn.Module) -> Activation | None:
    """Return the activation with which ``module`` computes down(activation(gate(x)) * up(x)), None where it computes
    another formula."""
    generator = _generator()
    names = gate_layers(module)

    def small(inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs, bias=False, device="cpu", dtype=torch.float32)
        layer.weight.data = torch.randn((outputs, inputs), generator=generator)
        return layer.requires_grad_(False)

    # Some rows are large, so that a formula with a limit is not taken for one without.
    x = torch.randn((5, 6), generator=generator) * torch.tensor([[0.1], [1.0], [1.0], [20.0], [300.0]])
    both, down = small(6, 16), small(8, 6)
    gate, up = both(x).chunk(2, dim=-1)
    if names == JOINT:
        layers = {"gate_up_proj": both, "down_proj": down}
    else:
        layers = {"gate_proj": small(6, 8), "up_proj": small(6, 8), "down_proj": down}
        gate, up = layers["gate_proj"](x), layers["up_proj"](x)
    copied = _with(module, modules=layers)
    for activation in Activation:
        if _computes(copied, [x], down(activate(gate, activation) * up)):
            return activation
    return None


def rotation_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that turns queries and keys in the code of ``module``, None where the code calls none."""
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is None or ROTATION not in code.co_names:
        return None
    found: Callable[..., Any] | None = forward.__globals__.get(ROTATION)
    return found


def turns_halves(rotate: Callable[..., Any]) -> bool:
    """Return whether ``rotate`` (query, key, cosine, sine) computes what `rotary.rotate_queries_and_keys` computes."""
    generator = _generator()
    query, key = torch.randn((2, 3, 5, 8), generator=generator), torch.randn((2, 1, 5, 8), generator=generator)
    right = []
    for size in (8, 4):
        cosine, sine = (torch.randn((2, 5, size), generator=generator) for _ in range(2))
        wanted = [plain_rotation(x, cosine.unsqueeze(1), sine.unsqueeze(1)) for x in (query, key)]
        try:
            found = rotate(query, key, cosine, sine)
        except (TypeError, RuntimeError, ValueError, LookupError):
            # Many functions turn all features, and can't compute with cosines of fewer features.
            continue
        both = isinstance(found, tuple) and len(found) == 2
        right.append(both and all(_near(x, y) for x, y in zip(found, wanted, strict=True)))
    return bool(right) and all(right)


def _computes(module: nn.Module, inputs: list[torch.Tensor], wanted: torch.Tensor) -> bool:
    """Return whether the code of ``module`` returns ``wanted``."""
    with torch.no_grad():
        try:
            found = type(module).forward(module, *inputs)
        except (TypeError, RuntimeError, ValueError, AttributeError, LookupError):
            # The code expects something else than a module with this formula does.
            return False
    return _near(found, wanted)


def _near(found: Any, wanted: torch.Tensor) -> bool:
    """Return whether ``found`` is ``wanted`` up to the rounding of fp32."""
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    # Each row has its own size, so each row is compared relative to its own largest number.
    return bool(((found - wanted).abs() <= 1e-5 * wanted.abs().amax(-1, keepdim=True)).all())


def _with(
    module: nn.Module,
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """Return a copy of ``module`` with other ``parameters`` or inner ``modules``, and without hooks."""
    copied: nn.Module = copy.copy(module)
    copied.__dict__["_parameters"] = {**module._parameters, **(parameters or {})}
    copied.__dict__["_modules"] = {**module._modules, **(modules or {})}
    return copied


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of ``parameter`` before ZeRO-3 sharded it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)
