"""A job whose status and uid are new takes over what a former job of the same namespace, name and training has done.

The preflight check finds the former run; these tests set the termination message of the check's pod themselves.
tests/trainer/test_former_runs.py tests how the check finds a run, and tests/e2e/test_restore.py tests both together.
"""

from __future__ import annotations

import copy
import json
from datetime import date
from typing import Any

import pytest

from finetune_core.contract import Outcome, RunConfig
from finetune_core.contract.preflight_result import PreflightResult
from tests.operator.builders import FORMER_UID, NOW, UID, former_run, job_manifest
from tests.operator.conftest import condition
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.scenarios import DONE

FOLDER = "s3://finetune/runs/team/quickstart"


async def settle(server: ModelServer) -> None:
    """Reconcile until the operator no longer asks for another reconcile without a pause."""
    operator = reconciler(server)
    for _ in range(20):
        if (await operator.reconcile(KEY)).after != 0:
            return
    raise AssertionError(server.job.get("status"))


async def checked(message: str, **spec: Any) -> ModelServer:
    """Return the server with a job whose preflight check ended with ``message``."""
    server = ModelServer(job_manifest(runPolicy={"preflight": "Run"}, **spec), NOW)
    await settle(server)
    assert server.end_check(0, message)
    await settle(server)
    return server


def roots(server: ModelServer) -> list[str]:
    """Return the URI of the folder of the job's runs (`storage.uri`) from each run file that exists."""
    return [RunConfig.model_validate_json(item["data"]["run.json"]).storage.uri for item in server.config_maps.values()]


async def test_a_restored_job_settles_on_the_artifact_without_an_attempt() -> None:
    server = await checked(former_run(done=True))
    status = server.job["status"]
    succeeded = condition(server.job, "Succeeded")
    assert (succeeded["status"], succeeded["reason"]) == ("True", "Completed")
    assert status["artifact"]["uri"] == f"{FOLDER}/{FORMER_UID}/artifacts/000002"
    assert status["attempts"]["started"] == 0
    assert (server.children, server.config_maps, server.checks) == ({}, {}, []), "nothing of the check is left"
    taken = status["preflight"]["takenOver"]
    assert (taken["runId"], taken["uid"], taken["step"]) == (FORMER_UID, FORMER_UID, 70)
    assert taken["time"].startswith("2026-11-23T12:00:00")
    for part in (FORMER_UID, "2026-11-23 12:00:00 UTC", "`storage.runId`", "`training.seed`"):
        assert part in taken["message"], part
        assert part in succeeded["message"], part
    assert [event["reason"] for event in server.events if event["reason"] == "TakenOver"] == ["TakenOver"]
    writes = list(server.writes)
    await settle(server)
    assert server.writes == writes


async def test_a_restored_job_that_requires_more_than_the_artifact_reached_fails_and_has_the_artifact() -> None:
    server = await checked(former_run(done=True, outcome=Outcome.GATE_FAILED))
    succeeded = condition(server.job, "Succeeded")
    assert (succeeded["status"], succeeded["reason"]) == ("False", "GateFailed")
    assert server.job["status"]["artifact"]["uri"] == f"{FOLDER}/{FORMER_UID}/artifacts/000002"
    assert server.job["status"]["attempts"]["started"] == 0


async def test_a_half_trained_run_is_resumed_in_its_folder_by_every_attempt() -> None:
    server = await checked(former_run(done=False))
    assert roots(server) == [f"{FOLDER}/{FORMER_UID}"]
    assert server.end_pods(1, "")
    await settle(server)
    server.pass_time(400)
    await settle(server)
    assert server.job["status"]["attempts"]["started"] == 2
    assert set(roots(server)) == {f"{FOLDER}/{FORMER_UID}"}
    taken = server.job["status"]["preflight"]["takenOver"]
    assert taken["message"].startswith("resumes from the checkpoint of step 70")


def days(server: ModelServer) -> list[date | None]:
    """Return the date of chat templates from each run file that exists, oldest first."""
    files = [RunConfig.model_validate_json(item["data"]["run.json"]) for item in server.config_maps.values()]
    return [file.template_date for file in files]


@pytest.mark.parametrize(
    ("former", "day"), [(None, NOW.date()), (date(2026, 11, 3), date(2026, 11, 3))], ids=["new", "former"]
)
async def test_every_attempt_reads_conversations_with_the_date_of_the_first_one(former: date | None, day: date) -> None:
    """The second attempt starts on the day after the first attempt, and gets the date of the first attempt. A job that
    takes over a former run gets the date of that run."""
    answer = PreflightResult(findings=[]).to_termination_message()
    message = former_run(done=False, template_date=former) if former is not None else answer
    dataset = job_manifest()["spec"]["dataset"] | {"format": {"messages": {}}}
    server = await checked(message, dataset=dataset)
    assert days(server) == [day]
    server.pass_time(86_000)
    assert server.end_pods(1, "")
    await settle(server)
    server.pass_time(1000)
    await settle(server)
    assert server.job["status"]["attempts"]["started"] == 2
    assert set(days(server)) == {day}


async def test_a_job_without_conversations_has_no_date() -> None:
    assert days(await checked(former_run(done=False, template_date=date(2026, 11, 3)))) == [None]


async def test_a_job_keeps_its_own_folder_where_nothing_or_only_its_own_run_is_found() -> None:
    nothing = PreflightResult(findings=[]).to_termination_message()
    for message in (nothing, former_run(done=False, uid=UID, run_id=UID)):
        server = await checked(message)
        assert roots(server) == [f"{FOLDER}/{UID}"]
        assert "takenOver" not in server.job["status"]["preflight"]


async def test_a_job_that_lost_only_its_status_settles_on_its_own_artifact() -> None:
    server = await checked(former_run(done=True, uid=UID, run_id=UID))
    status = server.job["status"]
    assert condition(server.job, "Succeeded")["message"].endswith(f"{FOLDER}/{UID}/artifacts/000002")
    assert "takenOver" not in status["preflight"]


async def test_a_job_that_took_a_run_over_and_lost_its_status_goes_on_in_the_same_folder() -> None:
    server = await checked(former_run(done=False, uid=UID))
    assert roots(server) == [f"{FOLDER}/{FORMER_UID}"]


async def test_a_chosen_folder_that_the_job_filled_itself_is_no_news() -> None:
    storage = job_manifest()["spec"]["storage"] | {"runId": "study"}
    server = await checked(former_run(done=False, uid=UID, run_id="study"), storage=storage)
    assert roots(server) == [f"{FOLDER}/study"]
    assert "takenOver" not in server.job["status"]["preflight"]


async def test_a_chosen_folder_that_another_job_filled_is_named_as_taken_over() -> None:
    storage = job_manifest()["spec"]["storage"] | {"runId": "study"}
    server = await checked(former_run(done=False, run_id="study"), storage=storage)
    assert roots(server) == [f"{FOLDER}/study"]
    assert server.job["status"]["preflight"]["takenOver"]["uid"] == FORMER_UID


@pytest.mark.parametrize("run_id", ["../../other/job/x", "a/b", "..", "", "x" * 64, "-a", "a\n"])
async def test_an_answer_that_names_a_folder_elsewhere_is_not_a_result(run_id: str) -> None:
    message = json.loads(former_run(done=True))
    message["found"]["runId"] = run_id
    server = await checked(json.dumps(message))
    assert roots(server) == [f"{FOLDER}/{UID}"]
    assert "artifact" not in server.job["status"]


async def test_a_run_that_was_found_is_forgotten_where_the_check_is_dropped() -> None:
    """A job that is suspended before its check ends is checked anew later, because its data may change meanwhile."""
    server = ModelServer(job_manifest(runPolicy={"preflight": "Run"}), NOW)
    await settle(server)
    server.set_policy(suspend=True)
    await settle(server)
    server.set_policy(suspend=False)
    await settle(server)
    assert server.end_check(0, former_run(done=True))
    await settle(server)
    assert condition(server.job, "Succeeded")["reason"] == "Completed"


async def test_the_same_job_applied_to_a_new_cluster_trains_nothing_again() -> None:
    """A job that Velero restores, or that is applied from Git, has a new uid and no status."""
    server = await checked(PreflightResult(findings=[]).to_termination_message())
    assert server.end_pods(0, DONE)
    await settle(server)
    restored = copy.deepcopy(server.job)
    restored.pop("status")
    restored["metadata"]["uid"] = "5f0e2f3c-0000-4000-8000-00000000beef"
    anew = ModelServer(restored, NOW)
    await settle(anew)
    assert anew.end_check(0, former_run(done=True, uid=UID, run_id=UID))
    await settle(anew)
    assert condition(anew.job, "Succeeded")["reason"] == "Completed"
    assert (anew.created, anew.job["status"]["attempts"]["started"]) == ([], 0)


async def test_of_an_ended_job_only_the_checks_that_it_owns_are_removed() -> None:
    server = ModelServer(job_manifest(runPolicy={"preflight": "Run"}), NOW)
    await settle(server)
    foreign = copy.deepcopy(server.checks[0])
    foreign["metadata"] |= {"name": "planted", "uid": "planted"}
    foreign["metadata"]["ownerReferences"][0]["uid"] = "another"
    assert server.end_check(0, former_run(done=True))
    operator = reconciler(server)
    while condition(server.job, "Succeeded")["status"] == "Unknown":
        await operator.reconcile(KEY)
    # The operator stops right after the write that ends the job, and another operator goes on.
    assert len(server.checks) == 1
    server.checks.append(foreign)
    await settle(server)
    assert [check["metadata"]["name"] for check in server.checks] == ["planted"]
