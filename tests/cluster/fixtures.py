"""The fixture ``cluster`` for pytest: one cluster for the whole session, started when the first test asks for it.

A ``conftest.py`` makes it known with ``from tests.cluster.fixtures import cluster  # noqa: F401``. Without root the
tests that ask for it are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, unusable_because


def started() -> Iterator[Cluster]:
    """Yield a running cluster and end it; skip where none can run. The body of a fixture."""
    reason = unusable_because()
    if reason:
        # A cluster needs root and namespaces of its own: without them a developer still runs all other tests.
        pytest.skip(reason)
    with Cluster.start() as running:
        yield running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster, shared by all tests of the session: use a namespace of your own."""
    yield from started()
