"""A job whose `model.adapter.job` names another job: when it waits, when it is refused, and which artifact it starts
from. `tests/trainer/test_adapter_sources.py` tests what the trainer does with that artifact."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from finetune_core.api.status import FineTuneJobStatus
from finetune_core.contract import AdapterArtifact, AdapterOrigin, RunConfig
from finetune_operator.decide.initial_adapter import LOOK_SECONDS
from finetune_operator.status.report_merge import adapter_of, merge_report
from tests.operator.builders import NOW, job_manifest
from tests.operator.conftest import condition
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.scenarios import report_of

Manifest = dict[str, Any]
ADDRESS = "s3://finetune/runs/team/first/uid-of-first/artifacts/000001"
SHA256 = "ab" * 32


def first_job(**changes: Any) -> Manifest:
    """Return a job `first` that has succeeded with an adapter. ``changes`` are fields of its status."""
    manifest = job_manifest()
    manifest["metadata"] |= {"name": "first", "uid": "uid-of-first"}
    manifest["status"] = {
        "observedGeneration": 1,
        "conditions": [ended("True", "Completed")],
        "artifact": {"uri": ADDRESS, "step": 10, "bytes": 12, "manifestSha256": SHA256},
        **changes,
    }
    return manifest


def ended(status: str, reason: str) -> Manifest:
    """Return the condition Succeeded."""
    return {
        "type": "Succeeded",
        "status": status,
        "reason": reason,
        "observedGeneration": 1,
        "lastTransitionTime": NOW.isoformat(),
        "message": "",
    }


def second_job(name: str = "first", use: str = "Continue", **spec: Any) -> ModelServer:
    """Return a server with a job that starts from the adapter of the job ``name``."""
    manifest = job_manifest(**{"runPolicy": {"preflight": "Skip"}, **spec})
    manifest["spec"]["model"] = manifest["spec"]["model"] | {"adapter": {"job": {"name": name}, "use": use}}
    manifest["spec"].pop("lora", None)
    return ModelServer(manifest, NOW)


async def settle(server: ModelServer) -> float | None:
    """Reconcile until the operator no longer asks for another reconcile without a pause. Return the seconds after which
    it asks for one, or None if it asks for none."""
    operator = reconciler(server)
    for _ in range(20):
        after = (await operator.reconcile(KEY)).after
        if after != 0:
            return after
    raise AssertionError(server.job.get("status"))


def run_files(server: ModelServer) -> list[RunConfig]:
    return [RunConfig.model_validate_json(item["data"]["run.json"]) for item in server.config_maps.values()]


@pytest.mark.parametrize("preflight", ["Run", "Skip"])
async def test_a_job_starts_from_the_artifact_that_the_other_job_has_committed(preflight: str) -> None:
    server = second_job(runPolicy={"preflight": preflight})
    server.others["first"] = first_job()
    await settle(server)
    recorded = server.job["status"]["adapter"]
    assert recorded == {
        "use": "Continue",
        "source": ADDRESS,
        "revision": "",
        "jobUid": "uid-of-first",
        "manifestSha256": SHA256,
        "sha256": "",
    }
    (config,) = run_files(server)
    assert config.adapter_artifact == AdapterArtifact(uri=ADDRESS, manifest_sha256=SHA256, job_uid="uid-of-first")
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha) == (None, None), "the trainer takes them from the adapter"


async def test_the_record_is_written_before_any_pod_is_created() -> None:
    server = second_job()
    server.others["first"] = first_job()
    await reconciler(server).reconcile(KEY)
    assert server.writes == ["status"]
    assert "adapter" in server.job["status"]


DELETED = first_job()
DELETED["metadata"]["deletionTimestamp"] = NOW.isoformat()
UNREADABLE = first_job()
UNREADABLE["spec"]["method"] = "Alchemy"
WAITS: dict[str, tuple[Manifest | None, str]] = {
    "missing": (None, "there is no FineTuneJob first"),
    "deleted": (DELETED, "there is no FineTuneJob first"),
    "running": (first_job(conditions=[ended("Unknown", "Running")], artifact=None), "(now: Running)"),
    "new": (first_job(conditions=[], artifact=None), "waits until FineTuneJob first has succeeded"),
    "of another version": (UNREADABLE, "can't read the spec of FineTuneJob first"),
}


@pytest.mark.parametrize("name", WAITS)
async def test_a_job_waits_without_pods_until_the_other_job_has_succeeded(name: str) -> None:
    server = second_job()
    other, told = WAITS[name]
    if other is not None:
        server.others["first"] = other
    assert await settle(server) == LOOK_SECONDS
    accepted = condition(server.job, "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "OutsideFailure")
    assert accepted["message"].startswith("model.adapter.job: ")
    assert told in accepted["message"]
    assert condition(server.job, "Succeeded")["status"] == "Unknown"
    assert (server.checks, server.children) == ([], {})
    server.others["first"] = first_job()
    await settle(server)
    assert server.job["status"]["attempts"]["started"] == 1
    assert condition(server.job, "Accepted")["status"] == "True"


FULL, MERGED, ELSEWHERE = first_job(), first_job(), first_job()
FULL["spec"] = {**FULL["spec"], "method": "Full"}
FULL["spec"].pop("lora", None)
MERGED["spec"]["storage"] = {**MERGED["spec"]["storage"], "artifact": "Merged"}
ELSEWHERE["spec"]["storage"] = {**ELSEWHERE["spec"]["storage"], "endpoint": "http://elsewhere:9000"}
REFUSED: dict[str, tuple[Manifest, str]] = {
    "full": (FULL, "is a whole model"),
    "merged": (MERGED, "is a whole model"),
    "elsewhere": (ELSEWHERE, "storage.endpoint"),
    "failed": (first_job(conditions=[ended("False", "Diverged")], artifact=None), "has ended with Diverged"),
    "gate": (first_job(conditions=[ended("False", "GateFailed")]), "has ended with GateFailed"),
    "without artifact": (first_job(artifact=None), "names no committed artifact"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_job_ends_without_pods_where_the_other_job_has_no_adapter_to_give(name: str) -> None:
    server = second_job()
    server.others["first"], told = REFUSED[name]
    await settle(server)
    succeeded = condition(server.job, "Succeeded")
    assert (succeeded["status"], succeeded["reason"]) == ("False", "BadInput")
    assert succeeded["message"].startswith("model.adapter.job: ")
    assert told in succeeded["message"]
    assert condition(server.job, "Accepted")["message"] == succeeded["message"]
    assert (server.checks, server.children, server.tried) == ([], {}, [])


async def test_a_job_that_names_itself_ends() -> None:
    server = second_job(name="quickstart")
    await settle(server)
    assert condition(server.job, "Succeeded")["message"] == "model.adapter.job: must not name the job itself"


NOT_OF_ITS_RUNS = {
    "another bucket": {"uri": ADDRESS.replace("finetune/", "secrets/", 1)},
    "another job": {"uri": ADDRESS.replace("team/first", "team/other")},
    "another namespace": {"uri": ADDRESS.replace("team/first", "staff/first")},
    "a way out": {"uri": ADDRESS.replace("uid-of-first", "..")},
    "no artifact": {"uri": ADDRESS.replace("artifacts", "checkpoints")},
    "a deeper folder": {"uri": f"{ADDRESS}/merged"},
    "no address": {"uri": "x" * 1024},
    "a line feed": {"uri": f"{ADDRESS}\n"},
    "no digest": {"manifestSha256": "z" * 64},
    "a short digest": {"manifestSha256": "ab"},
}
"""Fields of the artifact in a status that somebody else than the operator has written."""


@pytest.mark.parametrize("name", NOT_OF_ITS_RUNS)
async def test_an_artifact_that_no_run_of_the_other_job_can_have_written_is_not_read(name: str) -> None:
    server = second_job()
    named = {"uri": ADDRESS, "step": 10, "bytes": 12, "manifestSha256": SHA256, **NOT_OF_ITS_RUNS[name]}
    server.others["first"] = first_job(artifact=named)
    await settle(server)
    succeeded = condition(server.job, "Succeeded")
    assert (succeeded["status"], succeeded["reason"]) == ("False", "BadInput")
    assert "names no committed artifact of its runs" in succeeded["message"]
    assert (server.children, server.config_maps) == ({}, {})


@pytest.mark.parametrize(
    "status", [{"conditions": "x"}, {"artifact": [1]}, {"adapter": 7}, {"conditions": [{}]}], ids=str
)
async def test_a_status_of_the_other_job_that_can_not_be_read_stops_no_reconcile(status: Manifest) -> None:
    server = second_job()
    server.others["first"] = first_job(**status)
    await settle(server)
    readable = "adapter" in status
    assert (condition(server.job, "Accepted")["status"] == "True") is readable
    assert bool(server.children) is readable


def waiting_job(name: str, other: str) -> Manifest:
    """Return a job ``name`` that waits for the adapter of the job ``other``."""
    manifest = first_job(conditions=[ended("Unknown", "Pending")], artifact=None)
    manifest["metadata"] |= {"name": name, "uid": f"uid-of-{name}"}
    manifest["spec"]["model"] = manifest["spec"]["model"] | {"adapter": {"job": {"name": other}, "use": "Continue"}}
    return manifest


@pytest.mark.parametrize("between", [[], ["a"], ["a", "b", "c"]], ids=len)
async def test_jobs_that_wait_for_each_other_in_a_circle_end(between: list[str]) -> None:
    server = second_job()
    chain = ["first", *between, "quickstart"]
    for name, other in pairwise(chain):
        server.others[name] = waiting_job(name, other)
    await settle(server)
    succeeded = condition(server.job, "Succeeded")
    assert (succeeded["status"], succeeded["reason"]) == ("False", "BadInput")
    assert "must not name a job that waits for this one: FineTuneJob first" in succeeded["message"]


@pytest.mark.parametrize("end", ["", "missing", "a"])
async def test_a_job_waits_at_the_end_of_a_chain_of_jobs_that_is_no_circle(end: str) -> None:
    server = second_job()
    server.others["first"] = waiting_job("first", "a")
    server.others["a"] = waiting_job("a", end) if end else first_job(conditions=[], artifact=None)
    assert await settle(server) == LOOK_SECONDS
    assert condition(server.job, "Succeeded")["status"] == "Unknown"


@pytest.mark.parametrize(
    "status",
    [
        {"adapter": {"use": "Continue", "source": ADDRESS, "jobUid": "gone", "manifestSha256": SHA256}},
        {"attempts": {"started": 1, "current": {"number": 1, "startTime": NOW.isoformat()}}},
    ],
    ids=["record", "attempt"],
)
async def test_a_job_of_a_former_circle_that_has_its_adapter_is_waited_for(status: Manifest) -> None:
    server = second_job()
    server.others["first"] = waiting_job("first", "quickstart")
    server.others["first"]["status"] |= status
    assert await settle(server) == LOOK_SECONDS


async def test_the_deadline_of_the_check_does_not_run_while_a_job_waits_for_another_job() -> None:
    server = second_job(runPolicy={"preflight": "Run", "pendingDeadlineSeconds": 60})
    await settle(server)
    server.pass_time(7200)
    assert await settle(server) == LOOK_SECONDS
    server.others["first"] = first_job()
    await settle(server)
    assert condition(server.job, "Succeeded")["status"] == "Unknown"
    assert len(server.checks) == 1


async def test_a_named_job_that_is_deleted_and_created_anew_changes_nothing_once_its_artifact_is_recorded() -> None:
    server = second_job()
    server.others["first"] = first_job()
    await settle(server)
    again = first_job(artifact={"uri": f"{ADDRESS}9", "step": 1, "bytes": 1, "manifestSha256": "cd" * 32})
    again["metadata"]["uid"] = "another-uid"
    server.others["first"] = again
    assert server.end_pods(1, "")
    await settle(server)
    server.pass_time(400)
    await settle(server)
    assert server.job["status"]["attempts"]["started"] == 2
    assert {config.adapter_artifact.uri for config in run_files(server) if config.adapter_artifact} == {ADDRESS}
    del server.others["first"]
    assert server.end_pods(1, "")
    await settle(server)
    server.pass_time(400)
    await settle(server)
    assert server.job["status"]["attempts"]["started"] == 3
    assert server.job["status"]["adapter"]["jobUid"] == "uid-of-first"


@pytest.mark.parametrize("left", [None, {"use": "Continue", "source": ADDRESS, "sha256": "cd" * 32}], ids=str)
async def test_a_record_that_was_lost_is_written_again_before_the_next_attempt(left: Manifest | None) -> None:
    """An older operator drops `status.adapter`, and a report may write this field again without `jobUid`."""
    server = second_job()
    server.others["first"] = first_job()
    await settle(server)
    server.job["status"].pop("adapter")
    if left is not None:
        server.job["status"]["adapter"] = left
    del server.others["first"]
    assert server.end_pods(1, "")
    await settle(server)
    server.pass_time(400)
    assert await settle(server) == LOOK_SECONDS
    assert server.job["status"]["attempts"]["started"] == 1
    assert "there is no FineTuneJob first" in condition(server.job, "Accepted")["message"]
    server.others["first"] = first_job()
    await settle(server)
    assert server.job["status"]["attempts"]["started"] == 2
    found = {config.adapter_artifact.uri if config.adapter_artifact else "" for config in run_files(server)}
    assert found == {ADDRESS}


async def test_before_the_record_the_name_means_the_job_that_has_it_now() -> None:
    server = second_job()
    server.others["first"] = first_job(conditions=[ended("Unknown", "Running")], artifact=None)
    await settle(server)
    again = first_job()
    again["metadata"]["uid"] = "another-uid"
    server.others["first"] = again
    await settle(server)
    assert server.job["status"]["adapter"]["jobUid"] == "another-uid"


@pytest.mark.parametrize("order", [{"suspend": True}, {"cancel": True}])
async def test_orders_are_obeyed_while_a_job_waits_for_another_job(order: dict[str, bool]) -> None:
    server = second_job()
    await settle(server)
    server.set_policy(**order)
    await settle(server)
    reason = condition(server.job, "Succeeded")["reason"]
    assert reason == ("Suspended" if "suspend" in order else "Cancelled")


def test_the_status_says_which_adapter_the_trainer_has_read() -> None:
    told = AdapterOrigin(use="Merge", source="team/adapter", revision="c0ffee", sha256="cd" * 32)
    merged = merge_report(FineTuneJobStatus(), report_of(1).model_copy(update={"adapter": told}), NOW).adapter
    assert merged is not None
    assert (merged.use, merged.source, merged.revision) == ("Merge", "team/adapter", "c0ffee")
    assert (merged.sha256, merged.job_uid) == ("cd" * 32, "")


def test_a_report_does_not_change_which_artifact_of_another_job_counts() -> None:
    stored = adapter_of(None, AdapterOrigin(use="Continue", source=ADDRESS, sha256=SHA256))
    stored = stored.model_copy(update={"job_uid": "uid-of-first", "manifest_sha256": SHA256, "sha256": ""})
    told = AdapterOrigin(use="Merge", source="s3://elsewhere/x", sha256="cd" * 32)
    assert adapter_of(stored, told) == stored.model_copy(update={"sha256": "cd" * 32})
