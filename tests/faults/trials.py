"""Jobs whose lives are scripted, run beside each other while the operator is killed at chosen writes of theirs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_core.api import GROUP, PLURAL, VERSION
from tests.faults.admin import Manifest
from tests.faults.essence import HASH, essence, events
from tests.faults.proxy import Kill
from tests.faults.world import World, condition, job, settled

SCENARIOS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "succeeds": (("done",), {}),
    "crashes once": (("exit-1", "done"), {}),
    "is refused": (("exit-64",), {}),
    "fails outside once": (("exit-75", "done"), {}),
    "is given up": (("exit-75",), {"runPolicy": {"maxRetries": 1}}),
    "runs out of memory": (("oom",), {}),
    "is evicted": (("evicted", "done"), {}),
    "is drained": (("drained", "done"), {}),
    "loses a pod by deletion": (("deleted", "done"), {}),
    "loses a pod without a trace": (("vanished", "done"), {}),
    "loses a node": (("lost", "done"), {}),
    "is checked first": (("done",), {"runPolicy": {"preflight": "Run"}}),
    "is suspended and resumed": (("suspended", "done"), {}),
    "is cancelled": (("cancelled",), {}),
    "runs too long": (("run",), {"runPolicy": {"activeDeadlineSeconds": 60}}),
    "waits too long": (("pending",), {"runPolicy": {"pendingDeadlineSeconds": 60}}),
}
"""Words of the stub node's script, and what is changed in the job's spec."""
WAVE_SECONDS = 15.0
"""From one beginning of so many to the next: longer than most scenarios take; what happens in the longer ones, which
mostly wait, does not fall together then."""
LIST_SECONDS = 1.0
"""Between two lists of all jobs: hundreds of them at every look would take the time that the operator needs."""


@dataclass(frozen=True)
class Point:
    """Where an operator is killed: after write number ``after`` of a scenario (0: nowhere)."""

    scenario: str
    after: int = 0
    tell: bool = False
    """It may have read the answer."""


@dataclass(frozen=True)
class Trial:
    """One job whose operator dies at a point."""

    point: Point
    namespace: str
    operator_since: float
    """When the operator was started that it began with."""
    kill: Kill | None = None

    @property
    def crashed(self) -> bool:
        """Whether its own kill came, and struck the operator that had written."""
        return self.kill is not None and self.kill.struck


@dataclass(frozen=True)
class End:
    """What a trial came to."""

    trial: Trial
    undisturbed: bool
    """One operator served it from its beginning to its end: a run without faults."""
    writes: tuple[str, ...]
    """Of the operator, in order."""
    essence: dict[str, Any]
    events: Counter[str]


def begin(world: World, point: Point) -> Trial:
    """Create the job of a trial in a namespace of its own."""
    words, spec = SCENARIOS[point.scenario]
    namespace = world.namespace()
    kill = None
    if point.after:
        kill = Kill(number=point.after, victim=lambda: world.operator.pid, namespace=namespace, tell=point.tell)
        world.proxy.kills = [*world.proxy.kills, kill]
    world.create(namespace, job(*words, **spec))
    return Trial(point, namespace, world.operator.started_at, kill)


def is_silent(world: World, ended: Manifest) -> bool:
    """Whether nothing more is written about a job that has ended: the event of its end is there, or was lost with the
    operator that had written the status before."""
    namespace = ended["metadata"]["namespace"]
    last = max(record.at for record in world.proxy.records if record.wrote and record.request.namespace == namespace)
    return world.operator.started_at > last or condition(ended, "Succeeded")["reason"] in events(world, namespace)


def writes_in(world: World, namespace: str) -> tuple[str, ...]:
    """Return what the operator has written in a namespace, in order, without hashes."""
    paths = [
        (record.request.verb, record.request.path.partition(f"/{namespace}/")[2])
        for record in world.proxy.records
        if record.wrote and record.request.namespace == namespace
    ]
    return tuple(f"{verb} {HASH.sub('-hash-', path)}" for verb, path in paths)


def run_all(world: World, points: Sequence[Point], together: int, timeout: float) -> list[End]:
    """Run a job for each point, ``together`` at a time, until all have ended and nothing more is written about them;
    start the operator again whenever it is killed."""
    queue = list(points)
    waiting: dict[str, Trial] = {}
    over: list[tuple[Trial, bool]] = []
    next_at = listed_at = 0.0

    def all_over() -> bool:
        nonlocal next_at, listed_at
        world.keep_operator_alive()
        if queue and time.monotonic() >= next_at:
            waiting.update((trial.namespace, trial) for trial in [begin(world, point) for point in queue[:together]])
            del queue[:together]
            next_at = time.monotonic() + WAVE_SECONDS
        if time.monotonic() - listed_at < LIST_SECONDS:
            return False
        listed_at = time.monotonic()
        for found in world.jobs():
            trial = waiting.get(found["metadata"]["namespace"])
            if trial is not None and settled(found) and (trial.crashed or is_silent(world, found)):
                undisturbed = not trial.crashed and trial.operator_since == world.operator.started_at
                over.append((waiting.pop(trial.namespace), undisturbed))
        return not queue and not waiting and world.operator.pid is not None

    world.wait(f"{len(points)} jobs to end", all_over, timeout)
    ends = []
    for trial, undisturbed in over:
        place = trial.namespace
        ends.append(
            End(
                trial,
                undisturbed,
                essence=essence(world, place),
                events=events(world, place),
                # Last, because the proxy notes a write a moment after its object is there.
                writes=writes_in(world, place),
            )
        )
        # Each further start of the operator would look at the job, too.
        world.call("DELETE", f"/apis/{GROUP}/{VERSION}/namespaces/{place}/{PLURAL}/job")
    world.proxy.kills = []
    return ends
