"""Scripted faults of a training run.

A fault is injected inside a rank by patching the trainer, for example wrong targets, a learning rate that is too high,
an infinite gradient or a kill. A learning rate that is too high returns to normal after a rollback, as if the lower
rate of the rollback had been the cure.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from finetune_core.contract import Phase
from finetune_trainer import loop, train
from finetune_trainer.checkpoints import saver as saving
from finetune_trainer.data.batches import IGNORED
from finetune_trainer.data.micro_batches import MicroBatcher, MicroBatchPlan
from finetune_trainer.decisions import schedule
from finetune_trainer.engine.engine import Engine
from finetune_trainer.engine.fragment_snapshot import FragmentSnapshots, HeldSnapshot
from finetune_trainer.engine.host_buffers import StateBuffer
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.engine.plain_engine import PlainEngine
from finetune_trainer.engine.state import load_state, take_snapshot
from finetune_trainer.evaluation.scorer import Scorer
from finetune_trainer.pod.errors import StopAgreed
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.reporting.progress import Progress
from finetune_trainer.storage.root import RunRoot
from tests.trainer.call_order import recorded_calls


@contextmanager
def scripted(fault: dict[str, Any] | None) -> Iterator[None]:
    """Inject ``fault`` into the trainer while the block runs.

    A fault is a dictionary of one of the kinds below. A rank that is "told to stop" behaves as if it had received
    SIGTERM.

    - {"kind": "noise", "step": s, "share": p, "growth": g, "steps": n} replaces the share p of the targets by random
      words during n steps, beginning with step s; the share grows by g with each step
    - {"kind": "rate", "step": s, "factor": f} multiplies the learning rate by f from step s until a rollback
    - {"kind": "gradient", "step": s} makes the gradients of one backward pass in step s infinite
    - {"kind": "stop", "step": s} stops all ranks before step s
    - {"kind": "told", "step": s, "rank": r}: rank r is told to stop during the evaluation after step s
    - {"kind": "phase", "phase": p}: rank 0 is told to stop at the beginning of phase p
    - {"kind": "budget", "seconds": s} sets the time budget of background uploads
    - {"kind": "alive", "count": n} lets a rank hold at most n snapshots at once
    - {"kind": "whole"} takes all snapshots from whole parameters, which every rank gathers
    - {"kind": "calls", "folder": f} changes nothing, and writes the order of the calls of rank r to `calls-r.jsonl` in
      the folder f, see `call_order.py`
    - {"kind": "late", "pipe": p}: of two ranks, rank 1 reads the training state of the fetched checkpoint only after
      rank 0 has read it and has then deleted the checkpoint, or begun to wait for rank 1; p is a named pipe
    - {"kind": "both", "faults": [a, b]} injects the faults a and b
    - {"kind": "kill", "rank": r, "point": p, "count": n} kills rank r when it reaches point p of `POINTS` or
      `LATER_POINTS` for the n-th time; at the point `upload` the kill follows "delay" seconds later (0 if not given)
    """
    if fault is None:
        yield
        return
    patches = {
        "noise": _noise,
        "rate": _rate,
        "gradient": _gradient,
        "stop": _stop,
        "told": _told,
        "phase": _phase,
        "budget": _budget,
        "kill": _kill,
        "both": _both,
        "calls": _calls,
        "alive": _alive,
        "whole": _whole,
        "late": _late,
    }
    patch = patches[fault["kind"]]
    with patch(fault):
        yield


POINTS = ("accumulation", "snapshot", "upload", "manifest", "commit", "committed", "retention")
"""Points at which a rank can be killed, in the order of a step and its checkpoint.

Their meanings, in the same order: before a backward pass; before this rank's part of a tensor is read for a snapshot;
during the upload of a file; before the manifest is written; before COMMIT is written; after COMMIT but before the run
has recorded the checkpoint; before a deletion by retention. Retention deletes twice per checkpoint: first COMMIT, then
all other files.
"""
LATER_POINTS = ("evaluation", "artifact", "published")
"""Further points at which a rank can be killed. `evaluation` is before the perplexity of a set of rows is computed, in
a job with validation rows. `artifact` and `published` are at the end of a job, before and after `ARTIFACT` is written.
"""


def _kill(fault: dict[str, Any]) -> Any:
    """Return a patch that kills the rank with SIGKILL when the rank reaches the fault's point for the n-th time."""
    point, left = fault["point"], itertools.count(fault["count"] - 1, -1)

    def die() -> None:
        if int(os.environ["RANK"]) == fault["rank"] and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def soon() -> None:
        if int(os.environ["RANK"]) == fault["rank"] and next(left) == 0:
            threading.Timer(fault.get("delay", 0.0), os.kill, (os.getpid(), signal.SIGKILL)).start()

    def patched(owner: type, name: str, suffix: str, *, after: bool = False, act: Any = die) -> Any:
        made = getattr(owner, name)

        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            hit = not suffix or str(arguments[0]).endswith(suffix)
            if hit and not after:
                act()
            answer = made(self, *arguments, **options)
            if hit and after:
                act()
            return answer

        return mock.patch.object(owner, name, call)

    def in_both(name: str) -> Any:
        """Return a patch of the function ``name`` of both engines, of which the run uses one."""
        stack = ExitStack()
        for engine in (Engine, PlainEngine):
            stack.enter_context(patched(engine, name, ""))
        return stack

    return {
        "accumulation": lambda: in_both("backward"),
        "snapshot": lambda: in_both("read_fragment"),
        "upload": lambda: patched(RunRoot, "upload", "", act=soon),
        "manifest": lambda: patched(RunRoot, "write", "/manifest.json"),
        "commit": lambda: patched(RunRoot, "create", "/COMMIT"),
        "committed": lambda: patched(RunRoot, "create", "/COMMIT", after=True),
        "retention": lambda: patched(RunRoot, "delete", ""),
        "evaluation": lambda: patched(Scorer, "perplexity", ""),
        "artifact": lambda: patched(RunRoot, "create", "ARTIFACT"),
        "published": lambda: patched(RunRoot, "create", "ARTIFACT", after=True),
    }[point]()


@contextmanager
def _both(fault: dict[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in fault["faults"]:
            stack.enter_context(scripted(each))
        yield


def _calls(fault: dict[str, Any]) -> Any:
    return recorded_calls(Path(fault["folder"]) / f"calls-{os.environ['RANK']}.jsonl")


def _alive(fault: dict[str, Any]) -> Any:
    return mock.patch.object(saving, "most_alive", return_value=fault["count"])


def _whole(_: dict[str, Any]) -> Any:
    def take(self: FragmentSnapshots) -> HeldSnapshot:
        tensors = take_snapshot(cast(TrainingEngine, self._engine), rank=self._rank, world_size=self._world_size)
        return HeldSnapshot(tensors, StateBuffer(torch.empty(0), lambda _: None))

    return mock.patch.object(FragmentSnapshots, "take", take)


@contextmanager
def _late(fault: dict[str, Any]) -> Iterator[None]:
    pipe, is_late = Path(fault["pipe"]), os.environ["RANK"] == "1"
    load, remove, wait = load_state, shutil.rmtree, Gang._wait_for_rank
    now = {"loaded": False, "told": False}

    def late_load(engine: TrainingEngine, folder: Path, *, updates: int) -> None:
        if is_late:
            # Opening a named pipe blocks until another process opens its other end.
            pipe.read_bytes()
        load(engine, folder, updates=updates)
        now["loaded"] = not is_late

    def tell() -> None:
        if now["loaded"] and not now["told"]:
            now["told"] = True
            pipe.write_bytes(b"")

    def removed(*arguments: Any, **options: Any) -> None:
        remove(*arguments, **options)
        tell()

    def waiting(self: Gang, key: str, rank: int) -> str:
        tell()
        return wait(self, key, rank)

    with (
        mock.patch.object(train, "load_state", late_load),
        mock.patch.object(shutil, "rmtree", removed),
        mock.patch.object(Gang, "_wait_for_rank", waiting),
    ):
        yield


def _budget(fault: dict[str, Any]) -> Any:
    return mock.patch.object(saving, "BACKGROUND_BUDGET_SECONDS", fault["seconds"])


def _stop(fault: dict[str, Any]) -> Any:
    made = loop.TrainingLoop._train_step

    def one_step(self: loop.TrainingLoop, step: int) -> Any:
        if step >= fault["step"]:
            raise StopAgreed
        return made(self, step)

    return mock.patch.object(loop.TrainingLoop, "_train_step", one_step)


@contextmanager
def _told(fault: dict[str, Any]) -> Iterator[None]:
    evaluate, now = loop.TrainingLoop._evaluate, {"told": False}

    def told_meanwhile(self: loop.TrainingLoop, validation: Any) -> Any:
        now["told"] = self.step == fault["step"] and self._gang.rank == fault["rank"]
        return evaluate(self, validation)

    def told(_: Gang) -> bool:
        return now["told"]

    with (
        mock.patch.object(loop.TrainingLoop, "_evaluate", told_meanwhile),
        mock.patch.object(Gang, "stop_requested", told),
    ):
        yield


@contextmanager
def _phase(fault: dict[str, Any]) -> Iterator[None]:
    begin, now = Progress.phase, {"told": False}

    def phase(self: Progress, phase: Phase) -> None:
        now["told"] = now["told"] or phase.value == fault["phase"]
        begin(self, phase)

    def told(_: Gang) -> bool:
        return now["told"]

    with mock.patch.object(Progress, "phase", phase), mock.patch.object(Gang, "stop_requested", told):
        yield


@contextmanager
def recorded(file: Path) -> Iterator[None]:
    """Write the numbers of the rows that this rank trains on to ``file`` while the block runs, as one JSON line per
    step."""
    train_on = loop.TrainingLoop._accumulate_gradient

    def step(self: loop.TrainingLoop, number: int, plan: MicroBatchPlan) -> Any:
        own = [row for micro in plan.micro_batches for sequence in micro for row in sequence]
        with file.open("a") as lines:
            print(json.dumps({"step": number, "own": own}), file=lines)
        return train_on(self, number, plan)

    with mock.patch.object(loop.TrainingLoop, "_accumulate_gradient", step):
        yield


def _noise(fault: dict[str, Any]) -> Any:
    made = MicroBatcher.tensors

    def tensors(self: MicroBatcher, share: Any, *, step: int = 0) -> Iterator[Any]:
        for batch in made(self, share, step=step):
            late = step - fault["step"]
            if not 0 <= late < fault["steps"]:
                yield batch
                continue
            part = min(1.0, fault["share"] + late * fault["growth"])
            generator = torch.Generator().manual_seed(1000 * step + self.rank)
            hit = torch.rand(batch.targets.shape, generator=generator) < part
            wrong = torch.randint(4, 60, batch.targets.shape, generator=generator)
            yield batch._replace(targets=torch.where(hit & (batch.targets != IGNORED), wrong, batch.targets))

    return mock.patch.object(MicroBatcher, "tensors", tensors)


def _rate(fault: dict[str, Any]) -> Any:
    def rate(step: int, total: int, optimization: Any, rollbacks: Any = ()) -> float:
        factor = fault["factor"] if step >= fault["step"] and not rollbacks else 1.0
        return schedule.learning_rate_at(step, total, optimization, rollbacks) * factor

    return mock.patch.object(loop, "learning_rate_at", rate)


@contextmanager
def _gradient(fault: dict[str, Any]) -> Iterator[None]:
    step_of = loop.TrainingLoop._train_step
    now: dict[str, Any] = {"step": 0, "done": False}

    def one_step(self: loop.TrainingLoop, step: int) -> Any:
        now["step"] = step
        return step_of(self, step)

    def with_infinite_loss(backward: Any) -> Any:
        def infinite(self: TrainingEngine, loss: torch.Tensor, *, last: bool) -> None:
            if now["step"] == fault["step"] and not now["done"]:
                now["done"] = True
                loss = loss * float("inf")
            backward(self, loss, last=last)

        return infinite

    with (
        mock.patch.object(loop.TrainingLoop, "_train_step", one_step),
        mock.patch.object(Engine, "backward", with_infinite_loss(Engine.backward)),
        mock.patch.object(PlainEngine, "backward", with_infinite_loss(PlainEngine.backward)),
    ):
        yield
