"""One control plane with stub node, proxy and operator for all gates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import unusable_because
from tests.faults.world import World, running_world


@pytest.fixture(scope="package")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """All of it, up for the whole package."""
    if reason := unusable_because():
        # The control plane needs namespaces of its own, which only root makes.
        pytest.skip(reason)
    with running_world(tmp_path_factory.mktemp("faults")) as running:
        yield running


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """The world with an operator that runs and is ready; without faults again afterwards."""
    shared_world.keep_operator_alive()
    shared_world.operator.wait_ready()
    yield shared_world
    shared_world.proxy.rules, shared_world.proxy.kills = [], []
