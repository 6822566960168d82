"""An operator that was set back to an older version manages the jobs that a newer version has started.

The stored status may hold longer lists, new values, new fields and fields of another shape, and may lack what this
version would have written. `test_spec_skew.py` tests the specs of another version. The tests run `Reconciler` against
`ModelServer`, an in-memory API server.
"""

from __future__ import annotations

import copy

import pytest

from finetune_core.api.conditions import Condition
from finetune_core.api.reading import read_section
from finetune_core.api.status import FineTuneJobStatus
from finetune_operator.kube.client import FIELD_MANAGER
from finetune_operator.queue.memory import Memory
from finetune_operator.status.preservation import preserve
from tests.operator.builders import NOW, job_manifest
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.scenarios import DONE
from tests.operator.skewed_statuses import SKEWS, Json, filled, leaves, replaced, value_at
from tests.operator.test_identity import pass_minutes, while_it_runs


async def a_running_job() -> ModelServer:
    """Return a server whose job runs its first attempt and has reported. Its status has every field that the status of
    such a job can have without a preflight check."""
    server = ModelServer(job_manifest(), NOW)
    await while_it_runs(server, Memory())
    full = filled(FineTuneJobStatus, server.job["status"])
    for name in ("completionTime", "artifact", "preflight"):
        del full[name]
    del full["attempts"]["current"]["cause"], full["attempts"]["nextStartTime"]
    full["attempts"]["recent"] = []
    full["usage"]["holders"] = [pod["metadata"]["uid"] for pod in server.pods]
    server.job["status"] = full
    return server


def put(server: ModelServer, status: Json) -> None:
    """Store ``status`` as another version of the operator writes it."""
    server._version += 1
    server.job["metadata"]["resourceVersion"] = str(server._version)
    server.job["status"] = status


def states(server: ModelServer) -> dict[str, tuple[str, str]]:
    """Return status and reason of each condition of the job."""
    return {item["type"]: (item["status"], item["reason"]) for item in server.job["status"]["conditions"]}


# ---- a status of another version ----


@pytest.mark.parametrize("name", SKEWS)
async def test_a_running_job_with_the_status_of_another_version_goes_on_and_can_be_cancelled(name: str) -> None:
    server = await a_running_job()
    put(server, SKEWS[name](server.job["status"]))
    created, pods = list(server.created), [pod["metadata"]["uid"] for pod in server.pods]
    await pass_minutes(server, 3)
    assert server.created == created
    assert [pod["metadata"]["uid"] for pod in server.pods] == pods
    server.set_policy(cancel=True)
    await pass_minutes(server, 3)
    (succeeded,) = (item for item in server.job["status"]["conditions"] if item["type"] == "Succeeded")
    assert (succeeded["status"], succeeded["reason"]) == ("False", "Cancelled")
    assert (server.created, server.pods) == (created, [])


@pytest.mark.parametrize("name", SKEWS)
async def test_a_job_between_two_attempts_with_the_status_of_another_version_can_be_cancelled(name: str) -> None:
    server = await a_running_job()
    server.end_pods(1)
    await pass_minutes(server, 0.05)
    for verdict in ("Charged", "Permanent"):
        status = copy.deepcopy(server.job["status"])
        status["attempts"]["recent"] = [
            {"number": 1, "verdict": verdict, "reason": "Test", "message": "m", "node": "n"}
            | dict.fromkeys(("startTime", "endTime"), "2026-11-24T12:00:00Z")
        ]
        status["attempts"].pop("current", None)
        put(server, SKEWS[name](status) if name != "every optional field is gone" else status)
        await pass_minutes(server, 0.05)
    server.set_policy(cancel=True)
    await pass_minutes(server, 3)
    assert server.job["status"]["completionTime"]


@pytest.mark.parametrize("name", SKEWS)
async def test_a_running_job_with_a_cause_of_another_version_ends_its_attempt(name: str) -> None:
    server = await a_running_job()
    status = server.job["status"]
    cause = {"verdict": "Charged", "reason": "Test", "message": "m", "node": "n", "time": "2026-11-24T12:00:00Z"}
    status["attempts"]["current"]["cause"] = cause
    put(server, SKEWS[name](status))
    assert server.end_pods(1)
    await pass_minutes(server, 2)
    assert server.job["status"]["attempts"]["recent"][0]["number"] == 1


@pytest.mark.parametrize("name", SKEWS)
async def test_a_running_job_with_the_status_of_another_version_ends_well(name: str) -> None:
    server = await a_running_job()
    put(server, SKEWS[name](server.job["status"]))
    await pass_minutes(server, 1)
    assert server.end_pods(0, DONE)
    await pass_minutes(server, 1)
    (succeeded,) = (item for item in server.job["status"]["conditions"] if item["type"] == "Succeeded")
    assert (succeeded["status"], succeeded["reason"]) == ("True", "Completed")


async def test_any_single_value_of_another_shape_costs_no_other_part_of_the_status_and_no_order() -> None:
    server = await a_running_job()
    known, spec = copy.deepcopy(server.job["status"]), copy.deepcopy(server.job["spec"])
    paths = list(leaves(known))
    assert len(paths) > 150
    for path in paths:
        foreign = replaced(known, path, ["novel"] if isinstance(value_at(known, path), dict) else {"novel": [7]})
        server.job["spec"] = copy.deepcopy(spec)
        put(server, copy.deepcopy(foreign))
        operator, before = reconciler(server), copy.deepcopy((server.pods, server.children, server.config_maps))
        uids = [pod["metadata"]["uid"] for pod in server.pods]
        for _ in range(2):
            await operator.reconcile(KEY)
        assert [pod["metadata"]["uid"] for pod in server.pods] == uids, path
        assert (server.children, server.config_maps) == before[1:], path
        if path[0] not in ("conditions", "observedGeneration"):
            assert server.job["status"][path[0]] == foreign[path[0]], f"{path} is left alone"
        server.set_policy(cancel=True)
        for _ in range(12):
            await operator.reconcile(KEY)
        assert server.job["status"]["completionTime"], path
        assert (server.pods, server.children) == ([], {}), path
        server.pods, server.children, server.config_maps = copy.deepcopy(before)


@pytest.mark.parametrize("order", ["cancel", "suspend"])
@pytest.mark.parametrize(
    "unreadable",
    [
        {"attempts": ["novel"]},
        {"attempts": "novel", "child": "novel"},
        {"attempts": {"started": "1", "current": {"number": "1"}}, "child": ["novel"]},
        {"attempts": {"current": "novel"}},
        {"attempts": "novel", "child": {"kind": "PyTorchJob", "name": "a-" + "9" * 5000, "uid": "u"}},
    ],
    ids=["a list", "a text", "texts", "no current attempt", "a long number"],
)
async def test_an_order_ends_the_pods_of_an_attempt_that_the_status_does_not_tell(
    order: str, unreadable: dict[str, Json]
) -> None:
    server = await a_running_job()
    put(server, server.job["status"] | unreadable)
    await pass_minutes(server, 1)
    assert (len(server.pods), len(server.created)) == (2, 1)
    server.set_policy(**{order: True})
    await pass_minutes(server, 3)
    assert (server.pods, server.children, server.config_maps, len(server.created)) == ([], {}, {}, 1)
    assert states(server)["Succeeded"][1] == ("Cancelled" if order == "cancel" else "Suspended")


async def test_an_order_ends_a_check_that_the_status_does_not_tell() -> None:
    server = ModelServer(job_manifest(runPolicy={"preflight": "Run"}), NOW)
    for _ in range(3):
        await reconciler(server).reconcile(KEY)
    assert server.checks
    put(server, server.job["status"] | {"preflight": "novel"})
    await pass_minutes(server, 1)
    server.set_policy(cancel=True)
    await pass_minutes(server, 1)
    assert states(server)["Succeeded"] == ("False", "Cancelled")
    assert server.checks == []


async def test_a_settled_job_with_the_status_of_another_version_stays_settled() -> None:
    server = await a_running_job()
    server.end_pods(0, DONE)
    await pass_minutes(server, 1)
    known = copy.deepcopy(server.job["status"])
    for name in ("every list is twice as long", "every word is new", "every object has a new field"):
        put(server, SKEWS[name](copy.deepcopy(known)))
        created = list(server.created)
        await pass_minutes(server, 3)
        assert server.created == created, name


async def test_what_somebody_else_left_in_the_place_of_the_current_attempt_is_no_attempt() -> None:
    server = await a_running_job()
    status = server.job["status"]
    past = {"number": 1, "verdict": "Charged", "reason": "Crashed"} | dict.fromkeys(
        ("startTime", "endTime"), "2026-11-24T12:00:00Z"
    )
    status["attempts"] |= {"current": {"novel": 1}, "recent": [past]}
    put(server, status)
    await pass_minutes(server, 1)
    assert server.job["status"]["attempts"]["current"]["number"] == 2


# ---- the status that this version writes ----


def test_what_another_version_has_written_is_kept_and_what_this_one_changes_is_written() -> None:
    stored = {
        "novel": 1, "plan": {"zeroStage": "Auto"}, "image": "a:1", "usage": {"gpuSeconds": 1, "novel": 2},
        "child": {"kind": "PyTorchJob", "name": "a", "novel": 3}, "history": [{"step": n} for n in range(61)],
    }  # fmt: skip
    read = read_section(FineTuneJobStatus, stored, NOW)[0]
    usage = read.usage.model_copy(update={"gpu_seconds": 9}) if read.usage else None
    new = read.model_copy(update={"image": "a:2", "child": None, "usage": usage})
    written = preserve({"metadata": {}, "status": stored}, read.to_json(), new.to_json(), FIELD_MANAGER)
    assert (written["novel"], written["plan"], written["history"]) == (1, {"zeroStage": "Auto"}, stored["history"])
    assert (written["image"], written["usage"]["gpuSeconds"], written["usage"]["novel"]) == ("a:2", 9, 2)
    assert "child" not in written


def test_conditions_of_a_newer_version_are_kept_and_those_of_others_are_left_to_them() -> None:
    def condition(kind: str) -> dict[str, Json]:
        return Condition(
            type=kind, status="True", observed_generation=1, last_transition_time=NOW, reason="Http"
        ).to_json()

    stored = {"conditions": [condition(kind) for kind in ("Ready", "Suspended", "QuotaReserved")]}
    owned: Json = {'k:{"type":"Ready"}': {}, 'k:{"type":"Suspended"}': {}}
    fields = {"manager": FIELD_MANAGER, "subresource": "status", "fieldsV1": {"f:status": {"f:conditions": owned}}}
    read = read_section(FineTuneJobStatus, stored, NOW)[0].to_json()
    written = preserve({"metadata": {"managedFields": [fields]}, "status": stored}, read, read, FIELD_MANAGER)
    assert [item["type"] for item in written["conditions"]] == ["Ready", "Suspended"]


async def test_an_attempt_that_another_version_runs_by_another_kind_of_object_is_not_repeated() -> None:
    server = await a_running_job()
    status = copy.deepcopy(server.job["status"])
    status["child"] |= {"kind": "JobSet", "uid": "jobset"}
    put(server, status)
    (name,) = server.children
    server.children = {}
    for pod in server.pods:
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": f"{name}-0", "uid": "j", "controller": True}
        pod["metadata"]["ownerReferences"] = [owner]
    await pass_minutes(server, 10)
    assert server.created == [name]
    assert len(server.pods) == 2
    assert server.job["status"]["attempts"]["current"]["number"] == 1
    assert states(server)["Accepted"] == ("False", "BadInput")
    server.set_policy(cancel=True)
    await pass_minutes(server, 1)
    assert states(server)["Succeeded"] == ("False", "Cancelled")
