"""The plain engine has the functions that training, scoring and checkpoints need, and a step needs 16 bytes for each
trained parameter. `test_plain_updates.py` is about its updates, and `test_masters.py` about the fp32 values.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_trainer.data.batches import collate
from finetune_trainer.data.examples import Example
from finetune_trainer.engine import gradient_norm, masters
from finetune_trainer.engine.checks import check_model
from finetune_trainer.engine.engine import FIRST_MOMENT
from finetune_trainer.engine.fragment_snapshot import ALIVE, FragmentSnapshots
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.engine.plain_engine import PlainEngine
from finetune_trainer.engine.state import load_state, take_snapshot
from finetune_trainer.model.attention import Kernel
from finetune_trainer.model.load import trained_parameters
from finetune_trainer.pod.errors import Damaged
from tests.trainer.allocations import memory_of
from tests.trainer.engine_runs import (
    PLAIN,
    RATE,
    STATE_FILE,
    EngineRun,
    assert_same_state,
    load,
    make_engine,
    micro_batcher,
    one_step,
    state_after,
    state_folder,
    train,
)


def test_a_training_state_without_some_parameters_is_damaged(tiny_model: Path, tmp_path: Path) -> None:
    """Otherwise the training would go on with the moments and values of a new optimizer for these parameters."""
    run = EngineRun(method="LoRA", parts=((PLAIN, 1),))
    train(run, tiny_model, tmp_path)
    file = state_folder(run, tmp_path, 0) / STATE_FILE
    tensors = load_file(file)
    name = next(iter(tensors)).rpartition("/")[0]
    save_file({key: value for key, value in tensors.items() if not key.startswith(f"{name}/")}, file)
    engine = make_engine(run, PLAIN, load(run, tiny_model))
    with pytest.raises(Damaged, match=f"lacks parameter {name}"):
        load_state(engine, file.parent, updates=1)


def test_parts_of_a_parameter_in_several_batches_train_like_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = EngineRun(method="Full", parts=((PLAIN, 3),), precision="bf16", decay=0.1)
    wanted = train(run, tiny_model, tmp_path / "one"), state_after(run, tmp_path / "one")
    monkeypatch.setattr(masters, "BATCH_ELEMENTS", 1024)
    found = train(run, tiny_model, tmp_path / "many"), state_after(run, tmp_path / "many")
    assert found[0].losses == wanted[0].losses
    assert_same_state(found[1], wanted[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_discarded_gradient_changes_nothing(precision: Any, tiny_model: Path) -> None:
    run = EngineRun(method="Full", parts=((PLAIN, 1),), precision=precision, infinite=2)
    engine, batches = make_engine(run, PLAIN, load(run, tiny_model)), micro_batcher(tiny_model)
    one_step(engine, batches, run, 1)
    before = whole_state(engine)
    loss, norm = one_step(engine, batches, run, 2)
    assert math.isfinite(loss)
    assert math.isnan(norm)
    assert_same_state(whole_state(engine), before)
    assert engine.gradient_norm() == 0
    assert math.isfinite(one_step(engine, batches, run, 3)[1])
    assert not torch.equal(next(iter(whole_state(engine).values())), next(iter(before.values())))


def whole_state(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{kind}": tensor.clone()
        for name in engine.parameter_shapes
        for kind, tensor in engine.read_state(name).items()
    }


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[TrainingEngine]:
    run = EngineRun(method="LoRA", parts=((PLAIN, 1),))
    made = make_engine(run, PLAIN, load(run, tiny_model))
    yield made
    made.close()


FIRST, SECOND = Example((4, 9, 17, 25, 33, 41, 1), [(3, 7)]), Example((5, 12, 19, 26, 1), [(2, 5)])


def test_the_checks_of_a_model_pass_with_the_plain_engine(engine: TrainingEngine) -> None:
    chosen = check_model(engine, [FIRST, SECOND], pad=1, packing=True, kernels=[Kernel.SDPA])
    assert (chosen.kernel, chosen.notices) == (Kernel.SDPA, [])
    assert engine.model.get_base_model().config._attn_implementation == "sdpa"
    assert engine.model.training
    assert not engine.lockstep


def test_excluded_tokens_and_full_logits_are_those_of_the_objective(engine: TrainingEngine) -> None:
    batch = collate([[(FIRST, 1)]], pad=1, packed=False)
    with torch.no_grad():
        inside, whole = float(engine.loss(batch)), float(engine.loss(batch, full_logits=True))
        assert inside == pytest.approx(whole, rel=1e-6)
        engine.exclude_tokens([7, 8])
        assert float(engine.loss(batch)) < inside
        engine.exclude_tokens([])
        engine.use_full_logits()
        assert float(engine.loss(batch)) == whole
        assert engine.logits(batch).shape == (4, engine.model.config.vocab_size)
        ids = torch.tensor([list(FIRST.ids)])
        assert engine.forward(input_ids=ids).logits.shape == (1, len(FIRST.ids), engine.model.config.vocab_size)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_weight_of_a_checkpoint_becomes_that_of_the_model(precision: Any, tiny_model: Path) -> None:
    run = EngineRun(method="LoRA", parts=((PLAIN, 1),), precision=precision)
    model = load(run, tiny_model)
    engine = make_engine(run, PLAIN, model)
    name, shape = next(iter(engine.parameter_shapes.items()))
    value = torch.full(shape, 1 / 3)
    engine.write_weight(name, value)
    assert torch.equal(trained_parameters(model)[name].detach(), value.to(model.dtype))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_snapshots_from_fragments_are_those_of_whole_parameters(
    precision: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1,000 values in a batch, large parameters have parts in several batches."""
    monkeypatch.setattr(masters, "BATCH_ELEMENTS", 1000)
    run = EngineRun(method="Full", parts=((PLAIN, 2),), precision=precision)
    engine, batches, progress = make_engine(run, PLAIN, load(run, tiny_model)), micro_batcher(tiny_model), list[int]()
    snapshots = FragmentSnapshots(
        engine, rank=0, world_size=1, piece_bytes=4096, note_progress=lambda: progress.append(1)
    )
    for step in range(1, 4):
        wanted, found = take_snapshot(engine, rank=0, world_size=1), snapshots.take()
        assert_same_state(found.tensors, wanted)
        found.buffer.release()
        assert len(progress) == step * len(wanted), "each part is a sign of life"
        one_step(engine, batches, run, step)


def test_a_snapshot_that_failed_leaves_nothing_in_the_next_one(tiny_model: Path) -> None:
    run = EngineRun(method="LoRA", parts=((PLAIN, 2),))
    engine, batches = make_engine(run, PLAIN, load(run, tiny_model)), micro_batcher(tiny_model)
    parts, failing = itertools.count(1), {1, 20, 41}

    def fail() -> None:
        if next(parts) in failing:
            raise OSError("the device is gone")

    snapshots = FragmentSnapshots(engine, rank=0, world_size=1, piece_bytes=1024, note_progress=fail)
    for step, _ in enumerate(failing, 1):
        with pytest.raises(OSError, match="the device is gone"):
            snapshots.take()
        assert snapshots.free == ALIVE
        one_step(engine, batches, run, step)
    held = [snapshots.take() for _ in range(ALIVE)]
    wanted = take_snapshot(engine, rank=0, world_size=1)
    for each in held:
        assert_same_state(each.tensors, wanted)


def test_ranks_of_one_training_are_refused(tiny_model: Path) -> None:
    run = EngineRun(method="LoRA", parts=((PLAIN, 1),))
    model = load(run, tiny_model)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ValueError, match=r"^the plain engine trains in one process, and this training has 2$"):
            make_engine(run, PLAIN, model)
    finally:
        dist.destroy_process_group()


def test_a_closed_engine_holds_no_memory(tiny_model: Path) -> None:
    run = EngineRun(method="Full", parts=((PLAIN, 1),), precision="bf16")
    model = load(run, tiny_model)
    engine = make_engine(run, PLAIN, model)
    one_step(engine, micro_batcher(tiny_model), run, 1)
    alive = weakref.ref(model)
    moment = weakref.ref(engine.read_state("model.norm.weight")[FIRST_MOMENT])
    del model
    engine.close()
    assert alive() is None
    assert moment() is None


@pytest.mark.parametrize(("precision", "weight", "standing"), [("bf16", 2, 12), ("fp32", 4, 12)])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_needs_16_bytes_for_each_trained_parameter(
    precision: Any, weight: int, standing: int, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured with 15 million parameters, of which the largest has 2 %. Batches and pieces are as small in relation to
    this model as they are to one with 7 billion parameters. The text has three tokens, so that activations are small.
    """
    monkeypatch.setattr(masters, "BATCH_ELEMENTS", 40_000)
    monkeypatch.setattr(gradient_norm, "CPU_NORM_ELEMENTS", 10_000)
    monkeypatch.setattr(masters, "SMALL_ELEMENTS", 2_500)
    monkeypatch.setattr(masters, "WAITING_ELEMENTS", 10_000)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config).to({"bf16": torch.bfloat16, "fp32": torch.float32}[precision])
    model.config.use_cache = False
    count = sum(parameter.numel() for parameter in model.parameters())
    run = EngineRun(method="Full", parts=((PLAIN, 1),), precision=precision)
    made: list[PlainEngine] = []
    grown, _ = memory_of(lambda: made.append(PlainEngine(model, run.optimization(PLAIN), torch.device("cpu"))))
    assert weight + grown / count == pytest.approx(standing, abs=0.05)
    (engine,) = made
    batch = collate([[(Example((3, 4, 5, 6), [(0, 4)]), 0)]], pad=1, packed=False)

    def accumulate() -> None:
        for index in range(accumulation):
            engine.backward(engine.loss(batch) / batch.tokens, last=index == accumulation - 1)

    peaks = {}
    level = weight * count + grown
    for _ in range(2):
        for phase, part in (
            ("gradients", accumulate),
            ("norm", engine.gradient_norm),
            ("update", lambda: engine.step(RATE)),
        ):
            change, most = memory_of(part)
            peaks[phase] = (level + most) / count
            level += change
        assert level / count == pytest.approx(standing, abs=0.05)
    print(
        f"{precision}, {accumulation} micro-batches: " + ", ".join(f"{key} {peak:.2f}" for key, peak in peaks.items())
    )
    assert 15.9 < peaks["update"] < 16.2
    assert max(peaks.values()) < 16.5
