"""A resumed run equals the uninterrupted run: bit for bit with the same world size and ZeRO stage, within 1e-6
otherwise, and without losing or repeating a row. Ranks of one node share the files of the checkpoint, however slow one
of them reads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from minio.commonconfig import CopySource

from finetune_core.layout import checkpoint_folder
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.storage.checkpoint_folders import TrainerState
from tests.trainer import tiny
from tests.trainer.gangs import losses_of, rows_consumed, step_rows, train_all
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.test_recovery import artifact_files

pytestmark = pytest.mark.gang

STEPS, INTERRUPTED = 9, 4
RATE, DECAY = 1e-3, 0.1
Changed = tuple[str, int, int, int | None]
"""Four values: method and ZeRO stage of the interrupted run, then number of ranks and ZeRO stage of the resumed run.
The stage None means the plain engine."""
CASES = [(method, stage) for method in ("LoRA", "Full") for stage in (0, 2, 3)]
CHANGED: list[Changed] = [
    ("LoRA", 2, 1, 2),
    ("LoRA", 3, 1, 0),
    ("Full", 0, 1, 3),
    ("Full", 3, 1, None),
    ("Full", 2, 2, 3),
    ("LoRA", 0, 2, 3),
]
LARGER: list[Changed] = [("LoRA", 3, 4, 1), ("Full", 2, 4, 2), ("Full", 0, 4, 3)]


@dataclass(frozen=True)
class Bench:
    """The object store and the inputs with which the jobs of this module train."""

    store: ObjectStore
    inputs: Inputs

    def config(self, name: str, method: str, stage: int | None, world: int, *, per_node: int = 1) -> dict[str, Any]:
        return run_config(
            self.store,
            name.lower(),
            world__nodes=world // per_node,
            world__processesPerNode=per_node,
            method=method,
            optimization__zeroStage=stage,
            optimization__maxSteps=STEPS,
            optimization__weightDecay=DECAY,
            optimization__learningRate=RATE,
            storage__checkpointEverySteps=100,
            dataset__validation=None,
        )

    def losses(self, name: str) -> dict[int, float]:
        rows = step_rows(self.store, name.lower())
        assert len(rows) == len({row.step for row in rows}), "no step was trained twice"
        return dict(zip([row.step for row in rows], losses_of(self.store, name.lower()), strict=True))

    def copy(self, name: str, target: str) -> None:
        """Copy a job's files in the bucket to another job name, so that several jobs can resume from one interrupted
        run."""
        prefix = f"runs/default/{name.lower()}/uid-1/"
        for key in self.store.keys(prefix):
            to = key.replace(f"/{name.lower()}/", f"/{target.lower()}/")
            self.store.client.copy_object(BUCKET, to, CopySource(BUCKET, key))


@pytest.fixture(scope="module")
def bench(store: ObjectStore, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    rows = tiny.write_jsonl(tmp_path_factory.mktemp("resume-data") / "train.jsonl", tiny.rows(20, seed=1))
    return Bench(store, Inputs(model=tiny_model, train=rows, validation=None))


@pytest.fixture(scope="module")
def two_ranks(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on two ranks: each case without interruption, then with an interruption, then resumed.

    The cases that resume with another ZeRO stage on two ranks follow. Return the folder of the runs' files. The resumed
    runs have both ranks on one node, and rank 1 reads the checkpoint as late as it can. `test_recovery.py` resumes on
    two nodes.
    """
    folder = tmp_path_factory.mktemp("two-ranks")
    configs, faults = [], []
    for method, stage in CASES:
        configs += [bench.config(f"{kind}-{method}-{stage}", method, stage, 2) for kind in ("whole", "cut")]
        faults += [None, {"kind": "stop", "step": INTERRUPTED + 1}]
    train_all(configs, bench.inputs, folder, credentials=bench.store.credentials, faults=faults)
    for method, stage, world, to_stage in [*CHANGED, *LARGER]:
        bench.copy(f"cut-{method}-{stage}", f"changed-{method}-{stage}-{world}-{to_stage}")
    configs = [bench.config(f"cut-{method}-{stage}", method, stage, 2, per_node=2) for method, stage in CASES]
    configs += [
        bench.config(f"changed-{method}-{stage}-2-{to_stage}", method, to_stage, 2, per_node=2)
        for method, stage, world, to_stage in CHANGED
        if world == 2
    ]
    late: list[dict[str, Any] | None] = []
    for index in range(len(configs)):
        pipe = folder / f"pipe-{index}"
        os.mkfifo(pipe)
        late.append({"kind": "late", "pipe": str(pipe)})
    train_all(configs, bench.inputs, folder / "resumed", credentials=bench.store.credentials, faults=late)
    return folder


@pytest.mark.parametrize(("method", "stage"), CASES)
def test_trap_15_in_the_same_world_losses_and_weights_are_the_same_bits(
    method: str, stage: int, two_ranks: Path, bench: Bench
) -> None:
    whole, cut = bench.losses(f"whole-{method}-{stage}"), bench.losses(f"cut-{method}-{stage}")
    assert sorted(cut) == list(range(1, STEPS + 1))
    assert cut == whole
    expected = artifact_files(bench.store, f"whole-{method}-{stage}".lower())
    assert artifact_files(bench.store, f"cut-{method}-{stage}".lower()) == expected
    index = CASES.index((method, stage))
    before, after = (
        rows_consumed(two_ranks, 2 * index + 1, 2),
        rows_consumed(two_ranks / "resumed", index, 2, per_node=2),
    )
    assert (max(before), min(after)) == (INTERRUPTED, INTERRUPTED + 1)
    assert {**before, **after} == rows_consumed(two_ranks, 2 * index, 2)


def test_in_another_world_or_stage_the_losses_go_on_and_no_row_is_lost_or_repeated(
    two_ranks: Path, bench: Bench, tmp_path: Path
) -> None:
    alone = [case for case in CHANGED if case[2] == 1]
    resume_and_compare(alone, two_ranks, bench, tmp_path)
    for case in CHANGED:
        assert_goes_on(case, bench)


@pytest.mark.long
def test_in_a_larger_world_too(two_ranks: Path, bench: Bench, tmp_path: Path) -> None:
    """Four ranks share the six examples of a global batch, so each has one or two."""
    resume_and_compare(LARGER, two_ranks, bench, tmp_path)
    for case in LARGER:
        assert_goes_on(case, bench)


def resume_and_compare(cases: list[Changed], two_ranks: Path, bench: Bench, folder: Path) -> None:
    """Resume ``cases`` and assert that they consume the rows of the uninterrupted run.

    All cases must resume on the same number of ranks.
    """
    world = cases[0][2]
    configs = [
        bench.config(f"changed-{method}-{stage}-{world}-{to_stage}", method, to_stage, world)
        for method, stage, _, to_stage in cases
    ]
    train_all(configs, bench.inputs, folder, credentials=bench.store.credentials)
    for index, (method, stage, _, _) in enumerate(cases):
        whole_rows = rows_consumed(two_ranks, 2 * CASES.index((method, stage)), 2)
        resumed = rows_consumed(folder, index, world)
        assert resumed == {step: rows for step, rows in whole_rows.items() if step > INTERRUPTED}


def assert_goes_on(changed_case: Changed, bench: Bench) -> None:
    """Assert that a run that was resumed with another number of ranks or ZeRO stage has the losses of the uninterrupted
    run."""
    method, stage, world, to_stage = changed_case
    case = f"{method}-{stage}-{world}-{to_stage}"
    whole, changed = bench.losses(f"whole-{method}-{stage}"), bench.losses(f"changed-{case}")
    assert sorted(changed) == list(range(1, STEPS + 1)), case
    first = INTERRUPTED + 1
    # The first loss after the resume is computed with the same weights. Only the order of summation may differ: on
    # another number of ranks, each rank adds up other examples before the ranks' sums are added.
    assert changed[first] == pytest.approx(whole[first], rel=1e-7), case
    worst = max(abs(changed[step] - whole[step]) / whole[step] for step in range(first, STEPS + 1))
    print(f"{case}: largest relative difference of a loss {worst:.2g}")
    for step in range(first, STEPS + 1):
        assert changed[step] == pytest.approx(whole[step], rel=1e-6), (case, step)


def test_a_checkpoint_of_adapters_holds_no_base_weight_and_names_its_base(two_ranks: Path, bench: Bench) -> None:
    prefix = f"runs/default/cut-lora-2/uid-1/{checkpoint_folder(1, INTERRUPTED)}"
    keys = bench.store.keys(prefix)
    sizes = {key.rpartition("/")[2]: len(bench.store.read(key)) for key in keys}
    assert all(name.endswith((".safetensors", ".json")) or name == "COMMIT" for name in sizes)
    state = TrainerState.model_validate_json(bench.store.read(f"{prefix}/trainer.json"))
    assert state.base_sha256 is not None
    trained = 2 * 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)  # Two layers, rank 4, seven matrices per layer.
    tensors = 12 * trained  # Each trained parameter has an fp32 weight and two fp32 moments of AdamW.
    held = sum(size for name, size in sizes.items() if name.startswith("state-"))
    assert tensors <= held <= tensors * 1.02 + 2 * 8192, "data, and the names of the tensors"
