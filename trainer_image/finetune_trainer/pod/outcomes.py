"""Outcome files and heartbeats of the worker processes, and how the launcher derives the result of the pod from them.

A worker writes `outcome-<rank>.json` before it exits. The launcher needs these files besides the exit statuses, because
an exit status has no message, and the exit code 75 does not tell whether a worker failed by itself or only lost another
rank.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_core.contract import EXIT_CODES, ContractModel, ExitCode, Outcome, Phase, Result
from finetune_core.errors import UserError
from finetune_trainer.pod.errors import Diverged, NodeFault, OutOfMemory, OutsideFailure, PeerLost, Stopped

PRECEDENCE: Sequence[Outcome] = (
    Outcome.BAD_INPUT,
    Outcome.DIVERGED,
    Outcome.OUT_OF_MEMORY,
    Outcome.CRASHED,
    Outcome.OUTSIDE_FAILURE,
    Outcome.STOPPED,
    Outcome.GATE_FAILED,
    Outcome.EARLY_STOPPED,
    Outcome.COMPLETED,
)
"""The first of these outcomes that any worker has becomes the outcome of the pod. Likely causes come before their
consequences. `result_of_pod` leaves out workers that ended only because of another worker, unless all ended so.
"""

_OUTCOMES: Mapping[int, Outcome] = {code: kind for kind, code in EXIT_CODES.items() if code != ExitCode.DONE}
"""Outcomes by exit code. A worker that can't write its outcome, because the disk is full, still exits with its code."""


class WorkerOutcome(ContractModel):
    """Content of `outcome-<rank>.json`, which a worker writes before it exits."""

    result: Result
    caused_by_peer: bool = False
    """Whether the worker ended only because another worker had ended or stalled."""


@dataclass
class WorkerStatus:
    """How far this worker process has come. `train.py` and `loop.py` update the fields, and the worker's result and
    heartbeats report them."""

    step: int = 0
    """Last finished optimizer step; 0 before the first. Steps whose global batch was left out are included."""
    checkpoint: str | None = None
    """Address of the newest committed checkpoint: `s3://bucket/runs/default/demo/uid/checkpoints/000001-000000120`."""
    phase: str = Phase.LOADING.value
    """What the worker does at the moment, a value of `finetune_core.contract.Phase` such as `Training`."""

    def where(self) -> str:
        """Return phase and step as part of a sentence: `in phase Training, after step 12`."""
        return f"in phase {self.phase}, after step {self.step}" if self.step else f"in phase {self.phase}"


@dataclass(frozen=True)
class WorkerExit:
    """How one worker process exited."""

    rank: int
    status: int
    """Exit status of the process. A negative value means that a signal killed the process: -9 is signal 9 (SIGKILL)."""
    outcome: WorkerOutcome | None
    killed_by_launcher: bool = False
    """Whether the launcher killed the worker because it did not exit in time after another worker had exited."""
    frozen: bool = False
    """Whether the launcher killed the worker because its heartbeats had stopped."""
    last_seen: str = ""
    """Text of the worker's last heartbeat: `in phase Training, after step 12`."""


def outcome_file(folder: Path, rank: int) -> Path:
    """Return the path of the outcome file that worker ``rank`` writes."""
    return folder / f"outcome-{rank}.json"


def _heartbeat_file(folder: Path, rank: int) -> Path:
    return folder / f"heartbeat-{rank}"


def _write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that nobody can read an unfinished file."""
    temporary = path.with_suffix(".part")
    temporary.write_text(text)
    temporary.replace(path)


def write_outcome(folder: Path, rank: int, outcome: WorkerOutcome) -> None:
    """Write the outcome file of worker ``rank``."""
    _write_atomically(outcome_file(folder, rank), outcome.to_json())


def read_outcome(folder: Path, rank: int) -> WorkerOutcome | None:
    """Return what worker ``rank`` wrote into its outcome file, or None if it wrote none."""
    path = outcome_file(folder, rank)
    return WorkerOutcome.model_validate_json(path.read_text()) if path.is_file() else None


def write_heartbeat(folder: Path, rank: int, status: WorkerStatus) -> None:
    """Write the heartbeat of worker ``rank``: a file whose age shows whether the worker is alive, and whose text shows
    how far the worker has come. The text is all that is known about a worker that gets killed."""
    _write_atomically(_heartbeat_file(folder, rank), status.where())


def read_heartbeat(folder: Path, rank: int) -> tuple[str, float] | None:
    """Return text and time (seconds since 1970) of the last heartbeat of worker ``rank``, or None before the
    first one."""
    path = _heartbeat_file(folder, rank)
    try:
        return path.read_text(), path.stat().st_mtime
    except FileNotFoundError:
        return None


def outcome_of(error: BaseException, *, step: int = 0, checkpoint: str | None = None, phase: str = "") -> WorkerOutcome:
    """Return the outcome of a worker, or of the launcher, that ``error`` ended. Exceptions that this function does not
    know are crashes. ``phase`` is what it did then, a value of `finetune_core.contract.Phase`; empty where that is not
    known.

    The message of a crash is only the class and message of the exception. The caller prints the traceback to the log.
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
    is_node_fault = True if isinstance(error, NodeFault) else None
    result = Result(
        outcome=kind,
        message=message,
        step=step,
        checkpoint=checkpoint,
        node_fault=is_node_fault,
        phase=Phase(phase) if phase and kind is Outcome.OUT_OF_MEMORY else None,
    )
    return WorkerOutcome(result=result, caused_by_peer=isinstance(error, PeerLost))


def _worker_outcome(worker: WorkerExit, *, out_of_memory: bool, memory_limit: int | None) -> WorkerOutcome:
    """Return the outcome that a worker wrote. If the worker wrote none, derive the outcome from how the process
    exited."""
    if worker.outcome is not None:
        return worker.outcome
    if worker.killed_by_launcher:
        message = f"rank {worker.rank} did not follow the others and was ended"
        return WorkerOutcome(result=Result(outcome=Outcome.OUTSIDE_FAILURE, message=message), caused_by_peer=True)
    if worker.frozen:
        message = f"rank {worker.rank} gave no sign of life any more {worker.last_seen}: it or its node was frozen"
        return WorkerOutcome(result=Result(outcome=Outcome.OUTSIDE_FAILURE, message=message))
    if worker.status == -signal.SIGKILL and out_of_memory:
        limit = f" of {memory_limit / 2**30:.2f} GiB" if memory_limit else ""
        where = f" {worker.last_seen}" if worker.last_seen else ""
        message = (
            f"out of memory: rank {worker.rank} was killed{where} because the pod reached its memory limit{limit}:"
            " raise resources.memory, or lower training.microBatchSize or dataset.maxLength"
        )
        phase = _phase_in(worker.last_seen)
        return WorkerOutcome(result=Result(outcome=Outcome.OUT_OF_MEMORY, message=message, phase=phase))
    how = f"was ended by signal {-worker.status}" if worker.status < 0 else f"exited with {worker.status}"
    message = f"rank {worker.rank} {how} and left no reason; its log has the details"
    return WorkerOutcome(result=Result(outcome=_OUTCOMES.get(worker.status, Outcome.CRASHED), message=message))


def _phase_in(last_seen: str) -> Phase | None:
    """Return the phase that the text of a heartbeat names (`WorkerStatus.where`); None where there is none."""
    return next((phase for phase in Phase if last_seen.startswith(WorkerStatus(phase=phase.value).where())), None)


def result_of_pod(exits: Sequence[WorkerExit], *, out_of_memory: bool, memory_limit: int | None = None) -> Result:
    """Return the result of the pod: of its workers' results, the one whose outcome comes first in `PRECEDENCE`. A fault
    of the node comes before all of these, because it may cause any of them. Workers that ended only because of another
    worker are left out, unless all workers ended so.

    ``out_of_memory`` says whether the kernel killed a process of the pod for lack of memory while the workers ran.
    ``memory_limit`` is the container's limit in bytes.
    """
    outcomes = [_worker_outcome(worker, out_of_memory=out_of_memory, memory_limit=memory_limit) for worker in exits]
    own = [outcome for outcome in outcomes if not outcome.caused_by_peer] or outcomes
    results = [outcome.result for outcome in own]
    return min(results, key=lambda result: (not result.node_fault, PRECEDENCE.index(result.outcome)))
