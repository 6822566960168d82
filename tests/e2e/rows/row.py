"""Define a row and run it: cause the fault, measure when each milestone is reached, and compare conditions, attempts
and events with the design."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.cluster import wait_for
from tests.e2e.rows.observer import Manifest
from tests.e2e.rows.stage import PATIENCE_SECONDS, Stage

TOLERANCE = 3
"""The bounds of milestones hold for an idle machine. A row fails if a milestone takes longer than this factor times its
bound."""
EVENTS_SECONDS = 10


@dataclass(frozen=True)
class Milestone:
    """A state that must be reached after the fault, and the number of seconds that the design allows."""

    name: str
    bound: float
    when: Callable[[Stage, float], float]
    """Waits for the state, for at most the given number of seconds, and returns the time at which the state was
    reached."""


def on_job(name: str, bound: float, reached: Callable[[Manifest], Any]) -> Milestone:
    """Return a milestone that is reached when ``reached`` holds for the job's manifest."""
    return Milestone(name, bound, lambda stage, timeout: stage.job(name, reached, timeout).at)


@dataclass(frozen=True)
class Measured:
    """A milestone and the seconds from the fault until the milestone was reached."""

    milestone: Milestone
    seconds: float

    @property
    def late(self) -> bool:
        """Whether the milestone took longer than `TOLERANCE` times its bound."""
        return self.seconds > TOLERANCE * self.milestone.bound


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way in which a job fails, with all that the job's status and events must show."""

    name: str
    script: str
    """Shell script that the scripted trainer runs; see `scripts.py`."""
    fault: Callable[[Stage], float]
    """Causes the fault, or waits for it, and returns the time of the fault."""
    attempts: tuple[tuple[str, str], ...]
    """Verdict and reason of every attempt that ends, in order. A reason may list alternatives, such as
    ``"PodDeleted|PodVanished"``."""
    words: tuple[str, ...] = ()
    """Words that the message of the first ended attempt contains. ``{worker_1}`` stands for the name of worker 1's
    pod."""
    final: tuple[str, str] | None = ("True", "Completed")
    """Status and reason of the condition Succeeded at the end. None means that the job does not end."""
    open_attempts: int = 1
    """Number of attempts that still run at the end of a row without a final state."""
    milestones: tuple[Milestone, ...]
    spec: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of the row's namespace."""
    more_events: tuple[str, ...] = ()
    """Reasons of further events, beside those for the start and end of attempts and for the end of the job."""
    repeated_event: str | None = None
    """Reason of an event that may occur once more, because the object for which the job waits changes."""
    check: Callable[[Stage, Manifest], None] = lambda stage, job: None
    """A further check of the job's manifest at the end."""


def play(row: Row, stage: Stage) -> list[Measured]:
    """Run ``row`` on ``stage`` and return the times of its milestones. All other expectations of the row are
    asserted."""
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
    """Assert that every ended attempt has the verdict and reason of the row, and that the first message contains the
    row's words."""
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
    """Return the number of attempts that have started by the end of the row."""
    return len(row.attempts) + (0 if row.final else row.open_attempts)


def words_of(row: Row, stage: Stage) -> list[str]:
    """Return the row's words with the names of the pods filled in."""
    return [word.format(worker_0=stage.pod_name(0), worker_1=stage.pod_name(1)) for word in row.words]


def assert_conditions(row: Row, job: Manifest) -> None:
    """Assert that the conditions agree with each other and with the final state of the row."""
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
    """Assert that there is one event for the start of each attempt, one for each end that is no success, one for the
    end of the job, and no others."""
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
    """Return whether the job has ended."""
    return bool(condition(job, "Succeeded")["status"] != "Unknown")
