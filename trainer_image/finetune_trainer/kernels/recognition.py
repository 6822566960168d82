"""Finds out which formula the code of a module computes, by trying the code on a few numbers.

`install.py` replaces only what is recognized here. Nearly all families of transformers have classes of their own with
the same few formulas, and new versions add classes. A table of classes would leave out new ones, and would replace code
that changed. So a module is recognized by what it computes: a copy of the module with small random weights is called in
training mode, and its results are compared with the plain form of each kernel (`trials.py`). A copy is used, because
ZeRO-3 may hold the weights of the module elsewhere, and the model may be on the meta device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from finetune_trainer.kernels import trials
from finetune_trainer.kernels.gated_product import Activation, activate, gated_product, plain_gated_product
from finetune_trainer.kernels.rms_norm import Form, plain_rms_norm, rms_norm
from finetune_trainer.kernels.rotary import plain_rotations, rotate_queries_and_keys

EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""Names under which norms keep the number that they add to the mean of the squares."""
ROTATION = "apply_rotary_pos_emb"
"""The name of the function that turns queries and keys, in the module of each model's code."""
NUMBERS = 1 << 13
"""Number of features of all tokens in the trial of a norm, or a little more where one token has more."""
JOINT, SEPARATE = ("gate_up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj")
"""Names of the layers in a gated feed-forward layer, where gate and up are one linear layer and where they are two."""


class Misfit(StrEnum):
    """Why a module keeps its own code, in the words that follow "because"."""

    FORMULA = "it computes another formula, or has other inputs"
    ROUNDING = "it rounds less often in bf16 than the kernel, or does not compute in bf16"


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


def norm_form(module: nn.Module) -> Form | Misfit:
    """Return which form of root mean square normalization the norm ``module`` computes."""
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return Misfit.FORMULA
    weight = next(module.parameters(), None)
    features = shape_of(weight)[0] if weight is not None else 24
    generator = trials.seeded()
    # The rows have different sizes, so that a form with another epsilon is not taken for the same. There are enough
    # numbers for the mean of the rounding errors to be the same in each trial.
    sizes = torch.tensor([[1.0], [30.0], [0.01], [0.001]]).repeat(max(1, NUMBERS // (4 * features)), 1)
    inputs = [torch.randn((len(sizes), features), generator=generator) * sizes]
    if weight is not None:
        inputs.append(torch.randn(features, generator=generator))
    epsilon = epsilon_of(module) or 0.0

    def code(x: torch.Tensor, *weights: torch.Tensor) -> Any:
        parameters = dict(zip(("weight",), weights, strict=False))
        return type(module).forward(trials.in_training(module, parameters=parameters), x)

    for form in (Form.BARE,) if weight is None else (Form.SCALED, Form.CENTERED):
        formula, kernel = (_norm_of(function, epsilon, form) for function in (plain_rms_norm, rms_norm))
        if trials.computes(code, inputs, [formula(*inputs)]):
            return form if trials.rounds_no_more(kernel, code, formula, inputs) else Misfit.ROUNDING
    return Misfit.FORMULA


def _norm_of(function: Callable[..., torch.Tensor], epsilon: float, form: Form) -> Callable[..., torch.Tensor]:
    """Return ``function``, `rms_norm` or its formula, as a function of the input and the weight, if there is one."""
    return lambda x, weight=None: function(x, weight, epsilon, form)


def gate_layers(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers of ``module`` if it may be a gated feed-forward layer, else an empty tuple."""
    children = {name for name, _ in module.named_children()}
    return next((names for names in (SEPARATE, JOINT) if children >= set(names)), ())


def gate_activation(module: nn.Module) -> Activation | Misfit:
    """Return the activation with which ``module`` computes down(activation(gate(x)) * up(x))."""
    names, generator = gate_layers(module), trials.seeded()
    gate, up, down = (torch.randn((8, 8), generator=generator) for _ in range(3))
    # Some rows are large, so that a formula with a limit is not taken for one without.
    x = torch.randn((5, 8), generator=generator) * torch.tensor([[0.1], [1.0], [1.0], [20.0], [300.0]])
    code = _gated_code(module, names, gate, up, down)
    for activation in Activation:
        wanted = functional.linear(activate(x @ gate.T, activation) * (x @ up.T), down)
        if trials.computes(code, [x], [wanted]):
            break
    else:
        return Misfit.FORMULA
    # Layers that only move features round nothing, so that the rounding of the product alone is compared.
    features = torch.eye(16)
    code = _gated_code(module, names, features, features.flip(0), features)
    formula, kernel = (_gated_of(function, activation) for function in (plain_gated_product, gated_product))
    x = torch.randn((64, 16), generator=generator) * 3
    return activation if trials.rounds_no_more(kernel, code, formula, [x]) else Misfit.ROUNDING


def _gated_code(
    module: nn.Module, names: tuple[str, ...], gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> Callable[[torch.Tensor], Any]:
    """Return the code of ``module`` as a function of its input, with other weights for its layers."""
    weights = [torch.cat((gate, up)), down] if names == JOINT else [gate, up, down]

    def code(x: torch.Tensor) -> Any:
        layers = {name: _linear(weight.to(x.dtype)) for name, weight in zip(names, weights, strict=True)}
        return type(module).forward(trials.in_training(module, modules=layers), x)

    return code


def _linear(weight: torch.Tensor) -> nn.Linear:
    """Return a linear layer with ``weight``. No number is drawn for it, which torch's own weights would need."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _gated_of(function: Callable[..., torch.Tensor], activation: Activation) -> Callable[..., torch.Tensor]:
    """Return ``function``, `gated_product` or its formula, for a gate that is the input, and the input backwards."""
    return lambda x: function(x, x.flip(-1), activation)


def rotation_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that turns queries and keys in the code of ``module``, None where the code calls none."""
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is None or ROTATION not in code.co_names:
        return None
    found: Callable[..., Any] | None = forward.__globals__.get(ROTATION)
    return found


def why_not_turned(rotate: Callable[..., Any]) -> Misfit | None:
    """Return why ``rotate`` (query, key, cosine, sine) can't be replaced by `rotate_queries_and_keys`, None if it
    can."""
    generator = trials.seeded()
    states = [torch.randn((2, heads, 32, 8), generator=generator) for heads in (3, 1)]
    fitting = []
    for size in (8, 4):
        angles = [torch.randn((2, 32, size), generator=generator).bfloat16().float() for _ in range(2)]
        code = _rotation_by(rotate, angles)
        # Many functions turn all features, and can't compute with cosines of fewer features.
        if not trials.runs(code, states):
            continue
        formula = _rotation_by(plain_rotations, [tensor.unsqueeze(1) for tensor in angles])
        if not trials.computes(code, states, formula(*states)):
            return Misfit.FORMULA
        kernel = _rotation_by(rotate_queries_and_keys, [tensor.unsqueeze(1) for tensor in angles])
        fitting.append(trials.rounds_no_more(kernel, code, formula, states))
    if not fitting:
        return Misfit.FORMULA
    return None if all(fitting) else Misfit.ROUNDING


def _rotation_by(rotate: Callable[..., Any], angles: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """Return ``rotate`` as a function of queries and keys, with ``angles`` of their type."""
    return lambda query, key: rotate(query, key, *(tensor.to(query.dtype) for tensor in angles))


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of ``parameter`` before ZeRO-3 sharded it."""
    return getattr(parameter, "ds_shape", parameter.shape)
