"""The rows of the operator's verdict table (docs/architecture.md) as test cases with real pods. Each case checks
conditions, attempts and events of a job, and the seconds until each milestone (a state that must be reached in time).

All selected cases run on one cluster, each in a namespace of its own. The cases with the second node run one after
another, and all other cases run at the same time. At the end the measured times are printed beside the designed times.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.cluster import Cluster
from tests.cluster.second_node import SecondNode
from tests.e2e.rows import scripts, sidecar
from tests.e2e.rows.late import LATE
from tests.e2e.rows.nodes import NODES
from tests.e2e.rows.observer import Observer
from tests.e2e.rows.row import TOLERANCE, Measured, Row, play
from tests.e2e.rows.stage import Stage
from tests.e2e.rows.table import FAST, SLOW

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

Played = Callable[[Row], list[Measured]]


@pytest.fixture(scope="module")
def played(
    operated: Cluster, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Played]:
    """Start all selected test cases. Return a function that waits for the end of one case and returns its measured
    milestones."""
    rows = {row.name: row for row in _selected(request)}
    with ExitStack() as around:
        operated.import_image(scripts.IMAGE)
        if any(row in SLOW for row in rows.values()):
            operated.import_image(scripts.NO_PROGRAM)
        if any(sidecar.LABEL in row.labels for row in rows.values()):
            around.enter_context(sidecar.injecting(operated, tmp_path_factory.mktemp("injector")))
        node = _second_node(operated, around) if any(row in NODES for row in rows.values()) else None
        observer = Observer()
        around.enter_context(observer.watching(operated))
        finished: dict[str, list[Measured]] = {}

        def on_stage(row: Row) -> list[Measured]:
            stage = Stage.set(operated, observer, node, row.labels)
            try:
                finished[row.name] = play(row, stage)
            finally:
                stage.clear()
            return finished[row.name]

        together = around.enter_context(ThreadPoolExecutor(len(rows)))
        one_by_one = around.enter_context(ThreadPoolExecutor(1))
        running: dict[str, Future[list[Measured]]] = {
            name: (one_by_one if row in NODES else together).submit(on_stage, row) for name, row in rows.items()
        }
        yield lambda row: running[row.name].result()
    _print(request, rows.values(), finished)


def _second_node(cluster: Cluster, around: ExitStack) -> SecondNode:
    node = cluster.second_node()
    around.callback(cluster.kubectl, "delete", "node", node.name)
    around.callback(node.stop)
    cluster.import_image(scripts.IMAGE, node.namespaces)
    return node


def _selected(request: pytest.FixtureRequest) -> list[Row]:
    """Return the rows (test cases) of all tests of this module that pytest runs in this session."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    of_this_module = [item for item in items if item.module is request.module and hasattr(item, "callspec")]
    rows = [item.callspec.params["row"] for item in of_this_module]
    return [row for row in rows if isinstance(row, Row)]


def _print(request: pytest.FixtureRequest, rows: Iterable[Row], finished: dict[str, list[Measured]]) -> None:
    """Print the measured times as a table for docs/performance.md. The table goes to the terminal, although pytest
    captures the output of tests."""
    lines = [
        f"load average {os.getloadavg()[0]:.0f} at the end; seconds, in parentheses the design",
        "| what happens to one of two pods | attempt 1 | until it shows |",
        "|---|---|---|",
    ]
    for row in rows:
        times = [
            f"{one.milestone.name} {one.seconds:.1f} ({one.milestone.bound:g})" for one in finished.get(row.name, [])
        ]
        verdict = ", ".join(row.attempts[0]).replace("|", " or ") if row.attempts else "goes on"
        lines.append(f"| {row.name} | {verdict} | {', '.join(times) or 'failed'} |")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "\n".join(lines), flush=True)


def _assert_in_time(measured: list[Measured]) -> None:
    late = [
        f"{one.milestone.name}: {one.seconds:.1f} s, designed {one.milestone.bound:g}" for one in measured if one.late
    ]
    assert not late, f"later than {TOLERANCE} times the design: {late}"


@pytest.mark.parametrize("row", FAST, ids=lambda row: row.name)
def test_row(played: Played, row: Row) -> None:
    _assert_in_time(played(row))


@pytest.mark.long
@pytest.mark.parametrize("row", [*SLOW, *LATE], ids=lambda row: row.name)
def test_slow_row(played: Played, row: Row) -> None:
    _assert_in_time(played(row))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("row", NODES, ids=lambda row: row.name)
def test_row_of_a_lost_node(played: Played, row: Row) -> None:
    _assert_in_time(played(row))
