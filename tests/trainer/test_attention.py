"""The choice of the kernel that computes attention, and packed examples in models of many families with every kernel
except FlexAttention.

Packed examples must have the logits that they have alone, whatever kernel computes them and whatever the code of a
model does with position ids. For a model in which this is impossible, packing must be refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from finetune_core.api.training import Attention
from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_trainer.data.batches import collate
from finetune_trainer.data.examples import Example
from finetune_trainer.engine.checks import check_model
from finetune_trainer.loss.objective import Objective
from finetune_trainer.model import packed_attention
from finetune_trainer.model.attention import (
    IMPLEMENTATIONS,
    DeviceAbilities,
    Kernel,
    ModelAbilities,
    check_abilities,
    kernels,
)
from finetune_trainer.model.base_check import JobBase, check_base
from finetune_trainer.model.load import load_base, own_dropout
from finetune_trainer.model.packed_attention import note_borders, packed_sequence_indices
from finetune_trainer.model.structure import read_structure
from tests.trainer.families import FAMILIES, write_family
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.test_objective import OneProcess

CPU = DeviceAbilities(gpu=False)
OLD_GPU = DeviceAbilities(gpu=True)
GPU = DeviceAbilities(gpu=True, flash=True)
GPU_WITH_COMPILER = DeviceAbilities(gpu=True, flash=True, compiler=True)
LLAMA = ModelAbilities("LlamaForCausalLM")
GEMMA_2 = ModelAbilities("Gemma2ForCausalLM", sdpa=False)
BLOOM = ModelAbilities("BloomForCausalLM", sdpa=False, flash=False, flex=False)
EXAMPLES = [
    Example((4, 9, 17, 25, 33, 41, 50, 8, 29, 11, 60, 42, 1), [(0, 13)]),
    Example((5, 12, 19, 26, 7, 7, 31, 55, 20, 1), [(0, 10)]),
    Example((30, 6, 1), [(0, 3)]),
]
CONTRASTING = ("llama-3", "gemma-3", "gpt-2", "gpt-oss", "bloom", "phi-moe")
"""Families whose attention differs: plain, with layers of sliding windows, with learned positions, with sinks, with a
bias by distance, and with a sliding window that the model passes to the masks only, and not to the attention."""


@pytest.fixture(autouse=True)
def _forget_borders() -> Iterator[None]:
    """Forget the borders of the last micro-batch after each test, because they hold for all models of the process."""
    yield
    note_borders(None)


@pytest.mark.parametrize(
    ("model", "device", "packing", "wanted"),
    [
        (LLAMA, CPU, True, Kernel.SDPA),
        (LLAMA, GPU, False, Kernel.SDPA),
        (LLAMA, GPU, True, Kernel.FLASH),
        (LLAMA, OLD_GPU, True, Kernel.SDPA),
        (GEMMA_2, CPU, True, Kernel.EAGER),
        (GEMMA_2, GPU, True, Kernel.EAGER),
        (GEMMA_2, GPU_WITH_COMPILER, True, Kernel.FLEX),
        (BLOOM, GPU_WITH_COMPILER, False, Kernel.EAGER),
    ],
)
def test_auto_takes_the_fastest_kernel_that_model_and_device_support(
    model: ModelAbilities, device: DeviceAbilities, packing: bool, wanted: Kernel
) -> None:
    order = kernels("Auto", model, device, "bf16", packing=packing)
    assert order[0] is wanted
    assert order[-1] is Kernel.EAGER


@given(
    sequences=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4),
    packed=st.booleans(),
)
def test_the_numbers_of_packed_examples_are_those_of_transformers_without_a_read_of_the_device(
    sequences: list[list[int]], packed: bool
) -> None:
    """``sequences`` has the lengths of the examples. On the meta device no value can be read."""
    lengths = sequences if packed else [sequence[:1] for sequence in sequences]
    batch = collate(
        [[(Example(range(length), [(0, length)]), 1) for length in sequence] for sequence in lengths],
        pad=0,
        packed=packed,
    )
    shape = (batch.input_ids.shape[0], batch.input_ids.shape[1])
    own = torch.arange(shape[1]).expand(shape)
    positions = batch.position_ids if batch.position_ids is not None else own
    # What transformers does without the trainer.
    wanted = packed_attention._FIND(positions)
    note_borders(batch.starts, batch.longest, shape=shape)
    found = packed_sequence_indices(positions)
    assert (found is None) == (wanted is None)
    if found is not None:
        assert found.tolist() == wanted.tolist()
    if batch.starts is None:
        note_borders(None, shape=shape)
    else:
        note_borders(batch.starts.to("meta"), batch.longest, shape=shape)
    on_meta = packed_sequence_indices(positions.to("meta"))
    assert (on_meta is None) == (wanted is None)
    # Of a micro-batch that is not noted nothing is known, so that transformers looks for examples.
    note_borders(None)
    other = torch.tensor([[0, 1, 2, 0, 1]])
    numbers = packed_sequence_indices(other)
    assert numbers is not None
    assert numbers.tolist() == [[0, 0, 0, 1, 1]]


def test_auto_computes_in_fp32_without_flash() -> None:
    assert kernels("Auto", LLAMA, GPU, "fp32", packing=True)[0] is Kernel.SDPA


@pytest.mark.parametrize(
    ("requested", "model", "device", "sentence"),
    [
        ("SDPA", GEMMA_2, None, "transformers' Gemma2ForCausalLM does not support it"),
        ("Flash", GEMMA_2, None, "transformers' Gemma2ForCausalLM does not support it"),
        ("Flash", LLAMA, OLD_GPU, "this GPU is older than Ampere"),
        ("Flash", LLAMA, CPU, "it trains on GPUs only"),
        ("Flash", LLAMA, GPU, "it computes packed examples only, and dataset.packing is false"),
        ("Flex", LLAMA, GPU, "it is compiled when the training begins, and the trainer's image has no C compiler"),
        ("Flex", BLOOM, None, "transformers' BloomForCausalLM does not support it"),
    ],
)
def test_a_named_kernel_that_can_not_compute_is_refused(
    requested: Attention, model: ModelAbilities, device: DeviceAbilities | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=f"^training.attention: must not be {requested} for this job, because") as error:
        kernels(requested, model, device, "bf16", packing=False)
    assert str(error.value).endswith(sentence)


def test_a_named_kernel_is_the_only_one() -> None:
    assert kernels("Eager", LLAMA, GPU, "bf16", packing=True) == [Kernel.EAGER]


def test_packing_is_refused_for_layers_that_carry_a_state() -> None:
    model = ModelAbilities("Lfm2ForCausalLM", state="conv layers")
    check_abilities(model, packing=False, gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"^dataset.packing: must be false for this model: its conv layers carry"):
        check_abilities(model, packing=True, gradient_checkpointing=False)


def test_a_model_that_can_not_recompute_refuses_gradient_checkpointing() -> None:
    model = ModelAbilities("JetMoeForCausalLM", recomputes=False)
    with pytest.raises(UserError, match=r"^training.gradientCheckpointing: must be false: transformers' JetMoe"):
        check_abilities(model, packing=False, gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("lfm2", {"dataset__packing": True}, "dataset.packing: must be false for this model: its conv layers carry"),
        ("gemma-2", {"optimization__attention": "SDPA"}, "training.attention: must not be SDPA for this job, because"),
        ("jetmoe", {"optimization__gradientCheckpointing": True}, "training.gradientCheckpointing: must be false"),
    ],
)
def test_what_the_code_of_a_model_can_not_do_is_found_before_a_weight_is_read(
    name: str, changes: dict[str, Any], sentence: str, empty_store: ObjectStore, tmp_path: Path
) -> None:
    """The checks of `check_base` run in the preflight check and again when a training starts."""
    folder = write_family(name, tmp_path)
    check_base(JobBase(folder, RunConfig.model_validate(run_config(empty_store, "attention"))))
    with pytest.raises(UserError, match=f"^{sentence}"):
        check_base(JobBase(folder, RunConfig.model_validate(run_config(empty_store, "attention", **changes))))


@pytest.mark.parametrize("name", CONTRASTING)
def test_packed_examples_have_the_logits_of_examples_alone_with_every_kernel(name: str, tmp_path: Path) -> None:
    _assert_separate(name, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*CONTRASTING, "bert")])
def test_packed_examples_of_every_family_have_the_logits_of_examples_alone(name: str, tmp_path: Path) -> None:
    _assert_separate(name, tmp_path)


WITHOUT_SEPARATION = {"openai-gpt"}
"""Families without a state whose examples still can't be packed, because they have a mask of their own. For these
families, the checks of `engine/checks.py` refuse packing."""


def _assert_separate(name: str, folder: Path) -> None:
    """Assert that packed examples have the logits of examples alone, with every kernel that the model supports except
    FlexAttention. For a model with a state, and for the families WITHOUT_SEPARATION, assert that the logits differ."""
    model = load_base(write_family(name, folder), torch.float32)
    objective = Objective(model)
    abilities = ModelAbilities.of(read_structure(folder).model)
    model.eval()
    alone = torch.cat([_logits(objective, model, [[example]], packed=False) for example in EXAMPLES])
    packed = {}
    for kernel in kernels("Auto", abilities, None, "bf16", packing=True):
        if kernel is Kernel.FLEX:
            continue  # FlexAttention must be compiled first. No job uses it on CPUs, where it has no backward pass.
        model.set_attn_implementation(IMPLEMENTATIONS[kernel])
        packed[kernel] = max(
            float((_logits(objective, model, rows, packed=True) - alone).abs().max())
            for rows in ([EXAMPLES], [EXAMPLES[:2], EXAMPLES[2:]])
        )
    note_borders(None)
    if abilities.state or name in WITHOUT_SEPARATION:
        assert min(packed.values()) > 0.1
    else:
        assert max(packed.values()) < 1e-5


def _logits(objective: Objective, model: Any, rows: list[list[Example]], *, packed: bool) -> torch.Tensor:
    batch = collate([[(example, 0) for example in row] for row in rows], pad=1, packed=packed)
    with torch.no_grad():
        return objective.logits(model, batch)


def test_a_model_that_reads_in_both_directions_is_refused(tmp_path: Path) -> None:
    # `load_base` refuses this model too, by its configuration.
    model = AutoModelForCausalLM.from_pretrained(write_family("bert", tmp_path), dtype=torch.float32)
    with pytest.raises(UserError, match=r"^model: must be a causal language model: what follows a token changes"):
        check_model(OneProcess(model), EXAMPLES, pad=1, packing=False, kernels=[Kernel.SDPA])  # type: ignore[arg-type]


@pytest.mark.parametrize(("line", "masked"), [(EXAMPLES[:1], False), (EXAMPLES[:2], True)], ids=["one", "two"])
def test_only_a_sequence_of_several_examples_needs_a_mask(
    line: Sequence[Example], masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a mask, torch has a faster kernel for causal attention, which rounds in another way."""
    engine = OneProcess(load_base(write_family("llama-3", tmp_path), torch.float32))
    engine.use_attention(Kernel.SDPA)
    compute, masks = torch.nn.functional.scaled_dot_product_attention, []

    def seen(*tensors: torch.Tensor, attn_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        masks.append(attn_mask is not None)
        return compute(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    engine.logits(collate([[(example, 1) for example in line]], pad=1, packed=True))
    assert set(masks) == {masked}


def test_a_kernel_that_fails_is_replaced_by_a_slower_one(tmp_path: Path) -> None:
    """transformers' class for gpt-oss says that it supports FlashAttention, but FlashAttention can't compute the
    attention sinks of gpt-oss."""
    engine = OneProcess(load_base(write_family("gpt-oss", tmp_path), torch.float32))
    chosen = check_model(engine, EXAMPLES, pad=1, packing=True, kernels=[Kernel.FLASH, Kernel.EAGER])  # type: ignore[arg-type]
    assert chosen.kernel is Kernel.EAGER
    assert chosen.notices == ["training.attention: Flash can't be used for this model: FlashAttention has no s_aux"]


@pytest.mark.parametrize(
    ("name", "kernel", "sentence"),
    [
        (
            "llama-4",
            Kernel.FLASH,
            "Flash for this model, which SDPA can compute: FlashAttention knows causal masks and",
        ),
        ("gpt-oss", Kernel.FLASH, "Flash for this model, which Eager can compute: FlashAttention has no s_aux"),
        ("gpt-oss", Kernel.SDPA, "SDPA for this model, which Eager can compute: GptOssForCausalLM does not support"),
    ],
)
def test_a_named_kernel_that_fails_where_another_works_is_the_fault_of_the_job(
    name: str, kernel: Kernel, sentence: str, tmp_path: Path
) -> None:
    engine = OneProcess(load_base(write_family(name, tmp_path), torch.float32))
    with pytest.raises(UserError, match=f"^training.attention: must not be {sentence}"):
        check_model(engine, EXAMPLES, pad=1, packing=True, kernels=[kernel])  # type: ignore[arg-type]


def test_an_error_that_every_kernel_meets_is_passed_on_as_it_is(tmp_path: Path) -> None:
    engine = OneProcess(load_base(write_family("llama-3", tmp_path), torch.float32))

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the connection to another rank is lost")

    engine.forward = broken
    with pytest.raises(RuntimeError, match=r"^the connection to another rank is lost$"):
        check_model(engine, EXAMPLES, pad=1, packing=True, kernels=[Kernel.SDPA])  # type: ignore[arg-type]


def test_generated_text_after_a_packed_batch_is_that_of_the_model(tmp_path: Path) -> None:
    """The borders of a packed batch must not reach the masks of a text that is generated later."""
    model = load_base(write_family("mistral", tmp_path), torch.float32).eval()
    model.set_attn_implementation(IMPLEMENTATIONS[Kernel.FLASH])
    prompt = torch.tensor([EXAMPLES[0].ids])
    wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    _logits(Objective(model), model, [EXAMPLES], packed=True)
    note_borders(None)
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("name", ["gpt-2", "opt"])
def test_the_own_dropout_of_a_base_model_is_off(name: str, tmp_path: Path) -> None:
    model = load_base(write_family(name, tmp_path), torch.float32)
    objective = Objective(model)
    assert own_dropout(read_structure(tmp_path).model) == 0.1
    assert own_dropout(model) == 0
    model.eval()
    wanted = _logits(objective, model, [EXAMPLES[:1]], packed=False)
    model.train()
    torch.testing.assert_close(_logits(objective, model, [EXAMPLES[:1]], packed=False), wanted, rtol=0, atol=0)
