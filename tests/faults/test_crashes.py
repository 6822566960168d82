"""R1: the operator is killed right after any single write, and the job ends as it would have ended without."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from finetune_core.api import GROUP, PLURAL, VERSION
from tests.faults.admin import Manifest
from tests.faults.essence import HASH, differences, essence, events
from tests.faults.proxy import Kill
from tests.faults.world import World, condition, job, settled

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

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
QUICK = ("is drained",)
TOGETHER = (
    ("crashes once", "is refused", "is evicted"),
    ("is given up", "fails outside once", "runs out of memory"),
    ("loses a pod by deletion", "loses a pod without a trace", "is cancelled"),
    ("waits too long", "runs too long", "loses a node"),
    ("is suspended and resumed", "is checked first"),
    ("succeeds", "is drained"),
)
"""Which crash beside each other: few, because each start of the operator looks at all of them before it goes on."""
AGAIN = (8, 1, 1, 1)
"""All trials begin at once first; those whose kill never came are begun again, so many at a time.

One operator serves all of them, so each also goes through the kills of the others, and a restart sees at once what the
fault-free run saw in two looks: such a trial needs fewer writes than that run, and may end before its own kill. Without
others, two changes that follow each other within moments may still come into one look."""
WAVE_SECONDS = 15.0
"""From one beginning of so many to the next: longer than most scenarios take; what happens in the longer ones, which
mostly wait, does not fall together then."""
SPARE, SPARE_OF_SCENARIO = 0.05, 0.1
"""Shares of a group's trials, and of each scenario's, that may be left without a crash at most; of the latter one write
number in any case, because the fault-free run may by chance have made a write more than any other does."""
STATUS = "patch finetunejobs/job/status"
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


def compare(found: End, expected: End) -> Iterator[str]:
    """Yield what differs from the fault-free run of the scenario."""
    trial = found.trial
    if differs := differences(found.essence, expected.essence):
        yield f"{trial}, of {len(expected.writes)} writes: {differs}"
    # An event may be lost with the process that was about to tell it; none is told twice or without cause.
    if surplus := found.events - expected.events:
        yield f"{trial}: events {surplus}"
    assert trial.kill is not None
    if not trial.kill.done and len(found.writes) >= trial.point.after:
        yield f"{trial}: no kill, in spite of {found.writes}"
    if not found.undisturbed:
        return
    # A second run without faults: two changes of its status came into one look, and nothing else may be missing.
    if lost := expected.events - found.events:
        yield f"{trial}: no events {lost}"
    others, wanted = ([write for write in each.writes if write != STATUS] for each in (found, expected))
    if others != wanted:
        yield f"{trial}: {others} instead of {wanted}"


def crash_after_every_write(
    world: World, scenarios: tuple[str, ...], *, tell: tuple[bool, ...], spare: float, timeout: float
) -> None:
    """Compare every crash with the fault-free run of its scenario; begin again until at most the share ``spare`` of all
    trials is left without one."""
    fault_free = run_all(world, [Point(name) for name in scenarios], len(scenarios), timeout)
    expected = {found.trial.point.scenario: found for found in fault_free}
    writes = {scenario: len(found.writes) for scenario, found in expected.items()}
    points = [
        Point(scenario, after, told_first)
        for scenario in scenarios
        for after in range(1, writes[scenario] + 1)
        for told_first in tell
    ]
    wrong: list[str] = []
    left, ends = points, list[End]()
    for together in (len(points), *AGAIN):
        begun = time.monotonic()
        # Kills that fall close together disturb each other least.
        left = sorted(left, key=lambda point: point.after / writes[point.scenario])
        ends = run_all(world, left, together, timeout)
        wrong += [line for found in ends for line in compare(found, expected[found.trial.point.scenario])]
        left = [found.trial.point for found in ends if not found.trial.crashed]
        seconds = time.monotonic() - begun
        print(f"{len(ends)} trials {together} at a time: {len(ends) - len(left)} crashed, {seconds:.0f} s", flush=True)
        if len(left) <= spare * len(points):
            break
    for found in ends:
        if not found.trial.crashed:
            point, how = found.trial.point, "without any fault" if found.undisturbed else "beside others"
            print(f"{point}: {len(found.writes)} of {writes[point.scenario]} writes, {how}")
    print(f"{len(points) - len(left)} of {len(points)} trials crashed; writes of each fault-free run: {writes}")
    missed, tried = (Counter(point.scenario for point in each) for each in (left, points))
    wrong += [
        f"{name}: {missed[name]} of {tried[name]} trials did not crash"
        for name in scenarios
        if missed[name] > max(len(tell), SPARE_OF_SCENARIO * tried[name])
    ]
    if missed.total() > max(spare, SPARE) * len(points):
        wrong.append(f"{missed.total()} of {len(points)} trials did not crash")
    assert not wrong, "\n".join(wrong)


def test_a_crash_after_any_write_changes_nothing(world: World) -> None:
    crash_after_every_write(world, QUICK, tell=(False,), spare=SPARE_OF_SCENARIO, timeout=240)


@pytest.mark.long
@pytest.mark.parametrize("scenarios", TOGETHER, ids=", ".join)
def test_a_crash_after_any_write_of_any_scenario_changes_nothing(world: World, scenarios: tuple[str, ...]) -> None:
    crash_after_every_write(world, scenarios, tell=(False, True), spare=0, timeout=900)


def test_every_scenario_is_crashed() -> None:
    assert sorted(name for scenarios in TOGETHER for name in scenarios) == sorted(SCENARIOS)
