"""Fixtures for every test, and how the suite is spread over two workers.

`make test` runs with pytest-xdist: tests that share a cluster stay together on one worker, as do those of one file,
because they share servers and processes; the long groups begin first, so that the workers end together.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.fixtures import cluster

__all__ = ["cluster"]

FIRST = ("e2e", "trainer", "operator", "faults", "api", "cluster")
"""Folders in the order in which they begin: training in pods and training in processes at the same time, then what
mostly waits."""
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name the group of each test, and bring the groups that take longest to the front."""
    for item in items:
        file = item.path.relative_to(TESTS)
        group = file.parts[0] if item.get_closest_marker("cluster") else str(file)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> tuple[int, bool]:
    folder = item.path.relative_to(TESTS).parts[0]
    return (FIRST.index(folder) if folder in FIRST else len(FIRST), item.get_closest_marker("cluster") is None)
