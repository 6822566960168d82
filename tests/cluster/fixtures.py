"""The pytest fixture ``cluster``: one cluster for the whole test session. It starts when the first test asks for it.

A ``conftest.py`` makes the fixture available by ``from tests.cluster.fixtures import cluster  # noqa: F401``. On a
machine that can't run a cluster, for example without root, tests with the fixture are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, unusable_because


def started() -> Iterator[Cluster]:
    """Start a cluster, yield it, and end it afterwards. If the machine can't run a cluster, skip the test. Each fixture
    that provides a cluster takes it from this generator."""
    reason = unusable_because()
    if reason:
        # The test is skipped and does not fail, so that a developer without root sees no failures when all tests are
        # run.
        pytest.skip(reason)
    with Cluster.start() as running:
        yield running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster for all tests of the session. Each test creates Kubernetes namespaces of its own in it."""
    yield from started()
