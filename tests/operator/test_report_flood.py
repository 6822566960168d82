"""A pod with a valid token can cause only a bounded number of requests, whatever it reports and however often.

Reports are stored as the report server stores them, and reconciled against `ModelServer` on a fake clock.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from finetune_core.api.status import FineTuneJobStatus
from finetune_core.contract import (
    AdapterOrigin,
    CheckpointRecord,
    CurvePoint,
    EvaluationRecord,
    Incident,
    Outcome,
    Phase,
    Report,
    Result,
)
from finetune_core.contract.records import CheckpointName, ScoreRecord
from finetune_core.contract.stock_reports import StockReport
from finetune_operator.decide.bookkeeping import bookkeeping
from finetune_operator.queue.memory import (
    REPORTED_WRITES_BURST,
    REPORTED_WRITES_PER_SECOND,
    Memory,
    ReportingAttempt,
)
from finetune_operator.queue.work_queue import WorkQueue
from finetune_operator.status.urgency import (
    OWN_FIELDS,
    REPORTED_NEWS,
    REPORTED_NUMBERS,
    SPECIAL_FIELDS,
    is_transition,
)
from tests.operator.builders import NOW, UID, artifact, at, job_manifest
from tests.operator.model import Manifest, ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.test_status import report as a_report
from tests.operator.test_status import status as a_status

SECONDS = 60
REPORTS_PER_SECOND = 20
MOST_WRITES = REPORTED_WRITES_BURST + SECONDS * REPORTED_WRITES_PER_SECOND
Values = Callable[[int], Any]


def _checkpoint(number: int, **changes: Any) -> CheckpointRecord:
    values: dict[str, Any] = {
        "run": 1,
        "step": number,
        "uri": "s3://bucket/" + "x" * 300,
        "bytes": number,
        "manifest_sha256": "ab",
        "time": at(number),
    }
    return CheckpointRecord(**(values | changes))


def _incident(number: int) -> Incident:
    return Incident(step=number, kind="LossSpike", value="9", threshold="1", action="Record", message="m")


def _scores(number: int) -> EvaluationRecord:
    base = ScoreRecord(perplexity=1.0 + number, graded=number)
    return EvaluationRecord(rows="Test", examples=number, base=base, tuned=base, tuned_step=number)


FLOODS: dict[str, Values] = {
    "run": lambda n: 1 + n % 3,
    "phase": lambda n: list(Phase)[n % len(Phase)],
    "ranks": lambda n: 1 + n % 2,
    "step": lambda n: n,
    "total_steps": lambda n: n % 2 * 1000,
    "epoch": lambda n: n / 7,
    "eta_seconds": lambda n: n,
    "tokens_per_second": lambda n: n / 3,
    "mfu": lambda n: n % 2 / 2,
    "attention": lambda n: f"kernel {n}",
    "adapted_share": lambda n: n % 8 / 8,
    "adapter": lambda n: AdapterOrigin(use="Merge", source=f"s3://b/{n}", sha256=f"{n:064x}"),
    "metrics": lambda n: {f"m{index}": n + index for index in range(32)},
    "resumed_from_step": lambda n: n % 50,
    "history": lambda n: [CurvePoint(step=step, loss=n) for step in range(60)],
    "checkpoints": lambda n: [_checkpoint(step, bytes=n) for step in range(n % 90)],
    "checkpoint_age_seconds": lambda n: n,
    "checkpoint_problem": lambda n: "the store answers 503" * (n % 2),
    "best": lambda n: CheckpointName(run=1, step=n % 9),
    "notices": lambda n: [f"{n}-{index}" for index in range(8)],
    "evaluation": _scores,
    "incidents": lambda n: [_incident(n)],
    "result": lambda n: Result(outcome=list(Outcome)[n % len(Outcome)], message=str(n), step=n, artifact=artifact()),
}
"""For each field of a report, a function that returns the field's value in report number n. The value differs from the
field's value in the report before."""
FIXED = {"version", "pod_uid"}
"""Fields of a report that a flood can't change, because the report server rejects a report with another value."""


def test_the_floods_change_every_field_of_a_report() -> None:
    assert set(FLOODS) | FIXED == set(Report.model_fields)


def test_every_field_of_the_status_has_an_urgency() -> None:
    fields = [*OWN_FIELDS, *REPORTED_NEWS, *REPORTED_NUMBERS, *SPECIAL_FIELDS]
    assert sorted(fields) == sorted(FineTuneJobStatus.model_fields)


def test_what_must_be_written_before_objects_change_is_written_at_once() -> None:
    """Each parameter of `bookkeeping` has the name of the status field from which its value comes."""
    assert set(inspect.signature(bookkeeping).parameters) <= set(OWN_FIELDS)


@pytest.mark.parametrize("field", FLOODS)
def test_a_report_whose_status_need_not_wait_for_the_limit_of_all_jobs_is_reconciled_as_soon(field: str) -> None:
    """`Memory.store_report` returns after how many seconds a report is to be reconciled, and `status/urgency.py`
    decides whether this reconcile may write the status. If the two disagreed, news such as a new checkpoint could wait
    as long as new numbers."""
    for number in range(1, 8):
        first, second = (a_report(**{field: FLOODS[field](each)}) for each in (number, number + 1))
        stored = a_status(report=first, reported_at=NOW)
        writes_soon = is_transition(stored, a_status(stored, report=second, reported_at=NOW))
        memory = Memory(lambda: 1000.0)
        memory.set_reporting_attempt(KEY, UID, ReportingAttempt(uid=UID, attempt=1, pod_uids=frozenset({"pod-0"})))
        memory.store_report(KEY, UID, first, NOW)
        memory.job(KEY, UID).status_written(1000.0)
        memory.job(KEY, UID).reported_write_at = None
        after = memory.store_report(KEY, UID, second, NOW)
        assert after is not None
        assert not writes_soon or after == 0, f"{field} {number}: reconciled only after {after} s"


class CountingServer(ModelServer):
    """A model server that counts requests."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.requests: Counter[str] = Counter()

    async def get_job(self, key: Any) -> Manifest | None:
        self.requests["looks"] += 1
        return await super().get_job(key)

    async def apply_status(self, key: Any, resource_version: str, status: Manifest) -> str:
        self.requests["status writes"] += 1
        return await super().apply_status(key, resource_version, status)

    async def annotate_pod(self, namespace: str, name: str, uid: str, annotations: dict[str, str]) -> None:
        self.requests["annotations"] += 1
        await super().annotate_pod(namespace, name, uid, annotations)


class Flood:
    """A job whose attempt runs, and a pod of this attempt that reports without pause."""

    def __init__(self) -> None:
        self.server = CountingServer(job_manifest(), NOW)
        self.memory = Memory(self._clock)
        self.queue = WorkQueue(clock=self._clock)
        self.operator = reconciler(self.server, memory=self.memory)
        self._numbers = itertools.count()

    def _clock(self) -> float:
        return self.server.now.timestamp()

    async def start(self) -> None:
        """Let the attempt run, then wait until the job's token bucket for status writes is full again."""
        self.queue.add(KEY)
        await self.work()
        self.server.pass_time(100)
        await self.work()
        self.server.requests.clear()

    async def work(self) -> None:
        """Reconcile while a key is due. A change of the job, such as a status write, queues its key again, as a watch
        does."""
        while (key := self.queue.pop()) is not None:
            before = self.server.job["metadata"]["resourceVersion"]
            requeue = await self.operator.reconcile(key)
            self.queue.done(key)
            if requeue.after is not None:
                self.queue.add_after(key, requeue.after)
            if self.server.job["metadata"]["resourceVersion"] != before:
                self.queue.add(key)

    def reports(self, fields: dict[str, Values]) -> Iterator[Report]:
        """Return an endless iterator of reports, each with new values of ``fields``."""
        values: dict[str, Any] = {
            "run": 1,
            "pod_uid": self.server.pods[0]["metadata"]["uid"],
            "phase": Phase.TRAINING,
            "ranks": 2,
            "step": 5,
            "total_steps": 1000,
            "epoch": 0.5,
            "metrics": {"loss": 1.0},
            "history": [],
            "checkpoints": [],
        }
        for number in self._numbers:
            yield Report(**(values | {name: value(number) for name, value in fields.items()}))

    def store(self, report: Report) -> float:
        """Store ``report`` as the report server does, and return in how many seconds the job is to be reconciled."""
        after = self.memory.store_report(KEY, UID, report, self.server.now)
        assert after is not None
        return after

    async def run(self, reports: Iterator[Report], seconds: int = SECONDS) -> Counter[str]:
        """Send reports for ``seconds``, and return the number of requests that they caused, by kind."""
        for report in itertools.islice(reports, seconds * REPORTS_PER_SECOND):
            self.queue.add_after(KEY, self.store(report))
            await self.work()
            self.server.now += timedelta(seconds=1 / REPORTS_PER_SECOND)
        return self.server.requests


@pytest.fixture
async def flood() -> Flood:
    flood = Flood()
    await flood.start()
    return flood


@pytest.mark.parametrize("field", FLOODS)
async def test_a_flood_that_changes_one_field_is_bounded(flood: Flood, field: str) -> None:
    requests = await flood.run(flood.reports({field: FLOODS[field]}))
    _check(requests)


@pytest.mark.parametrize("total_steps", [0, 1000])
async def test_a_flood_that_changes_nothing_is_bounded(flood: Flood, total_steps: int) -> None:
    _check(await flood.run(flood.reports({"total_steps": lambda _: total_steps})))


async def test_a_flood_that_changes_everything_is_bounded(flood: Flood) -> None:
    # `total_steps` does not change, because a report without total steps counts as one of a trainer that still loads.
    fields = {name: value for name, value in FLOODS.items() if name != "total_steps"}
    requests = await flood.run(flood.reports(fields))
    _check(requests)
    assert requests["status writes"] >= SECONDS * REPORTED_WRITES_PER_SECOND, "and its last word is still written"


def _check(requests: Counter[str]) -> None:
    assert requests["status writes"] <= MOST_WRITES
    # The watch event of each write causes another reconcile, and a reconcile for a report may find that the status must
    # wait. Besides, the job is reconciled every 60 s while its attempt runs.
    assert requests["looks"] <= 3 * MOST_WRITES + 3
    assert requests["annotations"] <= 2 * MOST_WRITES, "two pods are annotated"


@pytest.mark.parametrize("field", ["checkpoints", "metrics", "notices", "result"])
async def test_a_flood_does_not_cut_the_back_off_of_a_failing_api_server_short(flood: Flood, field: str) -> None:
    asked: list[float] = []

    async def fails(_key: Any) -> Manifest:
        asked.append(1)
        raise TimeoutError

    flood.server.get_job = fails  # type: ignore[method-assign,assignment]
    for report in itertools.islice(flood.reports({field: FLOODS[field]}), SECONDS * REPORTS_PER_SECOND):
        flood.queue.add_after(KEY, flood.store(report))
        while (key := flood.queue.pop()) is not None:
            with pytest.raises(TimeoutError):
                await flood.operator.reconcile(key)
            flood.queue.add_rate_limited(key)
            flood.queue.done(key)
        flood.server.now += timedelta(seconds=1 / REPORTS_PER_SECOND)
    backed_off = 20  # the tries of an exponential back-off within a minute, without any report
    assert len(asked) <= MOST_WRITES + backed_off


async def test_a_flood_in_the_protocol_of_kubeflow_is_bounded(flood: Flood) -> None:
    def stock() -> Iterator[Report]:
        for report in flood.reports({"step": FLOODS["step"], "metrics": FLOODS["metrics"]}):
            values = report.model_dump() | {
                "reported_step": report.step,
                "reported_total": report.step % 2 * 1000 or None,
                "reported_percentage": report.step % 101,
            }
            yield StockReport.model_validate(values)

    _check(await flood.run(stock()))


async def test_a_result_that_is_repeated_is_reconciled_once(flood: Flood) -> None:
    first = next(flood.reports({"result": FLOODS["result"]}))
    assert flood.store(first) == 0
    await flood.operator.reconcile(KEY)
    await flood.operator.reconcile(KEY)
    for report in itertools.islice(flood.reports({"result": FLOODS["result"]}), 100):
        assert flood.store(report) > 5


async def test_what_the_operator_itself_records_waits_for_no_flood(flood: Flood) -> None:
    await flood.run(flood.reports(FLOODS), seconds=10)
    flood.server.set_policy(cancel=True)
    await flood.operator.reconcile(KEY)
    assert "current" not in flood.server.job["status"]["attempts"]


async def test_an_honest_trainer_is_shown_at_once_until_its_burst_is_used(flood: Flood) -> None:
    written = flood.server.requests
    for count, report in enumerate(itertools.islice(flood.reports({"incidents": FLOODS["incidents"]}), 3), start=1):
        flood.store(report)
        await flood.operator.reconcile(KEY)
        assert written["status writes"] == count
        flood.server.now += timedelta(seconds=1)


async def test_a_pod_that_refuses_its_annotation_is_asked_again_at_the_pace_of_reports(flood: Flood) -> None:
    async def refuses(_namespace: str, _name: str, _uid: str, _annotations: dict[str, str]) -> None:
        flood.server.requests["annotations"] += 1
        raise ConnectionResetError

    flood.server.annotate_pod = refuses  # type: ignore[method-assign,assignment]
    _check(await flood.run(flood.reports({"checkpoints": FLOODS["checkpoints"]})))
