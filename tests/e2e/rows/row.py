"""`Row` defines a test case, and `play` runs it. `play` causes the event of the test case or waits for it, measures how
long the job then takes to reach each milestone, and compares the job's conditions, attempts and Kubernetes events with
the expected ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.cluster import wait_for
from tests.e2e.rows.observer import Manifest
from tests.e2e.rows.stage import PATIENCE_SECONDS, Stage

TOLERANCE = 3
"""A test case fails if a milestone takes longer than its designed time times this factor. The factor is needed because
the designed times are those of an idle machine."""
EVENTS_SECONDS = 10


@dataclass(frozen=True)
class Milestone:
    """A state that must be reached after the event of a test case, and the number of seconds (``bound``) that the
    design allows."""

    name: str
    bound: float
    when: Callable[[Stage, float], float]
    """A function that gets a stage and a time limit in seconds. It waits for the state, and returns the time at which
    the state was reached."""


def on_job(name: str, bound: float, reached: Callable[[Manifest], Any]) -> Milestone:
    """Return a milestone that is reached as soon as ``reached`` holds for the job's manifest."""
    return Milestone(name, bound, lambda stage, timeout: stage.job(name, reached, timeout).at)


@dataclass(frozen=True)
class Measured:
    """A milestone, and the seconds from the event of the test case until the milestone was reached."""

    milestone: Milestone
    seconds: float

    @property
    def late(self) -> bool:
        """Whether the milestone took longer than `TOLERANCE` times its designed time."""
        return self.seconds > TOLERANCE * self.milestone.bound


@dataclass(frozen=True, kw_only=True)
class Row:
    """A test case: an event that happens to a job, and what the job's status and Kubernetes events must then contain.
    The test case belongs to a row of the operator's verdict table."""

    name: str
    script: str
    """Shell script that the job's pods run in place of a trainer; see `scripts.py`."""
    fault: Callable[[Stage], float]
    """Causes the event that happens to the job, or waits for the event, and returns the time of the event."""
    attempts: tuple[tuple[str, str], ...]
    """Verdict and reason of each ended attempt, oldest first. A reason may list alternatives, such as
    ``"PodDeleted|PodVanished"``."""
    words: tuple[str, ...] = ()
    """Words that the message of the first ended attempt must contain. ``{worker_1}`` is replaced by the name of worker
    1's pod, and ``{worker_0}`` by that of worker 0's pod."""
    final: tuple[str, str] | None = ("True", "Completed")
    """Status and reason that the condition Succeeded must have at the end. None means that the job must still be
    unfinished at the end of the test case."""
    open_attempts: int = 1
    """Number of attempts that have started and have not ended at the end of the test case. It is used only if ``final``
    is None."""
    milestones: tuple[Milestone, ...]
    spec: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of the namespace in which the job runs."""
    more_events: tuple[str, ...] = ()
    """Reasons of the events that must appear in addition to those for the start and end of attempts and for the end of
    the job."""
    repeated_event: str | None = None
    """Reason of an event that may appear once more than expected. This happens when the message about a missing object
    changes."""
    check: Callable[[Stage, Manifest], None] = lambda stage, job: None
    """A function with further assertions at the end. It gets the job's last manifest."""


def play(row: Row, stage: Stage) -> list[Measured]:
    """Run the test case ``row`` in the namespace of ``stage``. Return each milestone with the seconds until it was
    reached, and assert everything else that the case expects."""
    stage.apply(row.script, row.spec)
    fault_at = row.fault(stage)
    measured = [
        Measured(milestone, milestone.when(stage, TOLERANCE * milestone.bound + PATIENCE_SECONDS) - fault_at)
        for milestone in row.milestones
    ]
    ended = stage.job("its end", settled) if row.final else stage.job("the last state", lambda job: not settled(job))
    job = ended.object if row.final else stage.observer.history("job", stage.namespace, "row")[-1].object
    assert_attempts(row, stage, job)
    assert_conditions(row, job)
    assert_events(row, stage)
    row.check(stage, job)
    return measured


def assert_attempts(row: Row, stage: Stage, job: Manifest) -> None:
    """Assert that the ended attempts have the expected verdicts and reasons, and that the message of the first contains
    the expected words. Assert that the status counts the started, charged and free attempts correctly."""
    attempts = job["status"]["attempts"]
    found = tuple((past["verdict"], past["reason"]) for past in attempts["recent"])
    assert len(found) == len(row.attempts), attempts
    for (verdict, reason), (designed, reasons) in zip(found, row.attempts, strict=True):
        assert verdict == designed, attempts
        assert reason in reasons.split("|"), attempts
    verdicts = Counter(verdict for verdict, _ in row.attempts)
    assert (attempts["charged"], attempts["free"]) == (verdicts["Charged"], verdicts["Free"]), attempts
    assert attempts["started"] == started_by(row), attempts
    if row.attempts and row.words:
        message = attempts["recent"][0]["message"]
        assert all(word in message for word in words_of(row, stage)), message


def started_by(row: Row) -> int:
    """Return how many attempts must have started by the end of the test case."""
    return len(row.attempts) + (0 if row.final else row.open_attempts)


def words_of(row: Row, stage: Stage) -> list[str]:
    """Return the expected words of the first attempt's message, with the real names of the pods filled in."""
    return [word.format(worker_0=stage.pod_name(0), worker_1=stage.pod_name(1)) for word in row.words]


def assert_conditions(row: Row, job: Manifest) -> None:
    """Assert that six conditions have the statuses that follow from the expected end of the job. If the job must have
    ended, assert also that the condition Succeeded has the expected reason, and that the status has a
    `completionTime`."""
    shown = {item["type"]: item["status"] for item in job["status"]["conditions"]}
    status = row.final[0] if row.final else "Unknown"
    expected = {
        "Succeeded": status,
        "Ready": "True" if status == "True" else "False",
        "Reconciling": "True" if status == "Unknown" else "False",
        "Stalled": "True" if status == "False" else "False",
        "Running": "False",
        "Accepted": "True",
    }
    assert {kind: shown[kind] for kind in expected} == expected, job["status"]["conditions"]
    if row.final:
        assert condition(job, "Succeeded")["reason"] == row.final[1], job["status"]["conditions"]
        assert job["status"]["completionTime"]


def assert_events(row: Row, stage: Stage) -> None:
    """Assert that there is one event for the start of each attempt, one for each attempt that ended without success,
    one for the end of the job, the events in ``more_events``, and no others. Only an event with the reason
    ``repeated_event`` may appear once more. The note of an attempt's end must name the attempt and its verdict."""
    unsuccessful = [verdict for verdict, _ in row.attempts if verdict != "Succeeded"]
    expected = Counter({"AttemptStarted": started_by(row), "AttemptEnded": len(unsuccessful)})
    expected.update(row.more_events)
    if row.final:
        expected[row.final[1]] += 1
    expected = +expected

    def told() -> list[tuple[str, str]] | None:
        events = stage.events()
        return events if sum(expected.values()) <= len(events) else None

    wait_for("all events", told, EVENTS_SECONDS, evidence=lambda: str(stage.events()), interval=0.5)
    events = stage.events()
    seen = Counter(reason for reason, _ in events)
    if row.repeated_event is not None and seen[row.repeated_event] == expected[row.repeated_event] + 1:
        expected[row.repeated_event] += 1
    assert seen == expected, events
    notes = [note for reason, note in events if reason == "AttemptEnded"]
    for number, (verdict, _) in enumerate(row.attempts, start=1):
        mine = [note for note in notes if note.startswith(f"attempt {number} ended ({verdict}, ")]
        assert len(mine) == (verdict != "Succeeded"), notes


def condition(job: Manifest, kind: str) -> Manifest:
    """Return the condition of type ``kind`` from the job's manifest."""
    found: Manifest = next(item for item in job["status"]["conditions"] if item["type"] == kind)
    return found


def settled(job: Manifest) -> bool:
    """Return whether the job has ended, which means that its condition Succeeded is True or False."""
    return bool(condition(job, "Succeeded")["status"] != "Unknown")
