"""The fixture `cluster` for all tests, and the order and the groups in which `make test` runs the tests with
pytest-xdist.

pytest-xdist runs the tests in two processes (workers), and those of `make unit` in three. All tests of a group run in
the same worker. A group is one of the folders in `ONE_CLUSTER`, whose tests share a cluster, or a file of another
folder, whose tests may share servers and processes. The folders that take longest start first, so that all workers end
at about the same time.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.cluster.fixtures import cluster
from tests.trainer.zygote import Zygote

__all__ = ["cluster"]

# torch computes in a single thread. The workers share the processors, and threads of torch that wait for each other
# keep a processor busy. torch is imported only later, and reads the variable then.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A property test draws the same values in each run. So if a test fails that succeeded before, a change of the code is
# the cause. `make test-long` draws new values in each run. A property has no deadline, because the time that a value
# takes depends on what else the machine does.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("new-values", deadline=None)
settings.load_profile("repeatable")

TESTS = Path(__file__).parent
FIRST = ("e2e", "trainer", "operator", "faults", "api", "cluster")
"""Folders of `tests/` in the order in which they start. `e2e` and `trainer` come first, because they need the most CPU
time and can run at the same time. The tests of most other folders spend most of their time waiting."""
FIRST_WITHOUT_CLUSTER = ("operator", "trainer")
"""The same for `make unit`. There the tests of `operator`, which run in one worker, are the group that takes longest.
If they did not start first, they would still run when the other workers have no more files to run."""
ONE_CLUSTER = ("e2e", "operator", "faults", "api", "cluster")
"""Folders of `tests/` whose tests all run in one worker. In each folder, all tests that need a cluster share one,
except tests that start a cluster of their own."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import all test files while the garbage collector is switched off. Otherwise the imports would spend half of
    their time in the collector, which would look at the imported objects again and again.

    `gc.freeze` excludes the imported objects from later collections too, because all of them stay until the end. As the
    collector then does not write to these objects, forked processes share the memory of the objects with this process
    for longer.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests so that the folders of `FIRST` come first. If no test uses a cluster, the folders of
    `FIRST_WITHOUT_CLUSTER` come first instead. pytest calls this hook last, when it has already removed the tests that
    are not to run."""
    first = FIRST if any(item.get_closest_marker("cluster") for item in items) else FIRST_WITHOUT_CLUSTER
    items.sort(key=lambda item: _rank(item.path.relative_to(TESTS).parts[0], first))


def _rank(folder: str, first: Sequence[str]) -> int:
    return first.index(folder) if folder in first else len(first)


def group_of(nodeid: str) -> str:
    """Return the name of the group to which a test belongs. ``nodeid`` is for example
    ``"tests/e2e/test_rows.py::test_row[exit 1]"``.

    Tests of the folders in `ONE_CLUSTER` are grouped by folder, all other tests by file.
    """
    file = nodeid.partition("::")[0]
    folder = file.split("/")[1]
    return folder if folder in ONE_CLUSTER else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler with which pytest-xdist runs all tests of a group in one worker. xdist's own marker for groups
    can't be used, because pytest 9.2 ignores it."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no type information
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures of a test are made, allow the test to start processes of a training only if it has the marker
    `gang` or `long`."""
    Zygote.allowed = any(item.get_closest_marker(name) for name in ("gang", "long"))
