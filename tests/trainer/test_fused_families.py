"""Models of all families have the same loss and the same gradients with fused kernels as with the code of transformers
and peft: padded and packed, with and without gradient checkpointing, with LoRA and with all weights trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune_trainer.kernels.install import KernelReport, use_fused_kernels
from finetune_trainer.kernels.parts import NOT_UNDER_ZERO_3, KernelPart
from finetune_trainer.model.packed_attention import note_borders
from tests.trainer.families import FAMILIES, write_family
from tests.trainer.fused_families import (
    MORE_ROUNDING,
    NEAR,
    batches,
    compare,
    differences,
    engine_of,
    gradients_of,
    nodes_of,
    rounding,
    trained_model,
)

LEFT_OUT = ("bert", "phi-moe")
"""BERT is refused by the trainer, because it reads a text in both directions. The router of Phi-MoE draws random noise
in training, so that the plain model differs from itself."""
FAST = ("llama-3", "gemma-3", "qwen3", "phi-3", "mixtral", "gpt-neox")
IN_BF16 = (
    *("gemma", "gemma-2", "gpt-neox", "granite", "mistral", "olmo-2"),
    *("phi-3", "qwen3", "recurrent-gemma", "smollm3", "vaultgemma"),
)
"""Families whose errors in bf16 are compared. Mixtures of experts are left out, because another rounding can send a
token to other experts."""
WHOLE = frozenset(KernelPart) - {KernelPart.DROPOUT, KernelPart.HEAD_LOSS}
"""The parts of a model without dropout that `use_fused_kernels` replaces."""


def check(name: str, folder: Path, *, lora: bool, dropout: str = "0") -> KernelReport:
    report, differences = compare(name, folder, lora=lora, dropout=dropout)
    assert differences
    for found in differences:
        assert found.loss <= NEAR, found
        assert found.gradient <= found.allowed, found
    return report


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "Full"])
@pytest.mark.parametrize("name", FAST)
def test_fused_kernels_are_exact(name: str, lora: bool, tmp_path: Path) -> None:
    check(name, tmp_path / name, lora=lora)


@pytest.mark.long
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "Full"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*FAST, *LEFT_OUT)])
def test_fused_kernels_are_exact_in_every_family(name: str, lora: bool, tmp_path: Path) -> None:
    check(name, tmp_path / name, lora=lora)


def test_dropout_drops_what_it_drops_in_the_plain_model(tmp_path: Path) -> None:
    report = check("llama-3", tmp_path / "llama-3", lora=True, dropout="0.3")
    assert report.replaced[KernelPart.DROPOUT] == 2 * 7


def test_the_report_says_what_was_replaced_and_what_was_left(tmp_path: Path) -> None:
    reports = {}
    for name in ("llama-3", "cohere", "nemotron"):
        write_family(name, tmp_path / name)
        reports[name] = use_fused_kernels(trained_model(tmp_path / name, lora=True))
    assert reports["llama-3"].replaced == {
        KernelPart.NORMS: 5,
        KernelPart.ROTARY: 2,
        KernelPart.PROJECTIONS: 14,
        KernelPart.GATED_PRODUCTS: 2,
        KernelPart.GATED_PROJECTIONS: 2,
    }
    assert reports["llama-3"].left == ()
    # Cohere turns neighbouring features, and its norms subtract the mean.
    assert KernelPart.ROTARY not in reports["cohere"].replaced
    assert {(left.part, left.module) for left in reports["cohere"].left} >= {(KernelPart.ROTARY, "CohereAttention")}
    # Nemotron's feed-forward layers have no gate.
    assert KernelPart.GATED_PRODUCTS not in reports["nemotron"].replaced


NODES = {
    KernelPart.NORMS: {"_RMSNormBackward"},
    KernelPart.ROTARY: {"_RotationBackward"},
    KernelPart.GATED_PRODUCTS: {"_GatedProductBackward", "_GatedProjectionBackward"},
    KernelPart.PROJECTIONS: {"_ProjectionsBackward"},
    KernelPart.GATED_PROJECTIONS: {"_GatedProjectionBackward"},
}
"""The names of the kernels in the graph of autograd, by part."""


@pytest.mark.parametrize("part", sorted(WHOLE))
def test_a_part_that_is_switched_off_is_not_in_the_graph(part: KernelPart, tmp_path: Path) -> None:
    folder = write_family("llama-3", tmp_path / "model")
    model = trained_model(folder, lora=True)
    with_it = {KernelPart.GATED_PROJECTIONS} if part is KernelPart.GATED_PRODUCTS else set()
    assert WHOLE - {part} - with_it == set(use_fused_kernels(model, plain=[part]).replaced)
    names = nodes_of(engine_of(model, packed=False).loss(batches(packed=False), full_logits=True))
    assert not names & NODES[part]
    for other in WHOLE - {part} - with_it:
        assert names & NODES[other], other


def test_dropout_that_is_switched_off_is_that_of_peft(tmp_path: Path) -> None:
    folder = write_family("llama-3", tmp_path / "model")
    plain, model = (trained_model(folder, lora=True, dropout="0.3") for _ in range(2))
    report = use_fused_kernels(model, plain=[*WHOLE - {KernelPart.PROJECTIONS}, KernelPart.DROPOUT])
    assert set(report.replaced) == {KernelPart.PROJECTIONS}
    losses = [engine_of(one, packed=False).loss(batches(packed=False), full_logits=True) for one in (model, plain)]
    assert torch.equal(*losses)
    assert not nodes_of(losses[0]) & NODES[KernelPart.PROJECTIONS]


def test_a_model_with_all_parts_switched_off_is_bit_for_bit_the_plain_model(tmp_path: Path) -> None:
    folder = write_family("llama-3", tmp_path / "model")
    plain, model = trained_model(folder, lora=True), trained_model(folder, lora=True)
    assert use_fused_kernels(model, plain=list(KernelPart)).replaced == {}
    assert not [module for module in model.modules() if "forward" in vars(module)]
    batch = batches(packed=False)
    found, wanted = (gradients_of(engine_of(one, packed=False), batch) for one in (model, plain))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in found.items())


@pytest.mark.parametrize("name", ["llama-3", "gemma-3", "modernbert-decoder"])
def test_in_bf16_the_gradients_are_as_exact_as_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    check_rounding(name, tmp_path / name)


@pytest.mark.long
@pytest.mark.parametrize("name", IN_BF16)
def test_in_bf16_more_families_are_as_exact_as_the_plain_model(name: str, tmp_path: Path) -> None:
    check_rounding(name, tmp_path / name)


def check_rounding(name: str, folder: Path) -> None:
    write_family(name, folder)
    plain, fused = rounding(folder, lora=True, micro_batches=2)
    assert fused <= MORE_ROUNDING * plain


def test_what_is_scored_and_exported_stays_bit_for_bit_what_transformers_computes(tmp_path: Path) -> None:
    folder = write_family("llama-3", tmp_path / "model")
    plain, model = trained_model(folder, lora=True), trained_model(folder, lora=True)
    use_fused_kernels(model)
    note_borders(None)
    ids = batches(packed=False).input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


def test_a_model_is_fused_once(tmp_path: Path) -> None:
    model = trained_model(write_family("llama-3", tmp_path / "model"), lora=True)
    assert use_fused_kernels(model).replaced
    assert use_fused_kernels(model).replaced == {}


class Gathering:
    """Takes the place of ZeRO-3: a module has its weights only while it is called, and in the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.whole = {parameter: parameter.data for parameter in model.parameters()}
        for module in model.modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_pre_hook(self.gather)
                module.register_forward_hook(self.release)
        for parameter in self.whole:
            parameter.data = torch.empty(0)

    def gather(self, module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = self.whole[parameter]

    def release(self, module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    def gather_all(self) -> None:
        for parameter, value in self.whole.items():
            parameter.data = value


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "Full"])
def test_the_parts_that_are_allowed_under_zero_3_read_no_weights_of_other_modules(lora: bool, tmp_path: Path) -> None:
    folder = write_family("llama-3", tmp_path / "model")
    model, plain = trained_model(folder, lora=lora), trained_model(folder, lora=lora)
    report = use_fused_kernels(model, plain=NOT_UNDER_ZERO_3)
    assert set(report.replaced) == WHOLE - NOT_UNDER_ZERO_3
    batch = batches(packed=False)
    wanted = gradients_of(engine_of(plain, packed=False), batch)
    engine = engine_of(model, packed=False)
    gathering = Gathering(model)
    loss = engine.loss(batch, full_logits=True)
    gathering.gather_all()
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    apart = differences(found, wanted)
    assert max(apart.values()) <= 2 * NEAR, apart


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "Full"])
def test_a_module_whose_hooks_gather_weights_is_called(lora: bool, tmp_path: Path) -> None:
    """So a model is right at ZeRO-3 also where NOT_UNDER_ZERO_3 was forgotten."""
    folder = write_family("llama-3", tmp_path / "model")
    model, plain = trained_model(folder, lora=lora), trained_model(folder, lora=lora)
    assert set(use_fused_kernels(model).replaced) == WHOLE
    batch = batches(packed=False)
    wanted = engine_of(plain, packed=False).loss(batch, full_logits=True)
    engine = engine_of(model, packed=False)
    Gathering(model)
    torch.testing.assert_close(engine.loss(batch, full_logits=True), wanted, rtol=NEAR, atol=0)


def test_without_a_call_a_module_has_no_weights(tmp_path: Path) -> None:
    """Without this, the tests above could not fail."""
    model = trained_model(write_family("llama-3", tmp_path / "model"), lora=True)
    Gathering(model)
    layer = next(module for module in model.modules() if type(module) is nn.Linear)
    x = torch.randn(3, layer.in_features)
    assert layer(x).shape == (3, layer.out_features)
    with pytest.raises(RuntimeError):
        nn.functional.linear(x, layer.weight)
