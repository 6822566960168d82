"""What one reconcile decides: the bookkeeping to record, the state of the job, and at most one change of its objects.

`state_machine.py` makes a `Decision`; `reconcile.py` writes it, acts on it and computes the status from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from finetune_core.api.status import AttemptsStatus, FineTuneJobStatus, PreflightStatus
from finetune_core.contract import Result
from finetune_operator.decide.states import JobState
from finetune_operator.objects.observations import PodObservation


class Action(Enum):
    """The change of objects that the reconciler makes, once the bookkeeping is written."""

    NONE = auto()
    """Nothing changes: a pod runs, something is waited for, or the job has ended."""
    CREATE_PREFLIGHT_POD = auto()
    """Create ConfigMap and pod of the next try of the preflight check."""
    REMOVE_PREFLIGHT_PODS = auto()
    """Delete the objects of the tries in `Decision.preflight_pods`."""
    OPEN_ATTEMPT = auto()
    """Write the number of the next attempt into the status. The following reconcile creates the attempt's objects."""
    CREATE_ATTEMPT = auto()
    """Create ConfigMap and child of the current attempt."""
    REMOVE_ATTEMPT = auto()
    """Delete ConfigMap and child of the attempt that ended last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEnd:
    """How the job ended; becomes the condition `Succeeded`."""

    succeeded: bool
    reason: str
    """CamelCase reason of the condition, for example "RetriesExhausted"."""
    message: str
    result: Result | None = None
    """The trainer's result with artifact and scores; only where the job succeeded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What one reconcile decides for a job."""

    state: JobState
    attempts: AttemptsStatus
    """`status.attempts` as it is to be recorded."""
    preflight: PreflightStatus | None = None
    """`status.preflight` as it is to be recorded."""
    action: Action = Action.NONE
    wait_seconds: float | None = None
    """When to reconcile again even if no event arrives; None where only an event can change the decision."""
    end: JobEnd | None = None
    """How the job ends; None while it goes on."""
    is_checked: bool = False
    """Whether the preflight check is what attempt 1 waits for, or what ended the job."""
    missing: str = ""
    """What the preflight check found missing outside the spec, as a sentence; empty where nothing is known."""
    preflight_pods: Sequence[PodObservation] = ()
    """Pods that `Action.REMOVE_PREFLIGHT_PODS` deletes."""

    @property
    def number_of_try(self) -> int:
        """The try of the preflight check that runs or comes next, counted from 1."""
        return (self.preflight.tries if self.preflight else 0) + 1

    @property
    def needs_run_file(self) -> bool:
        """Whether a pod that reads the run file is about to start, so that the spec must be resolved."""
        return self.state in (JobState.CHECKING, JobState.OPENED)

    def must_be_written_first(self, stored: FineTuneJobStatus) -> bool:
        """Return whether the bookkeeping changed. Then no object is touched before the status is written.

        An operator that crashes between the two writes finds its decision in the status and does not decide anew.
        """
        changed = _bookkeeping(self.attempts, self.preflight) != _bookkeeping(stored.attempts, stored.preflight)
        return changed or self.end is not None


def _bookkeeping(attempts: AttemptsStatus, preflight: PreflightStatus | None) -> tuple[object, ...]:
    """Return what must not be lost in a crash: numbers, counts and causes of attempts, and tries of the check."""
    current = attempts.current
    return (
        attempts.started,
        attempts.charged,
        attempts.free,
        current.number if current else None,
        current.cause if current else None,
        preflight,
    )
