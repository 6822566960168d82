"""Runs the code of a module on a few numbers, and compares what the code computes with a formula and with a kernel.

`recognition.py` asks two questions about a piece of code. Does the code compute the formula, in fp32? And is the kernel
in bf16 as near to the formula as the code is? The second question has an answer of its own, because some code computes
in fp32 although the model is in bf16. A kernel that rounds more often than such code would not be exact."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from finetune_trainer.kernels.calls import HOOKS
from finetune_trainer.pod.errors import first_line, library_boundary

NEAR = 1e-5
"""Largest difference between the code of a module and a formula in fp32, relative to the largest number of a row."""
MORE_ROUNDING = 1.1
"""How many times the root mean square of the code's rounding error that of a kernel may be. A kernel that rounds twice
where the code rounds once has 1.4 times the error."""
NO_ROUNDING = 2**-20
"""A relative error below which a result in bf16 counts as exact: far below the 2^-9 of one rounding."""

Code = Callable[..., Any]
"""A function of tensors that returns a tensor or a tuple of tensors."""


class _RefusedError(Exception):
    """The code of a model raised something, because it expects something else than the inputs of a trial."""


def _as_refused(error: BaseException) -> _RefusedError:
    return _RefusedError(first_line(error))


def in_training(
    module: nn.Module,
    *,
    parameters: Mapping[str, torch.Tensor] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """Return a copy of ``module`` in training mode, with other ``parameters`` or inner ``modules``, and without hooks.
    The other inner modules are copies of the same kind, so that for example a dropout in ``module`` drops."""
    copied: nn.Module = copy.copy(module)
    own = vars(copied)
    own["training"] = True
    own["_parameters"] = {**module._parameters, **(parameters or {})}
    others = {name: child for name, child in module._modules.items() if name not in (modules or {})}
    copies = {name: in_training(child) if child is not None else None for name, child in others.items()}
    own["_modules"] = {**copies, **(modules or {})}
    own.update((name, OrderedDict()) for name in HOOKS)
    return copied


def runs(code: Code, inputs: Sequence[torch.Tensor]) -> bool:
    """Return whether ``code`` returns anything for ``inputs``."""
    return _result(code, inputs) is not None


def computes(code: Code, inputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    """Return whether ``code`` returns ``wanted`` for ``inputs``, all in fp32."""
    found = _result(code, inputs)
    return found is not None and len(found) == len(wanted) and all(map(_near, found, wanted))


def _result(code: Code, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...] | None:
    """Return what ``code`` returns for ``inputs``, None where it raises."""
    try:
        with torch.no_grad(), library_boundary(_as_refused):
            return _tensors(code(*inputs))
    except _RefusedError:
        return None


def _near(found: Any, wanted: torch.Tensor) -> bool:
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    # Each row has its own size, so each row is compared relative to its own largest number.
    return bool(((found - wanted).abs() <= NEAR * wanted.abs().amax(-1, keepdim=True)).all())


def rounds_no_more(kernel: Code, code: Code, formula: Code, inputs: Sequence[torch.Tensor]) -> bool:
    """Return whether ``kernel`` is in bf16 as near to ``formula`` in fp32 as ``code`` is: each output, and the gradient
    of each of ``inputs``. The inputs are rounded to bf16 first, so that all three compute with the same numbers."""
    rounded = [tensor.detach().bfloat16() for tensor in inputs]
    exact = _values_and_gradients(formula, [tensor.float() for tensor in rounded])
    ours = _values_and_gradients(kernel, rounded)
    try:
        with library_boundary(_as_refused):
            theirs = _values_and_gradients(code, rounded)
    except _RefusedError:
        return False
    return all(
        _error(own, true) <= MORE_ROUNDING * _error(other, true) + NO_ROUNDING
        for own, other, true in zip(ours, theirs, exact, strict=True)
    )


def _values_and_gradients(function: Code, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the outputs of ``function`` and the gradients of ``inputs``, where the gradients of the outputs are random
    numbers that bf16 holds exactly."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        outputs = _tensors(function(*leaves))
        # Other numbers than those of the inputs: the gradient of a norm is zero in the direction of its input.
        generator = seeded(12)
        weights = [torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype) for output in outputs]
        gradients = torch.autograd.grad(outputs, leaves, weights)
    return [output.detach() for output in outputs] + list(gradients)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the root mean square of the difference, relative to the largest number of each row."""
    away = (found.float() - exact) / exact.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return float(away.square().mean().sqrt())


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def seeded(seed: int = 11) -> torch.Generator:
    """Return a generator of its own, so that a trial draws the same numbers each time and none of the training's."""
    return torch.Generator().manual_seed(seed)
