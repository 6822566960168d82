"""Snapshots from fragments: the files have the same bytes as those from whole parameters, at every ZeRO stage and for
any number of ranks. The number of collectives follows from the bytes, and the memory is used again."""

from __future__ import annotations

import json
import math
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.contract import Outcome
from finetune_core.planning.host_needs import SNAPSHOTS
from finetune_trainer.engine.fragment_snapshot import ALIVE, SnapshotPlan
from finetune_trainer.engine.host_buffers import StagingRing, StateBuffers
from finetune_trainer.engine.state import STATE_KINDS, assign_owners
from finetune_trainer.pod.plan import Inputs
from tests.trainer import tiny
from tests.trainer.gangs import train_all
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.snapshots import PIECE_BYTES, STEPS
from tests.trainer.zygote import ends_of, zygote

CPU = torch.device("cpu")
PIECES = 2


# ---- Memory of the host ----


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 16), st.integers(1, 4))
def test_the_ring_copies_any_tensors_through_buffers_of_any_size(sizes: list[int], room: int, pieces: int) -> None:
    ring = StagingRing(room, device=CPU, pieces=pieces)
    for repetition in range(2):
        sources = [
            torch.arange(size, dtype=torch.float32) + 100 * index + repetition for index, size in enumerate(sizes)
        ]
        destinations = [torch.full_like(source, -1) for source in sources]
        for source, destination in zip(sources, destinations, strict=True):
            ring.copy(source, destination)
        ring.flush()
        assert all(map(torch.equal, sources, destinations))
    assert ring.allocated_bytes == 4 * room * pieces


def test_buffers_are_used_again_and_never_exceed_their_number() -> None:
    buffers = StateBuffers(10, count=2)
    addresses = set()
    for _ in range(5):
        first, second = buffers.acquire(), buffers.acquire()
        addresses |= {first.values.data_ptr(), second.values.data_ptr()}
        assert buffers.free == 0
        with pytest.raises(RuntimeError, match="all 2 buffers"):
            buffers.acquire()
        first.release()
        first.release()
        assert buffers.free == 1
        second.release()
        assert buffers.free == 2
    assert len(addresses) == 2
    assert buffers.allocated_bytes == 2 * 10 * 4


def test_the_plan_of_a_job_counts_as_many_snapshots_as_are_held() -> None:
    assert ALIVE == SNAPSHOTS


def test_a_buffer_is_allocated_when_it_is_needed() -> None:
    buffers = StateBuffers(10, count=2)
    assert buffers.allocated_bytes == 0
    buffers.acquire().release()
    buffers.acquire()
    assert buffers.allocated_bytes == 40


# ---- The plan ----

SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=8).map(
    lambda shapes: {f"layer.{number}": shape for number, shape in enumerate(shapes)}
)


@st.composite
def fragments_of_ranks(draw: st.DrawFn) -> tuple[dict[str, tuple[int, int]], list[dict[str, tuple[int, int]]]]:
    """Return shapes, and for each rank a contiguous part of every parameter, as DeepSpeed splits flat groups."""
    shapes, ranks = draw(SHAPES), draw(st.integers(1, 4))
    fragments: list[dict[str, tuple[int, int]]] = [{} for _ in range(ranks)]
    for name, shape in shapes.items():
        elements = math.prod(shape)
        cuts = sorted(draw(st.lists(st.integers(0, elements), min_size=ranks - 1, max_size=ranks - 1)))
        for rank, (begin, end) in enumerate(pairwise([0, *cuts, elements])):
            fragments[rank][name] = (begin, end - begin)
    return shapes, fragments


@given(fragments_of_ranks())
def test_every_element_of_every_parameter_is_stored_once(
    drawn: tuple[dict[str, tuple[int, int]], list[dict[str, tuple[int, int]]]],
) -> None:
    shapes, fragments = drawn
    plan, ranks = SnapshotPlan(shapes, fragments), range(len(fragments))
    for owner in ranks:
        covered = sorted(
            (part.destination, part.destination + part.length) for source in ranks for part in plan.parts(source, owner)
        )
        assert [begin for begin, _ in covered] == [0, *(end for _, end in covered)][: len(covered)]
        assert (covered[-1][1] if covered else 0) == plan.stored_elements(owner)
    stored = 3 * sum(math.prod(shape) for shape in shapes.values())
    assert sum(plan.stored_elements(owner) for owner in ranks) == stored
    assert sum(plan.elements(*pair) for pair in product(ranks, ranks)) == stored


@given(fragments_of_ranks())
def test_the_tensors_are_those_of_a_snapshot_of_whole_parameters(
    drawn: tuple[dict[str, tuple[int, int]], list[dict[str, tuple[int, int]]]],
) -> None:
    shapes, fragments = drawn
    plan, owners = SnapshotPlan(shapes, fragments), assign_owners(shapes, len(fragments))
    for rank in range(len(fragments)):
        tensors = plan.tensors(torch.zeros(plan.stored_elements(rank)), rank)
        own = [name for name in shapes if owners[name] == rank]
        assert list(tensors) == [f"{name}/{kind}" for name in own for kind in STATE_KINDS]
        assert {name: tuple(tensors[f"{name}/{STATE_KINDS[0]}"].shape) for name in own} == {
            name: shapes[name] for name in own
        }


def test_ranks_that_hold_everything_exchange_nothing() -> None:
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 2)}
    whole = {name: (0, math.prod(shape)) for name, shape in shapes.items()}
    assert SnapshotPlan(shapes, [whole] * 3).rounds(1) == 0


# ---- Real engines ----


def run(world: int, stage: int, precision: str, offload: str, model: Path, folder: Path) -> list[list[dict[str, Any]]]:
    """Run `snapshots.py` on ``world`` ranks, and return what each rank counted at each step."""
    arguments = [str(model), str(folder), str(stage), precision, offload]
    ranks = zygote().start_ranks("tests.trainer.snapshots", [arguments] * world, folder)
    logs = [folder / f"rank-{rank}.log" for rank in range(world)]
    assert ends_of(ranks) == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads(log.read_text().splitlines()[-1]) for log in logs]


@pytest.mark.gang
@pytest.mark.parametrize(
    ("world", "stage", "precision", "offload"),
    [
        (1, 0, "fp32", ""),
        (1, 1, "bf16", ""),
        (1, 2, "bf16", ""),
        (2, 0, "fp32", ""),
        (2, 1, "bf16", ""),
        (3, 2, "bf16", ""),
        (2, 2, "fp32", "offload"),
        (3, 3, "bf16", ""),
        (2, 3, "fp32", "offload"),
    ],
)
def test_the_files_have_the_same_bytes(
    world: int, stage: int, precision: str, offload: str, tiny_model: Path, tmp_path: Path
) -> None:
    counted = run(world, stage, precision, offload, tiny_model, tmp_path)
    whole, fragments = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
        for name in ("whole", "fragments")
    )
    assert len(whole) == (1 + STEPS) * world
    assert fragments == whole
    assert len(set(whole.values())) == len(whole), "each step changes the training state"
    for steps in counted:
        for step in steps:
            assert step["first"] <= 1
            assert step["fragments"] == step["rounds"]
            if world == 1 or stage == 0:
                assert step["fragments"] == 0
            else:
                assert step["whole"] == 3 * step["parameters"]
                # A rank holds an equal share of the state. At worst it sends its whole share to one other rank, for
                # which the buffers of the device have an equal share of their room.
                assert step["fragments"] <= 1 + sum(each[0]["stored"] for each in counted) / PIECE_BYTES
            assert step["allocated"] == step["stored"] + PIECES * PIECE_BYTES
        # The memory of the host is used again. Only the buffers of a round are new.
        assert all(step["largest"] <= PIECE_BYTES for step in steps)


@pytest.mark.gang
def test_the_checkpoints_of_a_job_have_the_bytes_of_whole_parameters(
    store: ObjectStore, tiny_model: Path, tmp_path: Path
) -> None:
    """Each step is saved, so the memory of the snapshots is used again. With memory for a single snapshot, the next one
    waits until the files of the one before are written, or takes its place."""
    inputs = Inputs(model=tiny_model, train=tiny.write_jsonl(tmp_path / "train.jsonl", tiny.rows(20, seed=1)))
    kinds: dict[str, dict[str, Any]] = {
        "lora-2": {"method": "LoRA", "optimization__zeroStage": 2},
        "full-3": {"method": "Full", "optimization__zeroStage": 3, "optimization__precision": "bf16"},
    }
    hows: dict[str, dict[str, Any] | None] = {
        "fragments": None,
        "single": {"kind": "alive", "count": 1},
        "whole": {"kind": "whole"},
    }
    names = [(kind, how) for kind in kinds for how in hows]
    configs = [
        run_config(
            store,
            f"{kind}-{how}",
            dataset__validation=None,
            optimization__maxSteps=6,
            storage__checkpointEverySteps=1,
            storage__keepLast=6,
            **kinds[kind],
        )
        for kind, how in names
    ]
    faults = [hows[how] for _, how in names]
    results = train_all(configs, inputs, tmp_path, credentials=store.credentials, faults=faults)
    assert [result.outcome for result in results] == [Outcome.COMPLETED] * len(names)

    def states(kind: str, how: str) -> dict[str, bytes]:
        root = f"runs/default/{kind}-{how}/uid-1/checkpoints/"
        return {key.removeprefix(root): store.read(key) for key in store.keys(root) if key.endswith(".safetensors")}

    for kind in kinds:
        whole = states(kind, "whole")
        assert len(whole) >= 2 * 2, "two ranks saved the last step, and one before it"
        for how in ("fragments", "single"):
            found = states(kind, how)
            common = found.keys() & whole.keys()
            assert {key for key in common if "-000000006/" in key}
            assert {key: found[key] for key in common} == {key: whole[key] for key in common}
