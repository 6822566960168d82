"""The resync: each namespace of `--watch-namespaces` is listed on its own, and settled jobs that have not changed are
not queued."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

import aiohttp
import pytest

from finetune_core.api.status import FineTuneJobStatus
from finetune_core.contract import Outcome
from finetune_operator import controller as controller_module
from finetune_operator.controller import Controller
from finetune_operator.kube.api_errors import ApiError
from finetune_operator.kube.client import ListedJob
from finetune_operator.process.health import WatchActivity
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import Memory
from finetune_operator.queue.work_queue import WorkQueue
from tests.operator.builders import NOW, job_manifest, result
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler

FORBIDDEN = ApiError(403, "Forbidden", 'finetunejobs.finetune.dev is forbidden: cannot list in namespace "deleted"')
GONE = ApiError(404, "NotFound", "namespace not found")
FAILURES = [
    FORBIDDEN,
    GONE,
    ApiError(500, "InternalError", "etcd"),
    aiohttp.ServerDisconnectedError(),
    TimeoutError(),
    ConnectionResetError(),
]


class Lists:
    """Takes the place of the client of the API server. ``answers`` has, for each namespace, the jobs of its list, or
    the error with which the list fails."""

    def __init__(self, answers: dict[str | None, list[ListedJob] | Exception]) -> None:
        self.answers = answers
        self.calls: list[str | None] = []

    async def list_jobs(self, namespace: str | None) -> AsyncIterator[ListedJob]:
        self.calls.append(namespace)
        answer = self.answers[namespace]
        if isinstance(answer, Exception):
            raise answer
        for job in answer:
            yield job


def listed(*names: str, namespace: str = "team", version: str = "1") -> list[ListedJob]:
    return [ListedJob(key=Key(namespace, name), resource_version=version) for name in names]


class Resync:
    """A controller of which `run` runs the resync only, with ``lists`` in place of the client of the API server."""

    def __init__(self, lists: Lists, memory: Memory | None = None) -> None:
        self.clock = [0.0]
        self.lists = lists
        self.queue = WorkQueue()
        self.memory = memory or Memory()
        self.metrics = Metrics()
        self.activity = WatchActivity(clock=lambda: self.clock[0])
        self.controller = Controller(
            queue=self.queue,
            reconciler=None,  # type: ignore[arg-type]
            cluster=lists,  # type: ignore[arg-type]
            memory=self.memory,
            activity=self.activity,
            metrics=self.metrics,
        )

    async def run(self, namespaces: Iterable[str], calls: int, seconds: float = 300) -> set[Key]:
        """Run the resync, with ``seconds`` between two resyncs, until ``calls`` lists were requested and answered. The
        lists of earlier runs are counted too. Return the keys that the resync has queued."""
        task = asyncio.ensure_future(self.controller.resync(tuple(namespaces), seconds))
        async with asyncio.timeout(30):
            while len(self.lists.calls) < calls:
                await asyncio.sleep(0)
            for _ in range(10):
                await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        found = set()
        while (key := self.queue.pop()) is not None:
            found.add(key)
        return found

    def exported(self) -> set[str]:
        """Return the namespaces of the jobs that have Prometheus series."""
        return {sample.labels["job_namespace"] for family in self.metrics.jobs.collect() for sample in family.samples}

    def unlisted(self) -> float | None:
        return self.metrics._registry.get_sample_value("finetune_unlisted_namespaces")


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("broken", [0, 1, 2])
async def test_a_namespace_that_can_not_be_listed_stops_no_other(failure: Exception, broken: int) -> None:
    namespaces = ["team-a", "team-b", "team-c"]
    answers: dict[str | None, list[ListedJob] | Exception] = {
        name: listed("job", namespace=name) if index != broken else failure for index, name in enumerate(namespaces)
    }
    resync = Resync(Lists(answers))
    assert await resync.run(namespaces, 3) == {
        Key(name, "job") for index, name in enumerate(namespaces) if index != broken
    }
    assert resync.unlisted() == 1


@pytest.mark.parametrize(
    ("failure", "ready"),
    [(FORBIDDEN, True), (GONE, True), (FAILURES[2], False), (FAILURES[3], False), (FAILURES[4], False)],
    ids=repr,
)
async def test_a_refused_namespace_does_not_keep_the_operator_from_being_ready(failure: Exception, ready: bool) -> None:
    for order in (("good", "bad"), ("bad", "good")):
        resync = Resync(Lists({"good": listed("job", namespace="good"), "bad": failure}))
        await resync.run(order, 2)
        assert resync.activity.ready is ready


async def test_an_operator_that_may_list_nothing_is_not_ready() -> None:
    resync = Resync(Lists({"a": FORBIDDEN, "b": GONE}))
    await resync.run(["a", "b"], 2)
    assert not resync.activity.ready


async def test_refused_lists_do_not_make_a_silent_operator_look_alive() -> None:
    resync = Resync(Lists({"a": FORBIDDEN}))
    resync.clock[0] = 1000.0
    await resync.run(["a"], 1)
    assert resync.activity.age() == 1000.0


async def test_a_namespace_that_comes_back_is_listed_at_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "RESYNC_RETRY_SECONDS", 0.0)

    class ComesBack(Lists):
        async def list_jobs(self, namespace: str | None) -> AsyncIterator[ListedJob]:
            if len(self.calls) == 4:
                self.answers["bad"] = listed("job", namespace="bad")
            async for job in super().list_jobs(namespace):
                yield job

    resync = Resync(ComesBack({"good": [], "bad": FORBIDDEN}))
    assert await resync.run(["good", "bad"], 5) == {Key("bad", "job")}
    assert resync.unlisted() == 0


@pytest.mark.parametrize(
    ("failure", "stay"), [(FORBIDDEN, False), (GONE, False), *((one, True) for one in FAILURES[2:])]
)
async def test_jobs_whose_namespace_is_refused_for_a_resync_lose_their_series_until_it_can_be_listed(
    failure: Exception, stay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_module, "RESYNC_RETRY_SECONDS", 0.001)
    lists = Lists({"good": [], "bad": failure})
    resync = Resync(lists)
    for namespace in ("good", "bad"):
        resync.metrics.jobs.update(Key(namespace, "job"), {}, FineTuneJobStatus())
    await resync.run(["bad"], 3, seconds=0.0035)
    assert resync.exported() == {"good", "bad"}, "a short refusal costs no series"
    await resync.run(["good", "bad"], 30, seconds=0.0035)
    assert resync.exported() == ({"good", "bad"} if stay else {"good"})
    lists.answers["bad"] = []
    await resync.run(["bad"], 31)
    assert resync.exported() == {"good", "bad"}


async def test_a_job_that_was_deleted_without_an_event_is_queued_once_more() -> None:
    memory = Memory()
    for key in (Key("team", "gone"), Key("team", "kept"), Key("elsewhere", "unknown")):
        memory.job(key, "a-uid")
    resync = Resync(Lists({"team": listed("kept")}), memory)
    assert await resync.run(["team"], 1) == {Key("team", "gone"), Key("team", "kept")}


async def test_a_settled_job_that_did_not_change_is_not_read_at_a_resync() -> None:
    memory = Memory()
    server = ModelServer(job_manifest(), NOW)
    operator = reconciler(server, memory=memory)
    for _ in range(4):
        await operator.reconcile(KEY)
    server.end_pods(0, result(Outcome.COMPLETED, with_artifact=True))

    async def queued() -> set[Key]:
        version = server.job["metadata"]["resourceVersion"]
        resync = Resync(Lists({None: listed("quickstart", version=version)}), memory)
        return await resync.run([], 1)

    assert await queued() == {KEY}, "a job that runs is read at every resync"
    await operator.reconcile(KEY)
    assert await queued() == {KEY}, "a job that has just ended has to be cleaned up"
    await operator.reconcile(KEY)
    assert await queued() == set()
    server.set_policy(ttlSecondsAfterFinished=60)
    assert await queued() == {KEY}, "the job has changed"


async def test_a_settled_job_whose_clean_up_failed_is_read_again() -> None:
    memory = Memory()
    server = ModelServer(job_manifest(), NOW)
    operator = reconciler(server, memory=memory)
    for _ in range(4):
        await operator.reconcile(KEY)
    server.end_pods(0, result(Outcome.COMPLETED, with_artifact=True))
    await operator.reconcile(KEY)

    async def fails(_namespace: str, _name: str) -> None:
        raise ConnectionResetError

    server.get_child = fails  # type: ignore[method-assign,assignment]
    with pytest.raises(ConnectionResetError):
        await operator.reconcile(KEY)
    assert not memory.has_settled(KEY, server.job["metadata"]["resourceVersion"])
