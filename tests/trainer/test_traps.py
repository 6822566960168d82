"""Tests that start at most one rank: the memory of a snapshot, DeepSpeed's configuration, and small updates in bf16."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_core.contract import OptimizationConfig
from finetune_trainer.engine.config import BUCKET_ELEMENTS, engine_config, overlap_pays
from finetune_trainer.engine.engine import FIRST_MOMENT, MASTER, SECOND_MOMENT
from finetune_trainer.engine.state import assign_owners, take_snapshot
from finetune_trainer.model.load import load_base
from finetune_trainer.pod.plan import Inputs
from tests.trainer import tiny
from tests.trainer.gangs import train_all
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config


class Gathered:
    """Takes the place of an engine that gathers whole parameters. Records the largest size in bytes that
    all living gathered tensors had together."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.parameter_shapes = shapes
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.peak = 0

    def read_state(self, name: str) -> dict[str, torch.Tensor]:
        made = {kind: torch.zeros(self.parameter_shapes[name]) for kind in (MASTER, FIRST_MOMENT, SECOND_MOMENT)}
        for tensor in made.values():
            self.alive.add(tensor)
        self.peak = max(self.peak, sum(tensor.nbytes for tensor in self.alive))
        return made


def test_trap_19_a_save_gathers_one_parameter_at_a_time() -> None:
    shapes: dict[str, tuple[int, ...]] = {f"layer.{number}": (64, 16 + number) for number in range(12)}
    largest = max(3 * 4 * math.prod(shape) for shape in shapes.values())
    for rank in range(2):
        engine = Gathered(shapes)
        kept = take_snapshot(engine, rank=rank, world_size=2)  # type: ignore[arg-type]
        own = [name for name, owner in assign_owners(shapes, 2).items() if owner == rank]
        assert {name.rpartition("/")[0] for name in kept} == set(own)
        # While the engine gathers a parameter, the tensors of the parameter before are still alive. So the tensors of
        # at most two parameters are alive at once, beside the copies that the snapshot keeps.
        assert engine.peak <= 2 * largest


def test_overrides_are_merged_into_deepspeeds_configuration_last() -> None:
    optimization = OptimizationConfig(
        learning_rate=1, global_batch_size=8, micro_batch_size=2, schedule="Constant", warmup_steps=0, weight_decay=0,
        gradient_clipping=1, precision="bf16", gradient_checkpointing=False, seed=1, zero_stage=3,
        offload_optimizer=True, offload_parameters=True,
        overrides='{"zero_optimization": {"overlap_comm": true, "offload_param": {"pin_memory": true}}, "a": 1}',
    )  # fmt: skip
    config = engine_config(optimization, 4)
    zero = config["zero_optimization"]
    assert (config["a"], zero["stage"], zero["overlap_comm"]) == (1, 3, True)
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_optimizer"] == {"device": "cpu"}
    assert config["train_batch_size"] == 8
    without = optimization.model_copy(update={"overrides": None})
    for overlap in (False, True):
        zero = engine_config(without, 4, overlap_communication=overlap)["zero_optimization"]
        assert zero["overlap_comm"] is overlap


@pytest.mark.parametrize(
    ("stage", "trained", "pays"),
    [
        (1, BUCKET_ELEMENTS, False),
        (2, BUCKET_ELEMENTS, False),
        (2, BUCKET_ELEMENTS + 1, True),
        (3, 1, True),
        # LoRA of rank 8 on all linear layers of Llama-2-7B, and the whole model.
        (2, 19_988_480, False),
        (2, 6_738_415_616, True),
    ],
)
def test_deepspeed_overlaps_nothing_where_one_bucket_holds_all_gradients(stage: int, trained: int, pays: bool) -> None:
    assert overlap_pays(stage, trained) is pays


@pytest.mark.long
def test_trap_13_bf16_masters_lose_no_updates(store: ObjectStore, tiny_model: Path, tmp_path: Path) -> None:
    """An update at a learning rate of 3e-5 is too small to change most weights if they are stored in bf16.

    After 200 such updates, the fp32 master weights of a bf16 run must have moved as far as those of an fp32 run.
    """
    steps = 200
    options: dict[str, Any] = {
        "world__nodes": 1,
        "method": "Full",
        "optimization__maxSteps": steps,
        "optimization__learningRate": 3e-5,
        "storage__checkpointEverySteps": steps,
        "evaluation__everySteps": steps,
    }
    configs = [
        run_config(store, f"masters-{precision}", **options, optimization__precision=precision)
        for precision in ("fp32", "bf16")
    ]
    inputs = Inputs(model=tiny_model, train=tiny.write_jsonl(tmp_path / "train.jsonl", tiny.rows(20, seed=1)))
    train_all(configs, inputs, tmp_path, credentials=store.credentials)
    norms = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        start = {name: value.detach().float() for name, value in load_base(tiny_model, dtype).named_parameters()}
        key = f"runs/default/masters-{precision}/uid-1/checkpoints/000001-{steps:09d}/state-00000-of-00001.safetensors"
        file = tmp_path / f"{precision}.safetensors"
        file.write_bytes(store.read(key))
        masters = load_file(file)
        moved = [masters[f"{name}/{MASTER}"] - value for name, value in start.items() if f"{name}/{MASTER}" in masters]
        norms[precision] = math.sqrt(sum(float(delta.square().sum()) for delta in moved))
    print(f"norm of all updates: {norms}")
    assert norms["bf16"] == pytest.approx(norms["fp32"], rel=0.01)
