"""Fixtures for every test, and how `make test` spreads the suite over two workers with pytest-xdist.

Tests that share a cluster stay together on one worker, as do those of one file, because they share servers and
processes; what takes longest begins first, so that the workers end together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.fixtures import cluster

__all__ = ["cluster"]

TESTS = Path(__file__).parent
FIRST = ("e2e", "trainer", "operator", "faults", "api", "cluster")
"""Folders in the order in which they begin: training in pods and training in processes at the same time, then what
mostly waits."""
ONE_CLUSTER = ("e2e", "operator", "faults", "api", "cluster")
"""Folders whose tests share a cluster."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the folders that take longest to the front."""
    items.sort(key=lambda item: _rank(item.path.relative_to(TESTS).parts[0]))


def _rank(folder: str) -> int:
    return FIRST.index(folder) if folder in FIRST else len(FIRST)


def group_of(nodeid: str) -> str:
    """Return the group of a test such as `tests/e2e/test_rows.py::test_row[exit 1]`: its cluster, else its file."""
    file = nodeid.partition("::")[0]
    folder = file.split("/")[1]
    return folder if folder in ONE_CLUSTER else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return the scheduler that keeps groups together. xdist's own groups by marker are not seen by pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no type information
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)
