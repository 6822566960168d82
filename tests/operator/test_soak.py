"""R14: a day of many short-lived jobs in minutes, with a clock of the test's own: nothing of a job that has gone stays
in queue or memory, and what the operator holds does not grow with the events it has seen."""

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
from finetune_operator.objects.backends.pytorchjob import PyTorchJobBackend
from finetune_operator.process.health import Activity
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.keyqueue import Key, KeyQueue
from finetune_operator.queue.memory import Memory
from finetune_operator.reconcile import Reconciler
from tests.operator.model import Manifest, ModelServer
from tests.operator.worlds import NOW, job_manifest, result

DAYS = 10
LIVING = 20
DONE = result(Outcome.COMPLETED, with_artifact=True)


class Servers:
    """Many model servers, one for each namespace, behind the interface of one."""

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
    """The operator's own parts around model servers, and a clock that jumps."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.seconds = 0.0
        self.servers = Servers()
        self.memory, self.metrics = Memory(self.clock), Metrics()
        self.queue = KeyQueue(clock=self.clock, jitter=self.choose.random)
        reconciler = Reconciler(
            cluster=self.servers,  # type: ignore[arg-type]
            backend=PyTorchJobBackend(self.servers),  # type: ignore[arg-type]
            memory=self.memory,
            metrics=self.metrics,
            trainer_image="trainer:1",
            report_base_url="https://operator:8443",
            ca_bundle=lambda: "CA",
            instance="test",
            preflight="Skip",
            now=self.now,
            clock=self.clock,
        )
        self.controller = Controller(
            queue=self.queue,
            reconciler=reconciler,
            cluster=self.servers,  # type: ignore[arg-type]
            memory=self.memory,
            activity=Activity(clock=self.clock),
            metrics=self.metrics,
        )
        self.born = 0
        self.events = 0

    def clock(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.seconds)

    def bear(self) -> None:
        """Apply a new job in a namespace of its own."""
        self.born += 1
        manifest = job_manifest()
        manifest["metadata"] |= {"namespace": f"team-{self.born}", "uid": f"uid-{self.born}"}
        self.servers.by_namespace[f"team-{self.born}"] = ModelServer(manifest, self.now())
        self.tell(f"team-{self.born}")

    def tell(self, namespace: str) -> None:
        """Let an event arrive, perhaps more than once."""
        for _ in range(self.choose.randint(1, 3)):
            self.events += 1
            self.queue.add(Key(namespace, "quickstart"))

    async def work(self) -> None:
        """Look at every job whose time has come."""
        while (key := self.queue.pop()) is not None:
            await self.controller._reconcile(key)
            self.queue.done(key)
            # The model's answers never wait: without a turn the loop would keep the cancelled timer of every look.
            await asyncio.sleep(0)

    def happen(self) -> None:
        """Let time pass, and something happen to one of the jobs."""
        self.seconds += self.choose.uniform(0, 4)
        for server in self.servers.by_namespace.values():
            server.now = self.now()
        namespace = self.choose.choice(list(self.servers.by_namespace))
        server = self.servers.by_namespace[namespace]
        fate = self.choose.random()
        if fate < 0.05 or (_settled(server) and fate < 0.5):
            del self.servers.by_namespace[namespace]
            self.tell(namespace)
            self.bear()
            return
        if fate < 0.2:
            server.end_pods(self.choose.choice([0, 1, 75, 143]), DONE)
        elif fate < 0.25:
            server.ask_deletion(0)
        self.tell(namespace)

    def end(self) -> None:
        """Delete every job."""
        for namespace in list(self.servers.by_namespace):
            del self.servers.by_namespace[namespace]
            self.tell(namespace)


def _settled(server: ModelServer) -> bool:
    conditions = server.job.get("status", {}).get("conditions", [])
    return any(item["type"] == "Succeeded" and item["status"] != "Unknown" for item in conditions)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("events", [1_000, pytest.param(100_000, marks=pytest.mark.long)])
@pytest.mark.timeout(1800)
async def test_nothing_grows_and_nothing_stays(events: int) -> None:
    soak = Soak(seed=7)
    held: list[int] = []
    for day in range(1, DAYS + 1):
        for _ in range(LIVING):
            soak.bear()
        while soak.events < day * events / DAYS:
            soak.happen()
            await soak.work()
        soak.end()
        await soak.work()
        soak.seconds += 400  # beyond the longest delay, so that void entries of the heap are gone too
        await soak.work()
        assert len(soak.memory) == len(soak.queue) == soak.queue.delayed == 0
        assert not soak.queue._heap
        assert not soak.queue._failures
        assert not soak.queue._busy
        gc.collect()
        held.append(resident_bytes())
    assert soak.metrics.reconciles.labels(result="error")._value.get() == 0
    print(f"{soak.events} events, {soak.born} jobs in {soak.seconds / 3600:.1f} h; RSS MB {[h >> 20 for h in held]}")
    # The first days warm caches and the allocator up; from then on a day leaves nothing behind.
    assert held[-1] - held[DAYS // 2] < 3 * 2**20, held
