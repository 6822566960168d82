"""Soak test (R14 in docs/performance.md): many short-lived jobs on a fake clock, about a day with 100,000 events.

Queue and memory must keep nothing of a deleted job, and the memory of the process must not grow with the events.
"""

from __future__ import annotations

import asyncio
import gc
import random
import resource
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import Outcome
from finetune_operator.controller import Controller
from finetune_operator.process.health import WatchActivity
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import Memory
from finetune_operator.queue.work_queue import WorkQueue
from tests.operator.builders import NOW, job_manifest, result
from tests.operator.model import Manifest, ModelServer
from tests.operator.operators import reconciler

DAYS = 10
LIVING = 20
DONE = result(Outcome.COMPLETED, with_artifact=True)


class Servers:
    """Takes the place of the API server. Each call is passed to the `ModelServer` of the call's namespace."""

    def __init__(self) -> None:
        self.by_namespace: dict[str, ModelServer] = {}

    async def get_job(self, key: Key) -> Manifest | None:
        server = self.by_namespace.get(key.namespace)
        return await server.get_job(key) if server else None

    def __getattr__(self, name: str) -> Any:
        async def call(where: Any, *arguments: Any) -> Any:
            namespace = where if isinstance(where, str) else None
            if namespace is None:
                namespace = where.namespace if isinstance(where, Key) else where["metadata"]["namespace"]
            return await getattr(self.by_namespace[namespace], name)(where, *arguments)

        return call


class Soak:
    """Runs the operator's controller, queue and memory against model servers, with a fake clock."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.seconds = 0.0
        self.servers = Servers()
        self.memory, self.metrics = Memory(self.clock), Metrics()
        self.queue = WorkQueue(clock=self.clock, jitter=self.choose.random)
        times = {"now": self.now, "clock": self.clock}
        self.controller = Controller(
            queue=self.queue,
            reconciler=reconciler(self.servers, memory=self.memory, metrics=self.metrics, **times),
            cluster=self.servers,  # type: ignore[arg-type]
            memory=self.memory,
            activity=WatchActivity(clock=self.clock),
            metrics=self.metrics,
        )
        self.created = 0
        self.events = 0

    def clock(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.seconds)

    def create_job(self) -> None:
        """Create a job in a new namespace."""
        self.created += 1
        manifest = job_manifest()
        manifest["metadata"] |= {"namespace": f"team-{self.created}", "uid": f"uid-{self.created}"}
        self.servers.by_namespace[f"team-{self.created}"] = ModelServer(manifest, self.now())
        self.add_events(f"team-{self.created}")

    def add_events(self, namespace: str) -> None:
        """Add the job of ``namespace`` to the queue one to three times, as watch events do."""
        for _ in range(self.choose.randint(1, 3)):
            self.events += 1
            self.queue.add(Key(namespace, "quickstart"))

    async def work(self) -> None:
        """Reconcile every job whose key is due."""
        while (key := self.queue.pop()) is not None:
            await self.controller._reconcile(key)
            self.queue.done(key)
            # The event loop gets a turn, because the calls of `ModelServer` never wait. Without a turn the loop would
            # keep the cancelled timer of each reconcile's time limit, and the memory would grow.
            await asyncio.sleep(0)

    def random_event(self) -> None:
        """Advance the clock by up to 4 s and choose a job by chance.

        The job is deleted and replaced by a new one, its pods end, a pod is deleted, or there are only watch events.
        """
        self.seconds += self.choose.uniform(0, 4)
        for server in self.servers.by_namespace.values():
            server.now = self.now()
        namespace = self.choose.choice(list(self.servers.by_namespace))
        server = self.servers.by_namespace[namespace]
        fate = self.choose.random()
        if fate < 0.05 or (_settled(server) and fate < 0.5):
            del self.servers.by_namespace[namespace]
            self.add_events(namespace)
            self.create_job()
            return
        if fate < 0.2:
            server.end_pods(self.choose.choice([0, 1, 75, 143]), DONE)
        elif fate < 0.25:
            server.ask_deletion(0)
        self.add_events(namespace)

    def delete_all(self) -> None:
        """Delete every job."""
        for namespace in list(self.servers.by_namespace):
            del self.servers.by_namespace[namespace]
            self.add_events(namespace)


def _settled(server: ModelServer) -> bool:
    conditions = server.job.get("status", {}).get("conditions", [])
    return any(item["type"] == "Succeeded" and item["status"] != "Unknown" for item in conditions)


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("events", [1_000, pytest.param(100_000, marks=pytest.mark.long)])
@pytest.mark.timeout(1800)
async def test_queue_and_memory_do_not_grow_with_deleted_jobs(events: int) -> None:
    soak = Soak(seed=7)
    held: list[int] = []
    for day in range(1, DAYS + 1):
        for _ in range(LIVING):
            soak.create_job()
        while soak.events < day * events / DAYS:
            soak.random_event()
            await soak.work()
        soak.delete_all()
        await soak.work()
        soak.seconds += 400  # longer than any delay of the queue, so that obsolete heap entries are dropped too
        await soak.work()
        assert len(soak.memory.job_keys()) == len(soak.queue) == len(soak.queue._due) == 0
        assert not soak.queue._heap
        assert not soak.queue._failures
        assert not soak.queue._processing
        gc.collect()
        held.append(resident_bytes())
    assert soak.metrics.reconciles.labels(result="error")._value.get() == 0
    print(f"{soak.events} events, {soak.created} jobs in {soak.seconds / 3600:.1f} h; RSS MB {[h >> 20 for h in held]}")
    # Caches and the allocator fill up in the first six of the ten days. After these days the memory must grow by less
    # than 3 MiB.
    assert held[-1] - held[DAYS // 2] < 3 * 2**20, held
