"""Trains the tiny model of a family for one micro-batch, once with the code of transformers and peft, and once with
fused kernels, and returns how far loss and gradients are apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_core.api.method import LoRASpec
from finetune_trainer.data.batches import Batch, collate, dropout_seed
from finetune_trainer.data.examples import Example
from finetune_trainer.kernels.install import KernelReport, use_fused_kernels
from finetune_trainer.model.adapters import add_adapters, choose_targets
from finetune_trainer.model.attention import IMPLEMENTATIONS, Kernel, ModelAbilities
from finetune_trainer.model.load import enable_gradient_checkpointing, load_base, trained_parameters
from finetune_trainer.model.structure import read_structure
from tests.trainer.families import write_family
from tests.trainer.test_objective import OneProcess

NEAR = 1e-6
"""Largest difference of a loss relative to the loss, and of an element of a gradient relative to the largest element of
the gradient."""
MORE_ROUNDING = 1.1
"""How many times the error of the plain model in bf16 that of the fused model may be. Both errors are random, so they
differ by some percent also where each is rounded as often as the other."""
TINY = 1e-30
"""Takes the place of the largest element of a gradient where all elements are zero."""
CHANGES = 4
"""Number of random changes of the weights of which `sensitivity` takes the largest effect."""
LENGTHS = (11, 6, 9)
"""The lengths of the examples. Some are longer than the windows of the tiny models, which have 8 tokens."""


@dataclass(frozen=True)
class Difference:
    """How far a run with fused kernels is from the plain run."""

    way: str
    """For example `packed, recomputed`."""
    loss: float
    """Relative to the loss."""
    gradient: float
    """How far an element of a parameter's gradient is away, relative to the largest element of this gradient. Of all
    elements of all parameters, the element is the one that uses up most of what is allowed."""
    parameter: str
    """The parameter with this element."""
    allowed: float
    """The largest allowed difference in the gradient of this parameter: NEAR, or twice `sensitivity` where that is
    more."""


def batches(*, packed: bool, seed: int = 9) -> Batch:
    """Return a micro-batch of three examples, in two sequences where they are packed."""
    generator = torch.Generator().manual_seed(seed)
    examples = [
        (Example(tuple(torch.randint(2, 60, (length,), generator=generator).tolist()), [(1, length)]), number)
        for number, length in enumerate(LENGTHS)
    ]
    keyed = [(example, dropout_seed(7, 3, number)) for example, number in examples]
    return collate([keyed[:2], keyed[2:]] if packed else [[one] for one in keyed], pad=1, packed=packed)


def trained_model(
    folder: Path,
    *,
    lora: bool,
    recompute: bool = False,
    dropout: str = "0",
    dtype: torch.dtype = torch.float32,
    **variant: Any,
) -> Any:
    """Return the model in ``folder`` in training mode: with adapters that are not zero, or with all weights trained.
    ``variant`` has further fields of `lora`."""
    model: Any = load_base(folder, dtype)
    if recompute:
        enable_gradient_checkpointing(model)
    if lora:
        spec = LoRASpec.model_validate({"rank": 4, "alpha": 8, "dropout": dropout, **variant})
        targets = choose_targets(read_structure(folder), spec, added_tokens=False)
        model = add_adapters(
            model, spec, targets=targets.modules, parameters=targets.parameters, seed=1, base_name="tiny"
        )
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in trained_parameters(model).values():
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    return model.train()


def engine_of(model: Any, *, packed: bool) -> OneProcess:
    """Return the model with its loss, and with attention over segments where ``packed`` examples allow it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    abilities = ModelAbilities.of(inner)
    segments = packed and abilities.flash and abilities.sdpa
    kernel = Kernel.FLASH if segments else Kernel.SDPA if abilities.sdpa else Kernel.EAGER
    inner.set_attn_implementation(IMPLEMENTATIONS[kernel])
    return OneProcess(model)


def compare(name: str, folder: Path, *, lora: bool, dropout: str = "0") -> tuple[KernelReport, list[Difference]]:
    """Compare the family ``name`` with and without fused kernels, padded and packed, kept and recomputed, as far as the
    family allows it. ``folder`` is an empty folder. Return the report about the kernels, and the differences."""
    write_family(name, folder)
    report = KernelReport()
    found = []
    for packed in (False, True):
        plain = trained_model(folder, lora=lora, dropout=dropout)
        abilities = ModelAbilities.of(plain.get_base_model() if lora else plain)
        if packed and abilities.state:
            continue
        batch = batches(packed=packed)
        engine = engine_of(plain, packed=packed)
        loss = engine.loss(batch, full_logits=True).detach()
        wanted, allowed = gradients_of(engine, batch), dict[str, float]()
        for recompute in (False, True) if abilities.recomputes else (False,):
            model = trained_model(folder, lora=lora, recompute=recompute, dropout=dropout)
            report = use_fused_kernels(model)
            engine = engine_of(model, packed=packed)
            away = engine.loss(batch, full_logits=True).detach() - loss
            apart = differences(gradients_of(engine, batch), wanted)
            if max(apart.values()) > NEAR and not allowed:
                allowed = sensitivity(trained_model(folder, lora=lora, dropout=dropout), batch, wanted)
            bounds = {name: max(NEAR, 2 * allowed.get(name, 0)) for name in apart}
            worst = max(apart, key=lambda name: apart[name] / bounds[name])
            way = f"{'packed' if packed else 'padded'}, {'recomputed' if recompute else 'kept'}"
            found.append(Difference(way, float(away.abs() / loss.abs()), apart[worst], worst, bounds[worst]))
    return report, found


def sensitivity(plain: Any, batch: Batch, wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return for each parameter how far an element of its gradient moves, as in `differences`, where each weight of the
    model ``plain`` is changed by one unit in its last place. ``wanted`` are the gradients without the change.

    No two ways to compute the same formula in fp32 can be expected to agree better than this, because a model
    multiplies the rounding of its first operations as it multiplies this change. A gradient that is zero by the
    formula, such as that of a bias of keys, consists of rounding only, and moves by its own size.
    """
    generator = torch.Generator().manual_seed(13)
    engine = engine_of(plain, packed=batch.position_ids is not None)
    # peft moves the parameters that it adapts within the model while the model computes.
    weights = [(parameter, parameter.detach().clone()) for parameter in plain.parameters()]
    moved = dict.fromkeys(wanted, 0.0)
    for _ in range(CHANGES):
        with torch.no_grad():
            for parameter, weight in weights:
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.copy_(weight * (1 + signs * 2**-23))
        for name, away in differences(gradients_of(engine, batch), wanted).items():
            moved[name] = max(moved[name], away)
    return moved


def gradients_of(engine: OneProcess, batch: Batch) -> dict[str, torch.Tensor]:
    engine.model.zero_grad()
    engine.loss(batch, full_logits=True).backward()
    named = trained_parameters(engine.model)
    return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


def nodes_of(loss: torch.Tensor) -> set[str]:
    """Return the names of all operators in the graph of ``loss``."""
    found, names, left = set(), set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            names.add(node.name())
            left += [following for following, _ in node.next_functions]
    return names


def differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return for each parameter the largest difference between two elements of its gradients, relative to the largest
    element of the wanted gradient."""
    assert found.keys() == wanted.keys()
    return {
        name: float((gradient - wanted[name]).abs().max()) / max(float(wanted[name].abs().max()), TINY)
        for name, gradient in found.items()
    }


def rounding(folder: Path, *, lora: bool, micro_batches: int) -> tuple[float, float]:
    """Return how far the gradients of the model in ``folder`` in bf16 are from those of the same weights in fp32: with
    the code of transformers and peft, and with fused kernels. Each is the root mean square over all parameters and
    ``micro_batches``, where the difference of a gradient is relative to its norm in fp32."""
    plain, fused = (trained_model(folder, lora=lora, dtype=torch.bfloat16) for _ in range(2))
    use_fused_kernels(fused)
    # The same numbers: each weight in bf16 is a weight in fp32.
    exact = trained_model(folder, lora=lora, dtype=torch.bfloat16).float()
    engines = [engine_of(model, packed=False) for model in (exact, plain, fused)]
    squares = [0.0, 0.0]
    for seed in range(micro_batches):
        batch = batches(packed=False, seed=20 + seed)
        wanted, *others = (gradients_of(engine, batch) for engine in engines)
        floor = 1e-3 * max(float(gradient.norm()) for gradient in wanted.values())
        for number, found in enumerate(others):
            for name, gradient in found.items():
                away = float((gradient.float() - wanted[name]).norm()) / max(float(wanted[name].norm()), floor)
                squares[number] += away**2 / len(found) / micro_batches
    return squares[0] ** 0.5, squares[1] ** 0.5
