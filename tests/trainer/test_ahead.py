"""What is made ahead is what would be made later: the same micro-batches in the same order, one at most."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from finetune_core.contract import OptimizationConfig
from finetune_trainer.data.ahead import MicroBatchesAhead
from finetune_trainer.data.batches import Batch, collate
from finetune_trainer.data.examples import Example, example_set
from finetune_trainer.data.micro_batches import MicroBatcher
from finetune_trainer.engine.host_copy import HostCopy
from finetune_trainer.reporting.meter import BACKWARD, DATA, FORWARD, PARTS, UPDATE, Stopwatch

CPU = torch.device("cpu")
ROWS = 11


def optimization(*, global_batch: int = 4, micro: int = 2) -> OptimizationConfig:
    return OptimizationConfig(
        learning_rate=1e-3,
        max_steps=20,
        global_batch_size=global_batch,
        micro_batch_size=micro,
        schedule="Constant",
        warmup_steps=0,
        weight_decay=0.0,
        gradient_clipping=1.0,
        precision="fp32",
        gradient_checkpointing=False,
        seed=7,
        zero_stage=None,
    )


def micro_batcher(*, rank: int = 0, world: int = 1, capacity: int | None = None) -> MicroBatcher:
    examples = [Example(list(range(3, 3 + 2 + row % 5)), [(1, 2 + row % 5)]) for row in range(ROWS)]
    return MicroBatcher(example_set(examples), rank=rank, world_size=world, pad=0, capacity=capacity, seed=7)


def ahead(steps: Sequence[int], batches: MicroBatcher | None = None, **sizes: int) -> MicroBatchesAhead:
    return MicroBatchesAhead(batches or micro_batcher(), steps, optimization(**sizes), CPU)


def values(batch: Batch) -> list[Any]:
    return [value.tolist() if isinstance(value, torch.Tensor) else value for value in batch]


@given(
    steps=st.sets(st.integers(1, 12), min_size=1, max_size=5).map(sorted),
    global_batch=st.integers(1, 7),
    micro=st.integers(1, 4),
    rank_of=st.sampled_from([(0, 1), (0, 2), (1, 2), (2, 3)]),
    capacity=st.sampled_from([None, 16]),
    early=st.lists(st.integers(0, 2), min_size=40, max_size=40),
)
def test_the_micro_batches_are_those_of_each_step_by_itself_whenever_they_are_made(
    steps: list[int],
    global_batch: int,
    micro: int,
    rank_of: tuple[int, int],
    capacity: int | None,
    early: list[int],
) -> None:
    """``steps`` lack some numbers, as after a rollback. ``early`` says how often `make_next` is called before each
    micro-batch is taken."""
    batches = micro_batcher(rank=rank_of[0], world=rank_of[1], capacity=capacity)
    sizes = optimization(global_batch=global_batch, micro=micro)
    made = MicroBatchesAhead(batches, steps, sizes, CPU)
    calls = iter(early * 4)
    for step in steps:
        plan = batches.plan_step(step, sizes)
        assert made.plan(step) == plan
        for wanted in batches.tensors(plan, step=step):
            for _ in range(next(calls)):
                made.make_next()
            assert values(made.take(step)) == values(wanted)
    made.make_next()
    with pytest.raises(ValueError, match=f"of step {steps[-1]} was asked for, and the next one is none"):
        made.take(steps[-1])


def test_a_micro_batch_is_never_taken_for_another_step() -> None:
    made = ahead([2, 4], global_batch=2, micro=2)
    made.make_next()
    with pytest.raises(ValueError, match="of step 1 was asked for, and the next one is one of step 2"):
        made.take(1)
    made.take(2)
    with pytest.raises(ValueError, match="of step 2 was asked for, and the next one is one of step 4"):
        made.plan(2)
    made.take(4)


class Counting(MicroBatcher):
    """Counts the micro-batches that were made."""

    def tensors(self, plan: Any, *, step: int = 0) -> Iterator[Batch]:
        for batch in super().tensors(plan, step=step):
            COUNTED.append(step)
            yield batch


COUNTED: list[int] = []


def test_one_micro_batch_is_made_ahead_and_none_before_it_is_asked_for() -> None:
    COUNTED.clear()
    plain = micro_batcher()
    made = ahead([1, 2], Counting(plain.examples, rank=0, world_size=1, pad=0, capacity=None, seed=7))
    assert COUNTED == []
    made.plan(1)
    made.make_next()
    made.make_next()
    assert COUNTED == [1]
    made.take(1)
    assert COUNTED == [1]
    made.make_next()
    assert COUNTED == [1, 1]
    made.take(1)
    made.make_next()
    assert COUNTED == [1, 1, 2]


def test_a_micro_batch_that_was_taken_is_kept_by_nobody_else() -> None:
    made = ahead([1, 2])
    taken = weakref.ref(made.take(1).input_ids)
    gc.collect()
    assert taken() is None


class Cuda(TorchFunctionMode):  # type: ignore[misc]  # torch has no types here
    """Stands for a machine with a GPU: notes which tensors are pinned and copied, and leaves them where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, dict[str, Any]]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("pin_memory", "to"):
            self.calls.append((name, id(args[0]), dict(kwargs or {})))
            # The pinned copy is another tensor.
            return args[0].clone() if name == "pin_memory" else args[0]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_every_tensor_goes_to_a_gpu_from_pinned_memory_without_a_wait(packed: bool) -> None:
    batch = collate([[(Example([3, 4, 5], [(1, 3)]), 1)]], pad=0, packed=packed)
    tensors = [value for value in batch if isinstance(value, torch.Tensor)]
    with Cuda() as cuda:
        moved = batch.to(torch.device("cuda"))
    copied = [value for value in moved if isinstance(value, torch.Tensor)]
    assert [name for name, _, _ in cuda.calls] == ["pin_memory", "to"] * len(tensors)
    assert [where for name, where, _ in cuda.calls if name == "pin_memory"] == [id(tensor) for tensor in tensors]
    assert [where for name, where, _ in cuda.calls if name == "to"] == [id(tensor) for tensor in copied]
    assert all(options == {"non_blocking": True} for name, _, options in cuda.calls if name == "to")
    assert values(moved) == values(batch)


def test_on_the_cpu_nothing_is_copied() -> None:
    batch = collate([[(Example([3, 4, 5], [(1, 3)]), 1)]], pad=0, packed=True)
    assert all(new is old for new, old in zip(batch.to(CPU), batch, strict=True))


def test_a_number_is_read_as_it_was_when_its_copy_was_issued() -> None:
    total = torch.tensor(0.1, dtype=torch.float64) + torch.tensor(0.2)
    assert HostCopy(total).read() == float(total)


class Event:
    """Stands for a CUDA event of a machine with a GPU: ``DONE`` is the time until which the GPU has computed."""

    ISSUED = 0.0
    DONE = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self._time: float | None = None

    def record(self) -> None:
        Event.ISSUED += 250.0
        self._time = Event.ISSUED

    def query(self) -> bool:
        return self._time is not None and self._time <= Event.DONE

    def elapsed_time(self, last: Event) -> float:
        assert self.query(), "CUDA raises an error where the GPU has not come to the event"
        assert last.query(), "CUDA raises an error where the GPU has not come to the event"
        assert self._time is not None
        assert last._time is not None
        return last._time - self._time


def test_the_update_that_a_gpu_still_computes_counts_in_the_next_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The events have no function that waits, so a call of one would fail."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.ISSUED = Event.DONE = 0.0
    watch = Stopwatch(torch.device("cuda"))

    def step() -> None:
        for part in (DATA, FORWARD, BACKWARD):
            with watch.part(part):
                pass
        Event.DONE = Event.ISSUED
        with watch.part(UPDATE):
            pass

    step()
    first = watch.take()
    assert (first[FORWARD], first[BACKWARD], first[UPDATE]) == (0.25, 0.25, 0.0)
    assert first[DATA] > 0
    step()
    second = watch.take()
    assert (second[FORWARD], second[BACKWARD], second[UPDATE]) == (0.25, 0.25, 0.25)
    Event.DONE = Event.ISSUED
    assert watch.take() == dict.fromkeys(PARTS, 0.0) | {UPDATE: 0.25}
