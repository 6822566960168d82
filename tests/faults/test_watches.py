"""R7 of docs/performance.md: the operator copes with watches that lose, repeat or reorder events, with missed
deletions, and with old lists."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.faults.essence import differences
from tests.faults.rules import (
    WRITES,
    Answer,
    CutWatch,
    EditEvents,
    Fault,
    Rule,
    ServeOld,
    dropping,
    duplicating,
    swapping,
)
from tests.faults.trials import Point, run_all
from tests.faults.world import World, job
from tests.operator.builders import is_observed

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]

WATCHED = "finetunejobs|pytorchjobs|pods"
DISTURBANCES: dict[str, Callable[[], Fault]] = {
    "every second event is lost": lambda: EditEvents(dropping(lambda number: number % 2 == 0)),
    "every event is lost": lambda: EditEvents(dropping(lambda number: True)),
    "every event comes twice": lambda: EditEvents(duplicating),
    "events change places": lambda: EditEvents(swapping()),
    "every watch ends after three events": lambda: CutWatch(3),
}
WATCHED_SCENARIOS = ("succeeds", "fails outside once", "is drained")


@pytest.fixture(scope="module")
def undisturbed(shared_world: World) -> dict[str, Any]:
    """The essence (see essence.py) of each scenario in a run without faults, by the name of the scenario."""
    shared_world.keep_operator_alive()
    return run_scenarios(shared_world, 120)


def run_scenarios(world: World, timeout: float) -> dict[str, Any]:
    """Run the scenarios at the same time and return the essence of each."""
    ends = run_all(world, [Point(scenario) for scenario in WATCHED_SCENARIOS], len(WATCHED_SCENARIOS), timeout)
    return {end.trial.point.scenario: end.essence for end in ends}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_disturbed_watches_change_nothing_but_the_time(world: World, undisturbed: dict[str, Any], name: str) -> None:
    rules = [Rule(DISTURBANCES[name](), verbs=frozenset({"watch"}), path=kind) for kind in WATCHED.split("|")]
    with world.proxy.fault(*rules):
        world.loop.run(world.proxy.end_watches())
        began = time.monotonic()
        # If the watch event of a change is lost, the operator finds the change at the next resync, after up to 30 s.
        found = run_scenarios(world, 300)
        print(f"{name}: {len(WATCHED_SCENARIOS)} jobs ended after {time.monotonic() - began:.1f} s")
    assert any(rule.applied for rule in rules)
    assert found.keys() == undisturbed.keys()
    for scenario, expected in undisturbed.items():
        assert not differences(found[scenario], expected), scenario


def test_deletions_in_the_gap_before_an_expired_watch_are_found(world: World) -> None:
    namespace = world.namespace()
    world.create(namespace, job("run", name="one"), job("run", name="two"))
    for name in ("one", "two"):
        world.wait_job(namespace, "both pods", lambda found: len(_pods(found)) == 2, name=name)
    child = next(
        each for each in world.children(namespace) if each["metadata"]["labels"]["finetune.dev/job-name"] == "one"
    )
    blind = Rule(Answer(500, "InternalError"), verbs=frozenset({"watch"}), path=WATCHED)
    with world.proxy.fault(blind):
        world.loop.run(world.proxy.end_watches())
        world.wait("a watch that fails", lambda: blind.applied)
        world.call("DELETE", f"/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs/{child['metadata']['name']}")
        world.call("DELETE", f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs/two")
    with world.proxy.fault(Rule(Answer(410, "Expired"), verbs=frozenset({"watch"}), path=WATCHED, times=3)):
        world.wait("attempt 2", lambda: _lives(world, namespace), 3 * 60)
    world.wait("the deleted job's child to be gone", lambda: len(world.children(namespace)) == 1, 30)


def _lives(world: World, namespace: str) -> bool:
    world.keep_operator_alive()
    return bool(world.job(namespace, "one")["status"]["attempts"]["started"] == 2)


def _pods(found: dict[str, Any]) -> list[dict[str, Any]]:
    return list(found["status"]["attempts"].get("current", {}).get("pods", []))


def _with_both_pods(world: World, namespace: str) -> dict[str, Any] | None:
    # After a watch has got the status 410, the operator's process may end within 15 s. If the process has ended, it is
    # started again here.
    world.keep_operator_alive()
    found = world.job(namespace)
    return found if is_observed(found) and len(_pods(found)) == 2 else None


def test_a_server_that_shows_the_past_leads_to_nothing_foreign(world: World) -> None:
    """The operator must not treat the objects of a deleted job as objects of a new job with the same name.

    The test deletes the job. Then it makes lists and watches show the old objects again, and creates the new job.
    """
    namespace = world.namespace()
    world.create(namespace, job("run"))
    first = world.wait("both pods", partial(_with_both_pods, world, namespace))
    past = world.call("GET", f"/api/v1/namespaces/{namespace}/pods")["metadata"]["resourceVersion"]
    world.call("DELETE", f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs/job")
    world.wait("the first job's objects to be gone", lambda: not world.children(namespace), 60)
    before = len(world.proxy.records)
    with world.proxy.fault(Rule(ServeOld(past), verbs=frozenset({"list", "watch"}), path=WATCHED)):
        world.loop.run(world.proxy.end_watches())
        world.create(namespace, job("run"))
        second = world.wait_job(namespace, "a child of its own", lambda found: found["status"].get("child"), 120)
    second = world.wait("both pods", partial(_with_both_pods, world, namespace), 120)
    assert second["metadata"]["uid"] != first["metadata"]["uid"]
    assert second["status"]["attempts"]["started"] == 1
    assert second["status"]["attempts"]["recent"] == []
    told = ("progress", "metrics", "history", "checkpoints", "evaluation", "incidents", "notices", "artifact")
    assert not [name for name in told if second["status"].get(name)], "the new job shows nothing of the old one"
    assert {pod["uid"] for pod in _pods(second)}.isdisjoint({pod["uid"] for pod in _pods(first)})
    assert [child["metadata"]["ownerReferences"][0]["uid"] for child in world.children(namespace)] == [
        second["metadata"]["uid"]
    ]
    written = [
        record.request.path
        for record in world.proxy.records[before:]
        if record.request.verb in WRITES and record.request.namespace == namespace
    ]
    old_child = first["status"]["child"]["name"]
    assert not [path for path in written if old_child in path]
