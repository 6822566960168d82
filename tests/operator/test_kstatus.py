"""Flux and other users of kstatus get the right word for a job in each of its states.

The tests run `Reconciler` against `ModelServer`, an in-memory API server.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from finetune_core.api.crd import custom_resource_definition
from finetune_core.contract import Outcome
from finetune_core.contract.preflight_result import FindingKind
from finetune_core.names import attempt_name
from finetune_operator.decide.out_of_memory import HALVINGS_LIMIT
from finetune_operator.queue.memory import Memory
from tests.operator.builders import NOW, UID, job_manifest, result
from tests.operator.kstatus import kstatus
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.scenarios import DONE, found
from tests.operator.test_identity import pass_minutes, report, running

State = Callable[[], Awaitable[ModelServer]]


def created(**policy: Any) -> ModelServer:
    """Return a server with a job that the operator has not seen yet. The job's status is the default of the CRD."""
    manifest = job_manifest(runPolicy=policy)
    schema = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    manifest["status"] = copy.deepcopy(schema["properties"]["status"]["default"])
    return ModelServer(manifest, NOW)


async def no_status_yet() -> ModelServer:
    return created()


async def preflight_runs() -> ModelServer:
    server = created(preflight="Run")
    await pass_minutes(server, 0.2)
    return server


async def preflight_waits_for_something() -> ModelServer:
    server = await preflight_runs()
    assert server.end_check(75, found(FindingKind.OUTSIDE, "Secret s does not exist"))
    await pass_minutes(server, 0.1)
    return server


async def queued() -> ModelServer:
    server = created(queueName="gpu")
    await running(server)
    server.hold_child()
    await pass_minutes(server, 0.5)
    return server


async def starting() -> ModelServer:
    server = created()
    server.pods_run = False
    await pass_minutes(server, 0.5)
    return server


async def reporting(**changes: Any) -> ModelServer:
    server, memory = created(), Memory()
    await running(server, memory)
    news = report(server.pods[0]["metadata"]["uid"]).model_copy(update=changes)
    memory.store_report(KEY, UID, news, server.now)
    await pass_minutes(server, 0.5, memory)
    return server


async def checkpoint_overdue() -> ModelServer:
    return await reporting(checkpoint_problem="the store is down", checkpoint_age_seconds=900)


async def field_not_honoured() -> ModelServer:
    server = await reporting()
    server.job["spec"]["tracking"] = {"mlflow": {"trackingUri": "https://mlflow"}}
    server.set_policy()
    await pass_minutes(server, 0.5)
    return server


async def retrying() -> ModelServer:
    server = await reporting()
    server.end_pods(1)
    await pass_minutes(server, 0.1)
    return server


async def suspended() -> ModelServer:
    server = await reporting()
    server.set_policy(suspend=True)
    await pass_minutes(server, 0.5)
    return server


async def created_suspended() -> ModelServer:
    server = created(suspend=True)
    await pass_minutes(server, 0.5)
    return server


async def suspended_elsewhere() -> ModelServer:
    server = await reporting()
    server.hold_child()
    await pass_minutes(server, 0.5)
    return server


async def backend_unavailable() -> ModelServer:
    server = created()
    server.refuses = "exceeded quota"
    await pass_minutes(server, 0.5)
    return server


async def name_conflict() -> ModelServer:
    server = created()
    name = attempt_name("quickstart", UID, 1)
    server.children[name] = {"metadata": {"name": name, "uid": "foreign"}, "spec": {}}
    await pass_minutes(server, 0.5)
    return server


async def cancelling() -> ModelServer:
    server = await reporting()
    server.saving = 60
    server.set_policy(cancel=True)
    await pass_minutes(server, 0.3)
    return server


async def ended(exit_code: int, message: str = "", **policy: Any) -> ModelServer:
    server = created(**policy)
    await running(server)
    assert server.end_pods(exit_code, message)
    await pass_minutes(server, 2)
    return server


async def completed() -> ModelServer:
    return await ended(0, DONE)


async def early_stopped() -> ModelServer:
    return await ended(0, result(Outcome.EARLY_STOPPED, with_artifact=True))


async def bad_input() -> ModelServer:
    return await ended(64, result(Outcome.BAD_INPUT, "no column"))


async def diverged() -> ModelServer:
    return await ended(65, result(Outcome.DIVERGED, "the loss is NaN"))


async def out_of_memory() -> ModelServer:
    """A job that runs out of memory with every micro-batch that is tried."""
    server = created()
    while kstatus(server.job) == "InProgress":
        assert server.job["status"].get("attempts", {}).get("started", 0) <= HALVINGS_LIMIT + 1
        await running(server)
        assert server.end_pods(66, result(Outcome.OUT_OF_MEMORY, "phase"))
        await pass_minutes(server, 2)
    return server


async def retries_exhausted() -> ModelServer:
    return await ended(1, maxRetries=0)


async def deadline_exceeded() -> ModelServer:
    server = created(activeDeadlineSeconds=60)
    await pass_minutes(server, 3)
    return server


async def cancelled() -> ModelServer:
    server = await reporting()
    server.set_policy(cancel=True)
    await pass_minutes(server, 1)
    return server


def then_edited(state: State, **policy: Any) -> State:
    """Return the state that follows when a person edits `runPolicy` of a job in ``state``."""

    async def edited() -> ModelServer:
        server = await state()
        server.set_policy(**policy)
        await pass_minutes(server, 1)
        return server

    edited.__name__ = f"{state.__name__}_then_edited"
    return edited


ENDS: dict[State, tuple[str, str]] = {
    completed: ("Current", "Completed"),
    early_stopped: ("Current", "EarlyStopped"),
    bad_input: ("Failed", "BadInput"),
    diverged: ("Failed", "Diverged"),
    out_of_memory: ("Failed", "OutOfMemory"),
    retries_exhausted: ("Failed", "RetriesExhausted"),
    deadline_exceeded: ("Failed", "DeadlineExceeded"),
    cancelled: ("Failed", "Cancelled"),
}
STATES: dict[State, tuple[str, str]] = {
    no_status_yet: ("InProgress", ""),
    preflight_runs: ("InProgress", "Preflight"),
    preflight_waits_for_something: ("InProgress", "Preflight"),
    queued: ("InProgress", "Queued"),
    starting: ("InProgress", "Starting"),
    reporting: ("InProgress", "Running"),
    checkpoint_overdue: ("InProgress", "Running"),
    field_not_honoured: ("InProgress", "Running"),
    retrying: ("InProgress", "Retrying"),
    suspended: ("InProgress", "Suspended"),
    created_suspended: ("InProgress", "Suspended"),
    suspended_elsewhere: ("InProgress", "Suspended"),
    backend_unavailable: ("InProgress", "BackendUnavailable"),
    name_conflict: ("InProgress", "NameConflict"),
    cancelling: ("InProgress", "Cancelled"),
    **ENDS,
    then_edited(completed, ttlSecondsAfterFinished=86400): ("Current", "Completed"),
    then_edited(bad_input, maxRetries=9): ("Failed", "BadInput"),
}
"""For each state of a job the word of kstatus, and the reason of the condition Succeeded."""


def without_generations(server: ModelServer) -> dict[str, Any]:
    """Return the job's status without `observedGeneration`, which the status and each of its conditions have."""
    status: dict[str, Any] = copy.deepcopy(server.job["status"])
    for part in (status, *status["conditions"]):
        del part["observedGeneration"]
    return status


def summary(server: ModelServer) -> tuple[str, str]:
    """Return kstatus' word for the job, and the reason of its condition Succeeded."""
    conditions = server.job["status"].get("conditions", [])
    reasons = [item["reason"] for item in conditions if item["type"] == "Succeeded"]
    return kstatus(server.job), "".join(reasons)


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
async def test_kstatus_has_the_right_word_for_each_state(state: State) -> None:
    assert summary(await state()) == STATES[state]


def test_kstatus_takes_a_job_without_any_status_for_a_finished_one() -> None:
    """The CRD has a default for `status`, so that kstatus does not take a new job for a finished one."""
    assert kstatus(job_manifest()) == "Current"


@pytest.mark.parametrize("state", ENDS, ids=lambda state: state.__name__)
async def test_an_edit_of_an_ended_job_is_observed_with_one_write_and_changes_nothing_else(state: State) -> None:
    server = await state()
    before = without_generations(server)
    for edit in ({"ttlSecondsAfterFinished": 86400}, {"suspend": True}, {"cancel": True}, {"maxRetries": 9}):
        server.set_policy(**edit)
        assert kstatus(server.job) == "InProgress"
        written = server.writes.count("status")
        await pass_minutes(server, 2)
        assert summary(server) == ENDS[state], edit
        assert server.writes.count("status") == written + 1, edit
        assert without_generations(server) == before, edit
        observed = {item["observedGeneration"] for item in server.job["status"]["conditions"]}
        assert observed == {server.job["metadata"]["generation"]}


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
async def test_conditions_of_others_cost_no_write_and_are_never_lost(state: State) -> None:
    server = await state()
    await pass_minutes(server, 1)
    foreign = {
        "type": "QuotaReserved",
        "status": "True",
        "observedGeneration": 1,
        "lastTransitionTime": "2026-11-24T12:00:00Z",
        "reason": "Http503",
        "message": "by somebody else",
    }
    server.job["status"].setdefault("conditions", []).append(foreign)
    operator = reconciler(server)
    await operator.reconcile(KEY)
    written = server.writes.count("status")
    for _ in range(10):
        await operator.reconcile(KEY)
    assert server.writes.count("status") == written
    server.set_policy(cancel=True)
    await pass_minutes(server, 3)
    assert foreign in server.job["status"]["conditions"]
    assert len({item["type"] for item in server.job["status"]["conditions"]}) == 9
