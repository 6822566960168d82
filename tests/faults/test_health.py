"""/healthz must fail while lists and watches get no answer, even if all other requests (Lease included) succeed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.operators import OperatorProcess
from tests.faults.rules import Drop, Rule
from tests.faults.world import World

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

RESYNC_SECONDS = 4


@pytest.fixture
def operator(shared_world: World, tmp_path: Path) -> Iterator[OperatorProcess]:
    """An operator for this test only, with a short resync period."""
    shared_world.operator.stop()
    server = f"https://127.0.0.1:{shared_world.proxy.port}"
    process = OperatorProcess(
        shared_world.cluster, tmp_path, server=server, settings={"resync_seconds": str(RESYNC_SECONDS)}
    )
    process.start()
    process.wait_ready()
    yield process
    process.close()
    shared_world.proxy.rules = []


def test_healthz_turns_red_after_three_periods_without_watch_and_list_and_green_again(
    shared_world: World, operator: OperatorProcess
) -> None:
    proxy, process = shared_world.proxy, operator.pid
    assert operator.answers("/healthz")
    cut = Rule(Drop(), verbs=frozenset({"list", "watch"}))
    with proxy.fault(cut):
        shared_world.loop.run(proxy.end_watches())
        operator.wait_for_health("/healthz to turn red", lambda: not operator.answers("/healthz"), 90)
        assert operator.metric("finetune_watch_age_seconds") >= 3 * RESYNC_SECONDS
        assert cut.applied > 0, "nothing was cut"
        assert operator.pid == process, "the operator must not end by itself, because the kubelet restarts it"
        assert operator.metric("finetune_leader") == 1, "the Lease alone does not make it healthy"
    operator.wait_for_health("/healthz to turn green", lambda: operator.answers("/healthz"), 90)
