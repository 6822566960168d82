"""What one reconcile decides: what to record about attempts, the preflight check and the adapter that the job starts
from, in which state the job is, and which change of its objects to make, if any.

`state_machine.py` makes a `Decision`; `reconcile.py` writes it, acts on it and computes the status from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from finetune_core.api.status import AdapterStatus, AttemptsStatus, FineTuneJobStatus, PreflightStatus
from finetune_core.contract import Result
from finetune_core.contract.preflight_result import PlannedNeeds
from finetune_operator.decide.bookkeeping import bookkeeping
from finetune_operator.decide.states import JobState
from finetune_operator.objects.observations import PodObservation


class Action(Enum):
    """What the reconciler does with the job's objects, once the decision is recorded in the status."""

    NONE = auto()
    """Change no object, for example because a pod runs, or because the job waits or has ended."""
    CREATE_PREFLIGHT_POD = auto()
    """Create ConfigMap and pod of the next try of the preflight check."""
    REMOVE_PREFLIGHT_PODS = auto()
    """Delete the objects of the tries in `Decision.preflight_pods`."""
    OPEN_ATTEMPT = auto()
    """Change no object yet: only the number of the next attempt is written into the status. The following reconcile
    creates the attempt's objects."""
    CREATE_ATTEMPT = auto()
    """Create ConfigMap, NetworkPolicy and child of the current attempt."""
    REMOVE_ATTEMPT = auto()
    """Delete ConfigMap and child of the attempt that ended last. Its NetworkPolicy stays until the next attempt begins
    or the job has ended."""
    REMOVE_ORPHANS = auto()
    """Delete the pods in `Decision.orphans`, whose attempt has ended and whose child does not exist any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEnd:
    """How the job ends, as the condition `Succeeded` will say."""

    succeeded: bool
    reason: str
    """CamelCase reason of the condition, for example "RetriesExhausted"."""
    message: str
    result: Result | None = None
    """The result that names the committed artifact: the trainer's result, or one made from what the preflight check
    found in the bucket. None where no committed artifact is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What one reconcile decides for a job."""

    state: JobState
    attempts: AttemptsStatus
    """`status.attempts` as it is to be recorded."""
    preflight: PreflightStatus | None = None
    """`status.preflight` as it is to be recorded."""
    adapter: AdapterStatus | None = None
    """`status.adapter` as it is to be recorded: the artifact of the job that `model.adapter.job` names. None where
    nothing new is to be recorded."""
    action: Action = Action.NONE
    wait_seconds: float | None = None
    """Seconds until the job is reconciled again even if no event arrives; None where only an event can change the
    decision."""
    end: JobEnd | None = None
    """How the job ends; None while it goes on."""
    is_checked: bool = False
    """Whether the next attempt waits for the preflight check or for the job that `model.adapter.job` names, or whether
    the job fails because of that check or of the named job."""
    missing: str = ""
    """Why the next attempt still waits, as a sentence: why the pod of the preflight check could not be created or does
    not start, else what the last try of the check reported, or why the job that `model.adapter.job` names can't be used
    yet. Empty where no reason is known."""
    turn: str = ""
    """A sentence which says that the preflight check waits for its turn; empty where the check does not wait for it."""
    planned: PlannedNeeds | None = None
    """What the training needs by its plan, where this reconcile has read that in the result of the preflight check;
    else None."""
    preflight_pods: Sequence[PodObservation] = ()
    """Pods that `Action.REMOVE_PREFLIGHT_PODS` deletes."""
    orphans: Sequence[PodObservation] = ()
    """Pods that `Action.REMOVE_ORPHANS` deletes."""

    @property
    def number_of_try(self) -> int:
        """Number, from 1, of the try of the preflight check that runs now or comes next."""
        return (self.preflight.tries if self.preflight else 0) + 1

    @property
    def needs_run_file(self) -> bool:
        """Whether a pod may be about to start. Then the run file, which pods read, must be made from the spec."""
        return self.state in (JobState.CHECKING, JobState.OPENED)

    @property
    def starts_pods(self) -> bool:
        """Whether `action` leads to new pods, for which the whole spec is needed."""
        return self.action in (Action.OPEN_ATTEMPT, Action.CREATE_ATTEMPT, Action.CREATE_PREFLIGHT_POD)

    def starts_check(self, stored: FineTuneJobStatus) -> bool:
        """Return whether a preflight pod is to be created, now or once the record of the check is written."""
        begins = self.state is JobState.CHECKING and stored.preflight is None and self.preflight is not None
        return begins or self.action is Action.CREATE_PREFLIGHT_POD

    def must_be_written_first(self, stored: FineTuneJobStatus) -> bool:
        """Return whether the status must be written before any object is created or deleted.

        The result is True where one of the values of `bookkeeping` has changed, where the artifact that the job starts
        from is found, or where the job ends. An operator that crashes right after that write finds its decision in the
        status and does not decide anew.
        """
        changed = bookkeeping(self.attempts, self.preflight) != bookkeeping(stored.attempts, stored.preflight)
        return changed or self.adapter is not None or self.end is not None
