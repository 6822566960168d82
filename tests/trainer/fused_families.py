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
"""Largest relative difference of a loss, and of the gradient of a parameter, in its norm."""
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
    """The largest difference between the two gradients of a parameter, as the norm of the difference relative to the
    norm of the gradient."""
    parameter: str
    """The parameter with this difference, the largest of all."""
    allowed: float
    """The largest allowed difference of gradients: NEAR, or twice `sensitivity` where that is more."""


def batches(*, packed: bool) -> Batch:
    """Return a micro-batch of three examples, in two sequences where they are packed."""
    generator = torch.Generator().manual_seed(9)
    examples = [
        (Example(tuple(torch.randint(2, 60, (length,), generator=generator).tolist()), [(1, length)]), number)
        for number, length in enumerate(LENGTHS)
    ]
    keyed = [(example, dropout_seed(7, 3, number)) for example, number in examples]
    return collate([keyed[:2], keyed[2:]] if packed else [[one] for one in keyed], pad=1, packed=packed)


def trained_model(folder: Path, *, lora: bool, recompute: bool = False, dropout: str = "0") -> Any:
    """Return the model in ``folder`` in training mode, in fp32: with adapters that are not zero, or with all weights
    trained."""
    model: Any = load_base(folder, torch.float32)
    if recompute:
        enable_gradient_checkpointing(model)
    if lora:
        spec = LoRASpec(rank=4, alpha=8, dropout=dropout)
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
        wanted, allowed = gradients_of(engine, batch), NEAR
        for recompute in (False, True) if abilities.recomputes else (False,):
            model = trained_model(folder, lora=lora, recompute=recompute, dropout=dropout)
            report = use_fused_kernels(model)
            engine = engine_of(model, packed=packed)
            away = engine.loss(batch, full_logits=True).detach() - loss
            apart = differences(gradients_of(engine, batch), wanted)
            worst = max(apart, key=apart.__getitem__)
            if apart[worst] > NEAR and allowed == NEAR:
                allowed = max(NEAR, 2 * sensitivity(trained_model(folder, lora=lora, dropout=dropout), batch, wanted))
            way = f"{'packed' if packed else 'padded'}, {'recomputed' if recompute else 'kept'}"
            found.append(Difference(way, float(away.abs() / loss.abs()), apart[worst], worst, allowed))
    return report, found


def sensitivity(plain: Any, batch: Batch, wanted: dict[str, torch.Tensor]) -> float:
    """Return how far the gradients of the model ``plain`` move, as `Difference.gradient`, where each weight is changed
    by one unit in its last place. ``wanted`` are the gradients without the change.

    No two ways to compute the same formula in fp32 can be expected to agree better than this, because a model
    multiplies the rounding of its first operations as it multiplies this change.
    """
    generator = torch.Generator().manual_seed(13)
    engine = engine_of(plain, packed=batch.position_ids is not None)
    weights = [parameter.detach().clone() for parameter in plain.parameters()]
    moved = 0.0
    for _ in range(CHANGES):
        with torch.no_grad():
            for parameter, weight in zip(plain.parameters(), weights, strict=True):
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.copy_(weight * (1 + signs * 2**-23))
        moved = max(moved, *differences(gradients_of(engine, batch), wanted).values())
    return moved


def gradients_of(engine: OneProcess, batch: Batch) -> dict[str, torch.Tensor]:
    engine.model.zero_grad()
    engine.loss(batch, full_logits=True).backward()
    named = trained_parameters(engine.model)
    return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


def differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return for each parameter the norm of the difference of the two gradients, relative to the norm of the wanted
    gradient, or to a thousandth of the largest norm of all parameters where that is more. A gradient that is zero by
    the formula, such as that of a bias of keys, consists of rounding only."""
    assert found.keys() == wanted.keys()
    floor = 1e-3 * max(float(gradient.norm()) for gradient in wanted.values())
    return {
        name: float((gradient - wanted[name]).norm()) / max(float(wanted[name].norm()), floor)
        for name, gradient in found.items()
    }
