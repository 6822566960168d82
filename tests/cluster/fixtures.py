"""The pytest fixture ``cluster``: a cluster that starts when the first test asks for it and ends with the test session.

A ``conftest.py`` makes the fixture available by ``from tests.cluster.fixtures import cluster  # noqa: F401``. If
several files do so, each of them provides a cluster of its own to the tests in its folder. On a machine that can't run
a cluster, for example without root, tests with the fixture are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, unusable_because


def started() -> Iterator[Cluster]:
    """Start a cluster, yield it, and end it afterwards. If the machine can't run a cluster, skip the test. All fixtures
    that provide a cluster with a node call this generator."""
    reason = unusable_because()
    if reason:
        # The test is skipped instead of failing, so that a developer without root sees no failures in a run of all
        # tests.
        pytest.skip(reason)
    with Cluster.start() as running:
        yield running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster for all tests that get this fixture from the same ``conftest.py``. Most tests create
    Kubernetes namespaces of their own in it, so that they do not disturb each other."""
    yield from started()
