"""How often statuses are written: new numbers of a job at most every ten seconds, and of all jobs within a budget.

A change that the operator causes itself is written at once. A change that comes from a report alone needs a token of
the job's token bucket. The tests set the clock.
"""

from __future__ import annotations

import heapq
from itertools import pairwise
from typing import Any

from finetune_core.api import FineTuneJobStatus
from finetune_core.api.conditions import Reason
from finetune_operator.decide.decision import JobEnd
from finetune_operator.observe.stored_job import StoredJob
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import MIN_SECONDS_BETWEEN_PROGRESS_WRITES, JobMemory
from finetune_operator.status.event_recorder import EventRecorder
from finetune_operator.status.writer import BURST, WRITES_PER_SECOND, StatusWriter
from tests.operator.builders import UID, at
from tests.operator.test_status import report, status_input


class Writes:
    """A stand-in for the API server that accepts statuses and events and keeps the time of each status write."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock
        self.times: list[float] = []
        self.stored: dict[Key, dict[str, Any]] = {}

    async def apply_status(self, key: Key, version: str, status: dict[str, Any]) -> str:
        self.times.append(self.clock[0])
        self.stored[key] = status
        return version + "1"

    async def create_event(self, _namespace: str, _manifest: dict[str, Any]) -> bool:
        return True


class Jobs:
    """Simulated jobs that train one step a second, with a status writer and a fake clock."""

    def __init__(self, count: int) -> None:
        self.clock = [0.0]
        self.metrics = Metrics()
        self.writes = Writes(self.clock)
        recorder = EventRecorder(self.writes, instance="pod", now=lambda: at(0), clock=lambda: self.clock[0])  # type: ignore[arg-type]
        self.writer = StatusWriter(
            cluster=self.writes,  # type: ignore[arg-type]
            recorder=recorder,
            metrics=self.metrics,
            child_kind="PyTorchJob",
            clock=lambda: self.clock[0],
        )
        self.memory = {Key("team", f"job-{number}"): JobMemory() for number in range(count)}
        self.reconciles = 0

    async def reconcile(self, key: Key, **changes: Any) -> float | None:
        self.reconciles += 1
        manifest = {"metadata": {"uid": UID, "resourceVersion": "1"}, "status": self.writes.stored.get(key)}
        stored = FineTuneJobStatus.model_validate(manifest["status"]) if manifest["status"] else FineTuneJobStatus()
        job = StoredJob(key=key, manifest=manifest, status=stored, now=at(0), memory=self.memory[key])
        newest = report(step=int(self.clock[0]), total_steps=100000)
        values = {"report": newest, "reported_at": at(self.clock[0])} | changes
        return await self.writer.write(job, status_input(**values))

    async def train(self, seconds: float) -> None:
        """Move the clock on by ``seconds``, and reconcile each job with a new report whenever it is due.

        A job is due after the delay that the status writer returned, or after three seconds where it returned none.
        """
        end = self.clock[0] + seconds
        due = [(self.clock[0], key) for key in self.memory]
        heapq.heapify(due)
        while due and due[0][0] <= end:
            self.clock[0], key = heapq.heappop(due)
            left = await self.reconcile(key)
            heapq.heappush(due, (self.clock[0] + (left if left else 3.0), key))


async def test_numbers_of_a_job_are_written_every_ten_seconds() -> None:
    jobs = Jobs(1)
    await jobs.train(300)
    times = jobs.writes.times
    gaps = [late - early for early, late in pairwise(times[1:])]
    assert min(gaps) >= MIN_SECONDS_BETWEEN_PROGRESS_WRITES
    assert len(times) >= 300 / (MIN_SECONDS_BETWEEN_PROGRESS_WRITES + 3)


async def test_all_jobs_together_keep_to_the_budget_and_each_comes_in_turn() -> None:
    jobs = Jobs(1000)  # without the budget, these jobs would cause 100 writes per second
    await jobs.train(120)
    later = [time for time in jobs.writes.times if time > 60]
    assert len(later) <= 60 * WRITES_PER_SECOND + BURST
    assert len(later) >= 60 * WRITES_PER_SECOND * 0.9
    for memory in jobs.memory.values():
        assert memory.status_written_at is not None
        assert 120 - memory.status_written_at < 1.5 * 1000 / WRITES_PER_SECOND, "nobody is forgotten"
    assert jobs.reconciles < 2.5 * len(jobs.writes.times) + 2000, "a job that waits is not reconciled again and again"


async def test_a_transition_waits_for_nothing() -> None:
    jobs = Jobs(1)
    key = next(iter(jobs.memory))
    await jobs.train(30)
    while jobs.writer._budget.reserve(jobs.clock[0]) < jobs.clock[0] + 3600:
        pass  # reserves all writes of the next hour
    before = len(jobs.writes.times)
    assert await jobs.reconcile(key, report=None, generation=2) is None
    assert len(jobs.writes.times) == before + 1


async def test_a_job_that_ends_is_counted_once_by_its_reason() -> None:
    jobs = Jobs(2)
    first, second = jobs.memory
    await jobs.reconcile(first)
    assert ended(jobs) == {}
    failed = JobEnd(succeeded=False, reason=Reason.DIVERGED, message="m")
    for _ in range(3):
        await jobs.reconcile(first, end=failed)
    await jobs.reconcile(second, end=JobEnd(succeeded=True, reason=Reason.COMPLETED, message="m"))
    assert ended(jobs) == {"Diverged": 1, "Completed": 1}


def ended(jobs: Jobs) -> dict[str, float]:
    """Return the counter of ended jobs by reason."""
    lines = jobs.metrics.render().decode().splitlines()
    found = [line for line in lines if line.startswith("finetune_jobs_ended_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in found}
