"""What shows after a fault, and within which time it is designed to.

Where the times come from: what is seen is written at once (2 s: a look at the job and a write), but a sentence that
changes alone waits until 10 s have passed since the last write; an attempt is closed once its pods have ended, at the
latest 10 s after the cause; the next starts after a back-off of 10 s.
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
"""Two small pods from their creation until their script runs."""
ENDING = 5.0
"""Two small pods from SIGTERM until they are gone."""


def cause(bound: float = SEEN) -> Milestone:
    """Return the milestone at which the status says why the attempt ends."""

    def reached(job: Manifest) -> bool:
        attempts = job["status"]["attempts"]
        return bool(attempts["recent"] or attempts.get("current", {}).get("cause"))

    return on_job("cause recorded", bound, reached)


def accounted(bound: float = SEEN + LEAVE_TOGETHER) -> Milestone:
    """Return the milestone at which the attempt is closed and counted."""
    return on_job("attempt accounted", bound, lambda job: job["status"]["attempts"]["recent"])


def next_attempt(bound: float = SEEN + LEAVE_TOGETHER + BACKOFF + SEEN, number: int = 2) -> Milestone:
    """Return the milestone at which the next attempt has begun."""
    name = f"attempt {number} started"
    return on_job(name, bound, lambda job: job["status"]["attempts"]["started"] == number)


def end(bound: float = SEEN) -> Milestone:
    """Return the milestone at which the job has ended."""
    return on_job("job ended", bound, settled)


def says_in_running(*words: str, bound: float) -> Milestone:
    """Return the milestone at which the condition Running tells what the job waits for."""
    return on_job("cause told", bound, lambda job: all(word in condition(job, "Running")["message"] for word in words))


PODS_GONE = Milestone(
    "pods gone", SEEN + ENDING, lambda stage, timeout: max(stage.pod_gone(worker, timeout) for worker in (0, 1))
)
RETRIED = (cause(), accounted(), next_attempt())
