"""Runs trials: jobs whose pods follow a script, many at the same time, while the operator is killed right after chosen
writes.

`test_crashes.py` and `test_watches.py` compare the results with a run without faults.
"""

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
"""For each scenario, by name: the words of the stub node's script (see stub_node.py), one for each attempt, and the
changes to the job's spec."""
WAVE_SECONDS = 15.0
"""Seconds between the starts of two groups of trials.

Most trials take less time, so the kills of one group rarely disturb the next group.
"""
LIST_SECONDS = 1.0
"""Seconds between two lists of all jobs.

Lists of hundreds of jobs would slow the operator down if they were frequent.
"""


@dataclass(frozen=True)
class Point:
    """The point of a scenario at which the operator is killed: right after write number ``after``, counted from 1. 0
    means no kill."""

    scenario: str
    after: int = 0
    tell: bool = False
    """Whether the operator may have read the answer to the write before the kill."""


@dataclass(frozen=True)
class Trial:
    """One run of a scenario: a job, and the order to kill the operator after one of the job's writes.

    ``kill`` is None in a run without a kill.
    """

    point: Point
    namespace: str
    operator_since: float
    """Start time of the operator process that ran when the job was created, on the monotonic clock."""
    kill: Kill | None = None

    @property
    def crashed(self) -> bool:
        """Whether this trial's own kill has happened and has ended a running operator."""
        return self.kill is not None and self.kill.struck


@dataclass(frozen=True)
class End:
    """The result of a trial."""

    trial: Trial
    undisturbed: bool
    """Whether the same operator process ran from the creation to the end of the job. If True, no kill disturbed the
    run."""
    writes: tuple[str, ...]
    """The writes for which the operator got the answer that they succeeded, in order, for example ``"patch
    finetunejobs/job/status"``."""
    essence: dict[str, Any]
    events: Counter[str]


def begin(world: World, point: Point) -> Trial:
    """Create a job for ``point`` in a new namespace and return the trial."""
    words, spec = SCENARIOS[point.scenario]
    namespace = world.namespace()
    kill = None
    if point.after:
        kill = Kill(number=point.after, victim=lambda: world.operator.pid, namespace=namespace, tell=point.tell)
        world.proxy.kills = [*world.proxy.kills, kill]
    world.create(namespace, job(*words, **spec))
    return Trial(point, namespace, world.operator.started_at, kill)


def is_finished(world: World, ended: Manifest) -> bool:
    """Return whether the operator has nothing more to write about the end of the job ``ended``.

    The result is True in two cases. In the first, the event about the job's end exists. In the second, the operator was
    restarted after its last write in the namespace. If the operator had not created the event before the restart, no
    operator creates it later, so the function does not wait for it.
    """
    namespace = ended["metadata"]["namespace"]
    last = max(record.at for record in world.proxy.records if record.wrote and record.request.namespace == namespace)
    return world.operator.started_at > last or condition(ended, "Succeeded")["reason"] in events(world, namespace)


def writes_in(world: World, namespace: str) -> tuple[str, ...]:
    """Return, in order, the writes in ``namespace`` for which the operator got the answer that they succeeded. In
    names, `-hash-` replaces the hashes."""
    paths = [
        (record.request.verb, record.request.path.partition(f"/{namespace}/")[2])
        for record in world.proxy.records
        if record.wrote and record.request.namespace == namespace
    ]
    return tuple(f"{verb} {HASH.sub('-hash-', path)}" for verb, path in paths)


def run_all(world: World, points: Sequence[Point], together: int, timeout: float) -> list[End]:
    """Run a job for each point, and return the results. ``together`` jobs are started at once, and `WAVE_SECONDS` later
    the next ``together`` jobs.

    A trial whose own kill has happened is over when its job has ended. Any other trial is over when its job has ended
    and the operator has nothing more to write about the end. The operator is started again after each kill.
    """
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
            if trial is not None and settled(found) and (trial.crashed or is_finished(world, found)):
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
                # `writes` is computed last, because the proxy records a write slightly later than the API server
                # carries it out.
                writes=writes_in(world, place),
            )
        )
        # The job is deleted so that later starts of the operator need not reconcile it.
        world.call("DELETE", f"/apis/{GROUP}/{VERSION}/namespaces/{place}/{PLURAL}/job")
    world.proxy.kills = []
    return ends
