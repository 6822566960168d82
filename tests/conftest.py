"""The fixture `cluster` for every test, and the order and the groups in which `make test` runs the tests with
pytest-xdist.

Tests that share a cluster run on one worker, and so do the tests of one file, because they share servers and processes.
The folders that take longest start first, so that both workers end at about the same time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.fixtures import cluster

__all__ = ["cluster"]

TESTS = Path(__file__).parent
FIRST = ("e2e", "trainer", "operator", "faults", "api", "cluster")
"""Folders of `tests/` in the order in which they start. `e2e` and `trainer` compute most and run at the same time; most
of the others mainly wait."""
ONE_CLUSTER = ("e2e", "operator", "faults", "api", "cluster")
"""Folders of `tests/` whose tests share a cluster."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests so that the folders of `FIRST` come first."""
    items.sort(key=lambda item: _rank(item.path.relative_to(TESTS).parts[0]))


def _rank(folder: str) -> int:
    return FIRST.index(folder) if folder in FIRST else len(FIRST)


def group_of(nodeid: str) -> str:
    """Return the name of the group of a test such as ``"tests/e2e/test_rows.py::test_row[exit 1]"``. The name is the
    folder if the folder's tests share a cluster, and else the file."""
    file = nodeid.partition("::")[0]
    folder = file.split("/")[1]
    return folder if folder in ONE_CLUSTER else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler that keeps the tests of a group on one worker. The class is needed because pytest 9.2 ignores
    xdist's own marker for groups."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no type information
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)
