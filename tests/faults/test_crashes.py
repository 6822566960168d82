"""R1 of docs/performance.md: the operator may be killed at any time. For each write of a scenario, a trial kills the
operator right after this write. The long tests have a second trial for each write (`Point.tell`).

Every trial must end like the run without kills.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.faults.essence import differences
from tests.faults.trials import SCENARIOS, End, Point, run_all
from tests.faults.world import World

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

QUICK = ("is drained",)
TOGETHER = (
    ("crashes once", "is refused", "is evicted"),
    ("is given up", "fails outside once", "runs out of memory"),
    ("loses a pod by deletion", "loses a pod without a trace", "is cancelled"),
    ("waits too long", "runs too long", "loses a node"),
    ("is suspended and resumed", "is checked first"),
    ("succeeds", "is drained"),
)
"""Groups of scenarios. The scenarios of a group run at the same time.

The groups are small, because after each start the operator first reconciles all jobs of the group.
"""
AGAIN = (8, 1, 1, 1)
"""For each round after the first: the number of trials that are started at the same time. These rounds repeat the
trials whose own kill did not happen.

The first round runs all trials at once. One operator serves all trials, so the kill of one trial also affects the other
trials. After a restart one reconcile may combine two changes that the fault-free run handled in two reconciles. A trial
with combined changes needs fewer writes, and may end before its own kill. Later rounds therefore run fewer trials at a
time. The last rounds are needed because even in a trial that runs alone, one reconcile may combine two changes in quick
succession.
"""
SPARE, SPARE_OF_SCENARIO = 0.05, 0.1
"""Largest allowed shares of trials whose own kill did not happen. `SPARE` is the share of all trials of a group, unless
the test allows more. `SPARE_OF_SCENARIO` is the share of the trials of one scenario.

In a scenario with few writes, the trials of one write may miss their kill even if they are a larger share than
`SPARE_OF_SCENARIO`, because the fault-free run may by chance have made one write more than the other runs.
"""
STATUS = "patch finetunejobs/job/status"


def compare(found: End, expected: End) -> Iterator[str]:
    """Yield a line for each difference between ``found`` and ``expected`` that no kill explains. ``expected`` is the
    fault-free run of the scenario."""
    trial = found.trial
    if differs := differences(found.essence, expected.essence):
        yield f"{trial}, of {len(expected.writes)} writes: {differs}"
    # An event may be missing, because a killed operator may not have created it. An event that the fault-free run does
    # not have is an error.
    if surplus := found.events - expected.events:
        yield f"{trial}: events {surplus}"
    assert trial.kill is not None
    if not trial.kill.done and len(found.writes) >= trial.point.after:
        yield f"{trial}: no kill, in spite of {found.writes}"
    if not found.undisturbed:
        return
    # The same operator process ran all the time, so no kill disturbed this run. The run may have combined two status
    # writes, but must otherwise equal the expected run.
    if lost := expected.events - found.events:
        yield f"{trial}: no events {lost}"
    others, wanted = ([write for write in each.writes if write != STATUS] for each in (found, expected))
    if others != wanted:
        yield f"{trial}: {others} instead of {wanted}"


def crash_after_every_write(
    world: World, scenarios: tuple[str, ...], *, tell: tuple[bool, ...], spare: float, timeout: float
) -> None:
    """Run a trial for each write of each scenario and each value in ``tell`` (see `Point`), and compare the results
    with the fault-free run of the scenario.

    The trials whose own kill did not happen are repeated in up to four more rounds. The rounds end when the share of
    these trials is at most ``spare``.
    """
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
        # Trials that run at the same time disturb each other least if their kills come at the same time. So the trials
        # are sorted by the relative time of their kill.
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
