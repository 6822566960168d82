"""What a layer of Llama-2-7B's shape asks of a GPU stays within budgets, counted on the meta device.

docs/kernels.md has the counts. A lower budget is set where the code became better; a budget is never raised.
"""

from __future__ import annotations

from functools import cache, partial

import pytest

from finetune_trainer.kernels.parts import KernelPart
from finetune_trainer.kernels.rms_norm import Form, plain_rms_norm, rms_norm
from tests.trainer.kernel_counts import Counts, count, count_layer, count_norm, with_engine, with_kernels

LAYERS = 32
TOKENS = 8 * 512


@cache
def fused(*, lora: bool, dropout: str = "0") -> Counts:
    return count_layer(lora=lora, dropout=dropout)


def megabytes_a_token(counts: Counts) -> float:
    """Return the bytes that the kernels of all layers move for a token, in MB."""
    return LAYERS * counts.moved / TOKENS / 1e6


def kilobytes_kept(counts: Counts) -> float:
    """Return the bytes that a layer keeps for a token, in KB."""
    return counts.kept / TOKENS / 1e3


def test_the_plain_code_is_counted_right() -> None:
    """The numbers are those of transformers' and peft's code, counted by hand once."""
    plain = partial(with_kernels, plain=list(KernelPart))
    lora, full = (count_layer(lora=lora, make=plain) for lora in (True, False))
    assert (lora.kernels, full.kernels) == (168, 109)
    assert megabytes_a_token(lora) == pytest.approx(102.4, abs=0.1)
    assert megabytes_a_token(full) == pytest.approx(63.6, abs=0.1)
    assert kilobytes_kept(lora) == pytest.approx(170.1, abs=0.2)
    assert kilobytes_kept(full) == pytest.approx(186.4, abs=0.2)


def test_a_layer_with_lora_stays_within_its_budgets() -> None:
    counts = fused(lora=True)
    assert counts.kernels <= 75, counts.names
    assert megabytes_a_token(counts) <= 37.5
    assert kilobytes_kept(counts) <= 110


def test_a_layer_that_is_trained_whole_stays_within_its_budgets() -> None:
    counts = fused(lora=False)
    assert counts.kernels <= 47, counts.names
    assert megabytes_a_token(counts) <= 25
    assert kilobytes_kept(counts) <= 110


def test_dropout_costs_no_more_than_15_percent_of_the_traffic() -> None:
    plain, dropped = fused(lora=True), fused(lora=True, dropout="0.05")
    assert dropped.names["dropped_inner"] == 4, "the layer computes without dropout"
    assert dropped.moved <= 1.15 * plain.moved
    assert kilobytes_kept(dropped) <= 110


@pytest.mark.parametrize("part", sorted(set(KernelPart) - {KernelPart.DROPOUT, KernelPart.HEAD_LOSS}))
def test_each_part_saves_kernels_or_memory_and_can_be_left_plain(part: KernelPart) -> None:
    counts, all_parts = count_layer(lora=True, make=partial(with_kernels, plain=[part])), fused(lora=True)
    assert counts.kernels > all_parts.kernels or counts.moved > all_parts.moved or counts.kept > all_parts.kept


@pytest.mark.parametrize(("lora", "kernels", "megabytes"), [(True, 75, 37.5), (False, 47 + 16, 35)])
def test_the_engine_trains_with_the_kernels(lora: bool, kernels: int, megabytes: float) -> None:
    """The engine adds up gradients in fp32. Those of adapters are joined first, so that a layer more needs no kernel
    more. The 7 matrices of a layer that is trained whole have 13 parts, of which one shares a batch with norms. Their
    traffic is the same for any number of tokens in the micro-batch."""
    counts = count_layer(lora=lora, make=with_engine)
    assert counts.kernels <= kernels, counts.names
    assert megabytes_a_token(counts) <= megabytes
    assert counts.kept == fused(lora=lora).kept


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "Full"])
def test_the_gradients_of_the_head_are_computed_without_its_logits_again(lora: bool) -> None:
    layer = fused(lora=lora)
    head, plain = (
        count(1, lora=lora, make=partial(with_kernels, plain=parts)) - layer for parts in ([], [KernelPart.HEAD_LOSS])
    )
    assert head.moved < 0.8 * plain.moved
    assert head.names["mm"] + head.names["addmm_"] < plain.names["mm"]
    assert "nll_loss_forward" not in head.names


@pytest.mark.parametrize(("form", "bytes_a_feature"), [(Form.SCALED, 10), (Form.BARE, 10), (Form.CENTERED, 46)])
def test_a_norm_stays_within_its_budget(form: Form, bytes_a_feature: int) -> None:
    fused, plain = count_norm(rms_norm, form), count_norm(plain_rms_norm, form)
    assert fused.moved / 1e6 <= bytes_a_feature + 0.1, fused.names
    assert fused.moved < plain.moved / 2
