"""The pytest fixture ``cluster``: one cluster for the whole test session, which starts when the first test asks for the
fixture.

A ``conftest.py`` imports the fixture by ``from tests.cluster.fixtures import cluster  # noqa: F401``. Without root,
tests that ask for the fixture are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, unusable_because


def started() -> Iterator[Cluster]:
    """Start a cluster, yield it, and end it afterwards. Skip the test if the machine can't run a cluster. Fixtures use
    this generator as their body."""
    reason = unusable_because()
    if reason:
        # A cluster needs root and namespaces of its own. A developer without root can still run all other tests.
        pytest.skip(reason)
    with Cluster.start() as running:
        yield running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster, which all tests of the session share. A test creates a Kubernetes namespace of its own."""
    yield from started()
