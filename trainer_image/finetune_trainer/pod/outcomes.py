"""How each worker ended, and what the pod's result is made of them.

A worker writes `outcome-<rank>.json` before it leaves; the launcher reads these files and its children's exit
status and decides with a pure function, because exit status alone hides why (a lost peer looks like a crash).
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_core.contract import ContractModel, Outcome, Phase, Result
from finetune_core.errors import UserError
from finetune_trainer.pod.errors import Diverged, OutOfMemory, OutsideFailure, PeerLost, Stopped

PRECEDENCE: Sequence[Outcome] = (
    Outcome.BAD_INPUT,
    Outcome.DIVERGED,
    Outcome.OUT_OF_MEMORY,
    Outcome.CRASHED,
    Outcome.OUTSIDE_FAILURE,
    Outcome.STOPPED,
    Outcome.EARLY_STOPPED,
    Outcome.COMPLETED,
)
"""Which outcome of several decides: a cause before its consequences."""


class WorkerOutcome(ContractModel):
    """Content of `outcome-<rank>.json`."""

    result: Result
    caused_by_peer: bool = False
    """The worker left because another one did."""


@dataclass
class WorkerStatus:
    """How far this process has come: what a result says beside the outcome. The loop keeps it current."""

    step: int = 0
    """Last step whose update was applied."""
    checkpoint: str | None = None
    """Address of the newest committed checkpoint."""
    phase: str = Phase.LOADING.value
    """What the process is doing."""

    def where(self) -> str:
        """Return the part of a sentence that says how far the process was."""
        return f"in phase {self.phase}, after step {self.step}" if self.step else f"in phase {self.phase}"


@dataclass(frozen=True)
class WorkerEnd:
    """How one worker process ended."""

    rank: int
    status: int
    """Exit status; negative is the signal that ended it."""
    outcome: WorkerOutcome | None
    ended_by_launcher: bool = False
    """The launcher killed it because it did not follow the others."""
    frozen: bool = False
    """The launcher killed it because it gave no sign of life any more."""
    last_seen: str = ""
    """What it was doing: `in phase Training, after step 12`."""


def outcome_file(folder: Path, rank: int) -> Path:
    """Return the file that worker ``rank`` writes."""
    return folder / f"outcome-{rank}.json"


def write_outcome(folder: Path, rank: int, outcome: WorkerOutcome) -> None:
    """Write the outcome of worker ``rank``, whole or not at all."""
    path = outcome_file(folder, rank)
    temporary = path.with_suffix(".part")
    temporary.write_text(outcome.to_json())
    temporary.replace(path)


def read_outcome(folder: Path, rank: int) -> WorkerOutcome | None:
    """Return the outcome of worker ``rank``, None where it left none."""
    path = outcome_file(folder, rank)
    return WorkerOutcome.model_validate_json(path.read_text()) if path.is_file() else None


def write_sign_of_life(folder: Path, rank: int, status: WorkerStatus) -> None:
    """Note that worker ``rank`` is not frozen, and how far it is: all that is left of one that is killed."""
    path = folder / f"alive-{rank}"
    temporary = path.with_suffix(".part")
    temporary.write_text(status.where())
    temporary.replace(path)


def read_sign_of_life(folder: Path, rank: int) -> tuple[str, float] | None:
    """Return what worker ``rank`` was doing and when (seconds since the epoch), None before its first sign."""
    path = folder / f"alive-{rank}"
    try:
        return path.read_text(), path.stat().st_mtime
    except FileNotFoundError:
        return None


def outcome_of(error: BaseException, *, step: int = 0, checkpoint: str | None = None) -> WorkerOutcome:
    """Return the outcome that an exception stands for; anything unknown is a crash.

    Only the class and message of a crash get into the result: the traceback goes to the log.
    """
    kinds: Sequence[tuple[type[BaseException] | tuple[type[BaseException], ...], Outcome]] = (
        (UserError, Outcome.BAD_INPUT),
        (Diverged, Outcome.DIVERGED),
        ((OutOfMemory, MemoryError), Outcome.OUT_OF_MEMORY),
        (OutsideFailure, Outcome.OUTSIDE_FAILURE),
        (Stopped, Outcome.STOPPED),
    )
    kind = next((outcome for type_, outcome in kinds if isinstance(error, type_)), Outcome.CRASHED)
    message = f"{type(error).__name__}: {error}" if kind is Outcome.CRASHED else str(error)
    result = Result(outcome=kind, message=message, step=step, checkpoint=checkpoint)
    return WorkerOutcome(result=result, caused_by_peer=isinstance(error, PeerLost))


def _judge(end: WorkerEnd, *, out_of_memory: bool, memory_limit: int | None) -> WorkerOutcome:
    """Return a worker's outcome, from its exit status where it left no file."""
    if end.outcome is not None:
        return end.outcome
    if end.ended_by_launcher:
        message = f"rank {end.rank} did not follow the others and was ended"
        return WorkerOutcome(result=Result(outcome=Outcome.OUTSIDE_FAILURE, message=message), caused_by_peer=True)
    if end.frozen:
        message = f"rank {end.rank} gave no sign of life any more {end.last_seen}: it or its node was frozen"
        return WorkerOutcome(result=Result(outcome=Outcome.OUTSIDE_FAILURE, message=message))
    if end.status == -signal.SIGKILL and out_of_memory:
        limit = f" of {memory_limit / 2**30:.2f} GiB" if memory_limit else ""
        where = f" {end.last_seen}" if end.last_seen else ""
        message = (
            f"out of memory: rank {end.rank} was killed{where} because the pod reached its memory limit{limit}: raise"
            " resources.memory, or lower training.microBatchSize or dataset.maxLength"
        )
        return WorkerOutcome(result=Result(outcome=Outcome.OUT_OF_MEMORY, message=message))
    how = f"was ended by signal {-end.status}" if end.status < 0 else f"exited with {end.status}"
    message = f"rank {end.rank} {how} and left no reason; its log has the details"
    return WorkerOutcome(result=Result(outcome=Outcome.CRASHED, message=message))


def decide(ends: Sequence[WorkerEnd], *, out_of_memory: bool, memory_limit: int | None = None) -> Result:
    """Return the pod's result from the ends of its workers.

    ``out_of_memory`` says that the cgroup's `oom_kill` rose while they ran, ``memory_limit`` is its limit in bytes.
    The order is `PRECEDENCE`; what a peer caused decides only where there is nothing else.
    """
    judged = [_judge(end, out_of_memory=out_of_memory, memory_limit=memory_limit) for end in ends]
    own = [outcome for outcome in judged if not outcome.caused_by_peer] or judged
    return min(own, key=lambda outcome: PRECEDENCE.index(outcome.result.outcome)).result
