"""R1: the operator is killed right after any single write, and the job ends as it would have ended without."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from finetune_core.api import GROUP, PLURAL, VERSION
from tests.faults.essence import differences, essence, events
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
LEAST_CRASHES = 10
LIST_SECONDS = 1.0
"""Between two lists of all jobs: hundreds of them at every look would take the time that the operator needs."""


@dataclass(frozen=True)
class Trial:
    """One job whose operator dies after its write number ``after`` (0: never)."""

    scenario: str
    namespace: str
    after: int = 0
    tell: bool = False
    kill: Kill | None = None


def begin(world: World, scenario: str, after: int = 0, *, tell: bool = False) -> Trial:
    """Create the job of a scenario in a namespace of its own."""
    words, spec = SCENARIOS[scenario]
    namespace = world.namespace()
    kill = None
    if after:
        kill = Kill(number=after, victim=lambda: world.operator.pid, namespace=namespace, tell=tell)
        world.proxy.kills = [*world.proxy.kills, kill]
    world.create(namespace, job(*words, **spec))
    return Trial(scenario, namespace, after, tell, kill)


def finish(world: World, trials: list[Trial], timeout: float) -> None:
    """Wait until all jobs have ended, starting the operator again whenever it is killed."""
    waiting = {trial.namespace for trial in trials}
    listed_at = 0.0

    def all_settled() -> bool:
        nonlocal listed_at
        world.keep_operator_alive()
        if time.monotonic() - listed_at < LIST_SECONDS:
            return False
        listed_at = time.monotonic()
        waiting.difference_update(found["metadata"]["namespace"] for found in world.jobs() if settled(found))
        return not waiting

    world.wait(f"{len(trials)} jobs to end", all_settled, timeout)


def end_is_told(world: World, namespace: str) -> bool:
    """Whether an event tells how the job of a namespace ended."""
    return condition(world.job(namespace), "Succeeded")["reason"] in events(world, namespace)


def writes_in(world: World, namespace: str) -> int:
    """Return how many writes the operator has made in a namespace."""
    return sum(record.wrote and record.request.namespace == namespace for record in world.proxy.records)


def crash_after_every_write(
    world: World, scenarios: tuple[str, ...], *, tell: tuple[bool, ...], timeout: float
) -> None:
    """Compare every crash with the fault-free run of its scenario."""
    faultless = [begin(world, scenario) for scenario in scenarios]
    finish(world, faultless, timeout)
    for trial in faultless:
        # The event of a job's end follows its status.
        world.wait("the last event", partial(end_is_told, world, trial.namespace))
    expected = {trial.scenario: essence(world, trial.namespace) for trial in faultless}
    told = {trial.scenario: events(world, trial.namespace) for trial in faultless}
    writes = {trial.scenario: writes_in(world, trial.namespace) for trial in faultless}
    trials = [
        begin(world, scenario, after, tell=told_first)
        for scenario in scenarios
        for after in range(1, writes[scenario] + 1)
        for told_first in tell
    ]
    finish(world, trials, timeout)
    crashed = Counter(trial.scenario for trial in trials if trial.kill is not None and trial.kill.done)
    print(f"crashes {dict(crashed)}; writes of each fault-free run: {writes}")
    # Some runs need fewer writes than the fault-free one, as a restart sees at once what that one saw in two looks:
    # their last kills never come. Most must, and some of each scenario.
    wrong = [f"{scenario}: {crashed[scenario]} crashes" for scenario in scenarios if crashed[scenario] < LEAST_CRASHES]
    if crashed.total() < 0.8 * len(trials):
        wrong.append(f"{crashed.total()} of {len(trials)} trials crashed")
    for trial in trials:
        if differs := differences(essence(world, trial.namespace), expected[trial.scenario]):
            wrong.append(f"{trial}, of {writes[trial.scenario]} writes: {differs}")
        # An event may be lost with the process that was about to tell it; none is told twice or without cause.
        if surplus := events(world, trial.namespace) - told[trial.scenario]:
            wrong.append(f"{trial}: events {surplus}")
    for trial in (*faultless, *trials):
        # Each start of the operator would look at them, too.
        world.call("DELETE", f"/apis/{GROUP}/{VERSION}/namespaces/{trial.namespace}/{PLURAL}/job")
    assert not wrong, "\n".join(wrong)


def test_a_crash_after_any_write_changes_nothing(world: World) -> None:
    crash_after_every_write(world, QUICK, tell=(False,), timeout=240)


@pytest.mark.long
@pytest.mark.parametrize("scenarios", TOGETHER, ids=", ".join)
def test_a_crash_after_any_write_of_any_scenario_changes_nothing(world: World, scenarios: tuple[str, ...]) -> None:
    crash_after_every_write(world, scenarios, tell=(False, True), timeout=900)


def test_every_scenario_is_crashed() -> None:
    assert sorted(name for scenarios in TOGETHER for name in scenarios) == sorted(SCENARIOS)
