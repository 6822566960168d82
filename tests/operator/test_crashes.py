"""A crash after any single write changes nothing: the job ends as without it, no attempt is doubled or lost."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_core.contract import Outcome
from finetune_core.names import attempt_name
from finetune_operator.keyqueue import Key
from finetune_operator.memory import Memory
from finetune_operator.metrics import Metrics
from finetune_operator.pytorchjob import PyTorchJobBackend
from finetune_operator.reconcile import Reconciler
from tests.operator.model import CrashedError, ModelServer, Script
from tests.operator.worlds import NOW, UID, job_manifest, result

KEY = Key("team", "quickstart")
DONE = result(Outcome.COMPLETED, with_artifact=True)

LIVES: dict[str, Script] = {
    "succeeds at once": [lambda world: world.end_pods(0, DONE)],
    "crashes, then succeeds": [lambda world: world.end_pods(1), lambda world: world.end_pods(0, DONE)],
    "loses a pod, then succeeds": [lambda world: world.delete_pod(1), lambda world: world.end_pods(0, DONE)],
    "is refused": [lambda world: world.end_pods(64, result(Outcome.BAD_INPUT, "no column"))],
    "is given up": [lambda world: world.end_pods(75)] * 4,
}


def reconciler(server: ModelServer) -> Reconciler:
    """Return an operator that has just started."""
    return Reconciler(
        cluster=server,  # type: ignore[arg-type]
        backend=PyTorchJobBackend(server),  # type: ignore[arg-type]
        memory=Memory(),
        metrics=Metrics(),
        trainer_image="trainer:1",
        report_base_url="https://operator:8443",
        ca_bundle=lambda: "CA",
        instance="test",
        now=lambda: server.now,
        clock=lambda: server.now.timestamp(),
    )


async def live(script: Script, crash_after: int | None = None) -> ModelServer:
    """Run a job to its end, restarting the operator where it crashes."""
    server = ModelServer(job_manifest(), NOW, crash_after=crash_after)
    operator = reconciler(server)
    events = list(script)
    for _ in range(400):
        try:
            outcome = await operator.reconcile(KEY)
        except CrashedError:
            operator = reconciler(server)
            continue
        if _settled(server):
            return server
        if events and outcome.after != 0 and _attempt(server) == len(script) - len(events) + 1 and events[0](server):
            events.pop(0)
            continue
        server.pass_time(outcome.after or 1)
    raise AssertionError(f"the job did not end: {server.job.get('status')}")


def _attempt(server: ModelServer) -> int:
    current = server.job.get("status", {}).get("attempts", {}).get("current")
    return int(current["number"]) if current and server.pods else 0


def _settled(server: ModelServer) -> bool:
    conditions = server.job.get("status", {}).get("conditions", [])
    return any(item["type"] == "Succeeded" and item["status"] != "Unknown" for item in conditions)


def _essence(server: ModelServer) -> dict[str, Any]:
    """Return what must not depend on a crash: everything but times."""
    status = server.job["status"]
    attempts = status["attempts"]
    return {
        "conditions": [(item["type"], item["status"], item["reason"]) for item in status["conditions"]],
        "counts": (attempts["started"], attempts["charged"], attempts["free"]),
        "recent": [(past["number"], past["verdict"], past["reason"]) for past in attempts["recent"]],
        "artifact": status.get("artifact"),
        "created": server.created,
        "left": (sorted(server.children), sorted(server.config_maps)),
    }


@pytest.mark.parametrize("name", LIVES)
async def test_a_crash_after_any_write_changes_nothing(name: str) -> None:
    script = LIVES[name]
    faultless = await live(script)
    expected = _essence(faultless)
    attempts = len(script)
    assert expected["created"] == [attempt_name("quickstart", UID, n + 1) for n in range(attempts)]
    assert len(expected["left"][0]) == 1
    for crash_after in range(1, len(faultless.writes) + 1):
        crashed = await live(script, crash_after)
        assert _essence(crashed) == expected, f"crash after write {crash_after}: {crashed.writes[crash_after - 1]}"


async def test_a_settled_job_is_written_no_more() -> None:
    server = await live(LIVES["succeeds at once"])
    writes = list(server.writes)
    for _ in range(3):
        await reconciler(server).reconcile(KEY)
        server.pass_time(15)
    assert server.writes == writes


async def test_pods_that_outlive_the_job_go_with_their_child() -> None:
    server = await live(LIVES["succeeds at once"])
    server.pass_time(61)
    await reconciler(server).reconcile(KEY)
    assert server.children == {}


async def test_nothing_happens_twice_without_news() -> None:
    server = ModelServer(job_manifest(), NOW)
    operator = reconciler(server)
    for _ in range(5):
        await operator.reconcile(KEY)
    writes = list(server.writes)
    for _ in range(5):
        await operator.reconcile(KEY)
    assert server.writes == writes
