"""The states of a job, and every transition between them that one reconcile may make.

Each `Decision` of `state_machine.py` names the state of the job. The test tests/operator/test_job_states.py runs jobs
through the whole reconciler and checks that the jobs make only the transitions of the table `TRANSITIONS`.
`reference.py` draws the diagram in docs/architecture.md from that table.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class JobState(StrEnum):
    """The state of a job after its newest reconcile; NEW before the first reconcile."""

    NEW = "New"
    CHECKING = "Checking"
    OPENED = "Opened"
    PENDING = "Pending"
    RUNNING = "Running"
    HELD = "Held"
    ENDING = "Ending"
    CLEANING_UP = "CleaningUp"
    BACKING_OFF = "BackingOff"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


MEANINGS: Mapping[JobState, str] = {
    JobState.NEW: "The operator has not reconciled the job yet.",
    JobState.CHECKING: "The preflight check runs, or waits for its next try or for the job that `model.adapter.job`"
    " names. No GPU was asked for.",
    JobState.OPENED: "The next attempt is recorded in the status; its ConfigMap and child are not created yet.",
    JobState.PENDING: "The child exists; its pods do not all run yet.",
    JobState.RUNNING: "All pods of the attempt have run.",
    JobState.HELD: "A queue or a person suspended the child. No deadline runs, and the attempt goes on afterwards.",
    JobState.ENDING: "The cause of the attempt's end is recorded; the other pods get 10 s to end.",
    JobState.CLEANING_UP: "No attempt is current. The objects of the last attempt, or of a check that is no longer"
    " wanted, are removed, and their pods are waited for.",
    JobState.BACKING_OFF: "The next attempt waits for its back-off, or for the job that `model.adapter.job` names where"
    " `status.adapter` was lost.",
    JobState.SUSPENDED: "`runPolicy.suspend` is true and no pod is left.",
    JobState.SUCCEEDED: "The artifact is committed. This state is final.",
    JobState.FAILED: "No attempt follows. This state is final.",
}

FINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED})
_STARTS = frozenset({JobState.CHECKING, JobState.OPENED, JobState.SUSPENDED, JobState.FAILED})
"""States that may follow New, CleaningUp and Suspended, three states in which no attempt is current."""
_ENDS = frozenset({JobState.ENDING, JobState.CLEANING_UP, JobState.SUCCEEDED, JobState.FAILED})
"""States that may follow every state in which an attempt exists and goes on."""
ATTEMPT_STATES = (JobState.OPENED, JobState.PENDING, JobState.RUNNING, JobState.HELD)
"""States in which an attempt exists and no cause of its end is recorded."""

TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.NEW: _STARTS,
    JobState.CHECKING: frozenset({JobState.OPENED, JobState.SUSPENDED, JobState.CLEANING_UP}) | FINAL_STATES,
    JobState.OPENED: frozenset({JobState.PENDING, JobState.RUNNING, JobState.HELD}) | _ENDS,
    JobState.PENDING: frozenset({JobState.RUNNING, JobState.HELD}) | _ENDS,
    JobState.RUNNING: frozenset({JobState.PENDING, JobState.HELD}) | _ENDS,
    JobState.HELD: frozenset({JobState.PENDING, JobState.RUNNING}) | _ENDS,
    JobState.ENDING: _ENDS - {JobState.ENDING},
    JobState.CLEANING_UP: _STARTS | {JobState.BACKING_OFF},
    JobState.BACKING_OFF: frozenset({JobState.OPENED, JobState.SUSPENDED, JobState.FAILED}),
    JobState.SUSPENDED: _STARTS - {JobState.SUSPENDED} | {JobState.BACKING_OFF},
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
}
"""For each state, the states in which the job may be after the next reconcile. A job may also stay in its state.

States may be skipped, because the operator may have been away for a while. For example, a job goes from Opened to
Running where all pods started between two reconciles.
"""


def state_diagram() -> str:
    """Return `TRANSITIONS` as a Mermaid state diagram, in which the states of ATTEMPT_STATES form the group Attempt.

    A transition that all states of the group have is drawn once, from the group.
    """
    lines = ["stateDiagram-v2", f"    [*] --> {JobState.NEW}"]
    shared = frozenset.intersection(*(TRANSITIONS[state] for state in ATTEMPT_STATES))
    lines.append("    state Attempt {")
    for state in ATTEMPT_STATES:
        lines += [f"        {state} --> {other}" for other in _sorted(TRANSITIONS[state] - shared)]
    lines.append("    }")
    lines += [f"    Attempt --> {other}" for other in _sorted(shared)]
    for state in JobState:
        if state not in ATTEMPT_STATES:
            lines += [f"    {state} --> {other}" for other in _sorted(TRANSITIONS[state])]
    lines += [f"    {state} --> [*]" for state in JobState if state in FINAL_STATES]
    return "\n".join(lines)


def _sorted(states: frozenset[JobState]) -> list[JobState]:
    return [state for state in JobState if state in states]
