"""The milestones of the test cases. A milestone is a state that the job must reach after an event, such as the crash of
a pod, and the number of seconds in which it must do so by design.

The designed times follow from the design of the operator. The operator writes most changes to the status within 2 s. If
only a message changes, the operator waits until 10 s have passed since its last write. The operator counts an attempt
as ended when its pods have ended, or when 10 s have passed since the cause was recorded. A permanent cause, an order of
a person or a deadline ends the attempt at once. The next attempt starts after a back-off of 10 s. The back-off doubles
with each further attempt in a row without a new checkpoint, up to 300 s. Suspended attempts do not count in the row.
"""

from __future__ import annotations

from tests.e2e.rows.observer import Manifest
from tests.e2e.rows.row import Milestone, condition, on_job, settled

SEEN = 2.0
BETWEEN_SENTENCES = 10.0
LEAVE_TOGETHER = 10.0
BACKOFF = 10.0
SIDECAR_SECONDS = 60.0
STARTING = 5.0
"""Seconds from the creation of two small pods until their scripts run."""
ENDING = 5.0
"""Seconds from the moment at which two small pods get SIGTERM until both pods are gone."""


def cause(bound: float = SEEN) -> Milestone:
    """Return the milestone that is reached when the status contains the cause for the end of attempt 1, or lists
    attempt 1 as an ended attempt."""

    def reached(job: Manifest) -> bool:
        attempts = job["status"]["attempts"]
        return bool(attempts["recent"] or attempts.get("current", {}).get("cause"))

    return on_job("cause recorded", bound, reached)


def accounted(bound: float = SEEN + LEAVE_TOGETHER) -> Milestone:
    """Return the milestone that is reached when `status.attempts.recent` lists an ended attempt."""
    return on_job("attempt accounted", bound, lambda job: job["status"]["attempts"]["recent"])


def next_attempt(bound: float = SEEN + LEAVE_TOGETHER + BACKOFF + SEEN, number: int = 2) -> Milestone:
    """Return the milestone that is reached when the attempt with ``number`` has started."""
    name = f"attempt {number} started"
    return on_job(name, bound, lambda job: job["status"]["attempts"]["started"] == number)


def end(bound: float = SEEN) -> Milestone:
    """Return the milestone that is reached when the job has ended."""
    return on_job("job ended", bound, settled)


def says_in_running(*words: str, bound: float) -> Milestone:
    """Return the milestone that is reached when the message of the condition Running contains all ``words``."""
    return on_job("cause told", bound, lambda job: all(word in condition(job, "Running")["message"] for word in words))


PODS_GONE = Milestone(
    "pods gone", SEEN + ENDING, lambda stage, timeout: max(stage.pod_gone(worker, timeout) for worker in (0, 1))
)
RETRIED = (cause(), accounted(), next_attempt())
