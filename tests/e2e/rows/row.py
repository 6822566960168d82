"""What a row is, and how it is played: bring the fault about, measure when each milestone shows, and compare
conditions, attempts and events with what is designed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.cluster import wait_for
from tests.e2e.rows.observer import Manifest
from tests.e2e.rows.stage import PATIENCE_SECONDS, Stage

TOLERANCE = 3
"""A bound is what is designed for an idle machine; a row fails at this many times as much."""
EVENTS_SECONDS = 10


@dataclass(frozen=True)
class Milestone:
    """Something that shows after the fault, and within how many seconds it is designed to."""

    name: str
    bound: float
    when: Callable[[Stage, float], float]
    """Waits for it, at most the seconds given, and returns the moment it showed."""


def on_job(name: str, bound: float, reached: Callable[[Manifest], Any]) -> Milestone:
    """Return a milestone that shows in the job's status."""
    return Milestone(name, bound, lambda stage, timeout: stage.job(name, reached, timeout).at)


@dataclass(frozen=True)
class Measured:
    """A milestone with the seconds that it took."""

    milestone: Milestone
    seconds: float

    @property
    def late(self) -> bool:
        """Whether it took longer than a row may take."""
        return self.seconds > TOLERANCE * self.milestone.bound


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to fail."""

    name: str
    script: str
    """What the scripted trainer does."""
    fault: Callable[[Stage], float]
    """Brings the fault about, or waits for it, and returns the moment of it."""
    attempts: tuple[tuple[str, str], ...]
    """Verdict and reason (or reasons, with | between) of every attempt that ends, in order."""
    words: tuple[str, ...] = ()
    """What the message of the first attempt, or of the wait, says."""
    final: tuple[str, str] | None = ("True", "Completed")
    """Status and reason of Succeeded at the end; None: the job goes on waiting."""
    open_attempts: int = 1
    """Attempts that go on at the end of a row without a final state."""
    milestones: tuple[Milestone, ...]
    spec: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the namespace."""
    more_events: tuple[str, ...] = ()
    """Reasons of events beside those of attempts and end."""
    told_again: str | None = None
    """Reason of an event that may come once more, more than a minute later, because what is waited for changes."""
    check: Callable[[Stage, Manifest], None] = lambda stage, job: None
    """What else is to be seen at the end."""


def play(row: Row, stage: Stage) -> list[Measured]:
    """Play ``row`` and return its times; asserts everything but these."""
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
    """Every attempt is accounted once, as designed, and the first says why."""
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
    """Return how many attempts have begun at the end."""
    return len(row.attempts) + (0 if row.final else row.open_attempts)


def words_of(row: Row, stage: Stage) -> list[str]:
    """Return the words with the names of pods filled in."""
    return [word.format(worker_0=stage.pod_name(0), worker_1=stage.pod_name(1)) for word in row.words]


def assert_conditions(row: Row, job: Manifest) -> None:
    """The summary conditions agree with each other and with the end."""
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
    """One event tells the start of each attempt, one its end, one the end of the job; there are no others."""
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
    if row.told_again is not None and seen[row.told_again] == expected[row.told_again] + 1:
        expected[row.told_again] += 1
    assert seen == expected, events
    notes = [note for reason, note in events if reason == "AttemptEnded"]
    for number, (verdict, _) in enumerate(row.attempts, start=1):
        mine = [note for note in notes if note.startswith(f"attempt {number} ended ({verdict}, ")]
        assert len(mine) == (verdict != "Succeeded"), notes


def condition(job: Manifest, kind: str) -> Manifest:
    """Return a condition of a job as it is stored."""
    found: Manifest = next(item for item in job["status"]["conditions"] if item["type"] == kind)
    return found


def settled(job: Manifest) -> bool:
    """Whether the job has ended."""
    return bool(condition(job, "Succeeded")["status"] != "Unknown")
