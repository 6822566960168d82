"""Fixtures of tests/faults: one control plane with stub node, fault proxy and operator, shared by all tests of this
folder. Some tests also start an operator of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import unusable_because
from tests.faults.world import World, running_world


@pytest.fixture(scope="package")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The control plane, the stub node and the proxy, which all tests of this folder share. An operator is prepared but
    not started."""
    if reason := unusable_because():
        # The control plane needs Linux namespaces, which only root can create.
        pytest.skip(reason)
    with running_world(tmp_path_factory.mktemp("faults")) as running:
        yield running


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """The shared control plane with a ready operator. All faults are removed after the test."""
    shared_world.keep_operator_alive()
    shared_world.operator.wait_ready()
    yield shared_world
    shared_world.proxy.rules, shared_world.proxy.kills = [], []
