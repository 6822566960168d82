"""An operator that was set back to an older version looks after the jobs that a newer version has started.

The stored status and spec may hold longer lists, new values, new fields and fields of another shape, and may lack what
this version would have written. The tests run `Reconciler` against `ModelServer`, an in-memory API server.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from finetune_core.api.conditions import Condition
from finetune_core.api.reading import read_section
from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import FineTuneJobStatus
from finetune_operator.kube.client import FIELD_MANAGER
from finetune_operator.queue.memory import Memory
from finetune_operator.status.preservation import preserve
from tests.operator.builders import NOW, job_manifest
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.test_crashes import DONE
from tests.operator.test_identity import pass_minutes, running, while_it_runs

Json = Any
ENUMS = ("status", "reason", "verdict", "kind", "action", "rows")
"""Names of status fields whose values are words from a list. Some of these lists are closed enums and some are open."""


# ---- a status with every field, and what another version makes of it ----


def plain(annotation: Any) -> Any:
    """Return the type in ``annotation`` without bounds and without None."""
    while get_args(annotation) and get_origin(annotation) is not list:
        annotation = get_args(annotation)[0]
    return annotation


def sample(annotation: Any) -> Json:
    """Return a value of the type ``annotation`` as JSON."""
    kind = plain(annotation)
    if get_origin(kind) is list:
        return [sample(get_args(kind)[0])]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return filled(kind, {})
    if kind is datetime:
        return "2026-11-24T11:00:00Z"
    return {bool: False, int: 1}.get(kind, "Test")


def filled(model: type[BaseModel], known: dict[str, Json]) -> dict[str, Json]:
    """Return ``known`` with a sample value in every field of ``model`` that it lacks, at every depth."""
    result = dict(known)
    for name, info in model.model_fields.items():
        key, kind = info.alias or name, plain(info.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel) and key in known:
            result[key] = filled(kind, known[key])
        elif not known.get(key):
            result[key] = sample(info.annotation)
    return result


def with_doubled_lists(value: Json) -> Json:
    """Return ``value`` with every list twice as long. Each copied condition gets a new type, because a list of
    conditions has each type only once."""
    if isinstance(value, dict):
        return {key: with_doubled_lists(inner) for key, inner in value.items()}
    if isinstance(value, list):
        items = [with_doubled_lists(item) for item in value]
        again = [
            item | {"type": f"{item['type']}2"} if isinstance(item, dict) and "type" in item else item for item in items
        ]
        return [*items, *again]
    return value


def with_new_words(value: Json, key: str = "") -> Json:
    """Return ``value`` with a new value in every field that `ENUMS` names."""
    if isinstance(value, dict):
        return {name: with_new_words(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_new_words(item) for item in value]
    return "Novel7: x" if key in ENUMS else value


def with_new_fields(value: Json) -> Json:
    """Return ``value`` with an unknown field in every object."""
    if isinstance(value, dict):
        return {name: with_new_fields(inner) for name, inner in value.items()} | {"novel": {"deep": [1]}}
    return [with_new_fields(item) for item in value] if isinstance(value, list) else value


def without_optional_fields(value: Json, annotation: Any = FineTuneJobStatus) -> Json:
    """Return ``value`` without the fields that the models do not require. The current attempt stays."""
    kind = plain(annotation)
    if get_origin(kind) is list:
        return [without_optional_fields(item, get_args(kind)[0]) for item in value]
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return value
    fields = {info.alias or name: info for name, info in kind.model_fields.items()}
    needed = {"attempts", "current"}
    return {
        key: without_optional_fields(inner, fields[key].annotation)
        for key, inner in value.items()
        if fields[key].is_required() or key in needed
    }


def without_required_fields(value: Json, annotation: Any = FineTuneJobStatus) -> Json:
    """Return ``value`` without the fields that the models require. Conditions keep `type`, the key of their list.

    The number of the current attempt stays: no operator can do without it.
    """
    kind = plain(annotation)
    if get_origin(kind) is list:
        return [without_required_fields(item, get_args(kind)[0]) for item in value]
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return value
    fields = {info.alias or name: info for name, info in kind.model_fields.items()}
    return {
        key: without_required_fields(inner, fields[key].annotation)
        for key, inner in value.items()
        if not fields[key].is_required() or key in ("number", "type")
    }


def with_long_texts(value: Json, key: str = "") -> Json:
    """Return ``value`` with much longer texts, except for names, times and words from a list."""
    if isinstance(value, dict):
        return {name: with_long_texts(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_long_texts(item, key) for item in value]
    named = key in ("name", "uid", "type", "holders", "kind", *ENUMS) or key.lower().endswith("time")
    return value * 3000 if isinstance(value, str) and not named else value


def with_large_numbers(value: Json, key: str = "") -> Json:
    """Return ``value`` with much larger numbers, except for numbers of attempts, indexes of pods and the active
    seconds."""
    if isinstance(value, dict):
        return {name: with_large_numbers(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_large_numbers(item, key) for item in value]
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value * 10**7 if is_count and key not in ("number", "index", "started", "activeSeconds") else value


SKEWS: dict[str, Callable[[Json], Json]] = {
    "every list is twice as long": with_doubled_lists,
    "every word is new": with_new_words,
    "every object has a new field": with_new_fields,
    "every optional field is gone": without_optional_fields,
    "every required field is gone": without_required_fields,
    "every text is long": with_long_texts,
    "every number is large": with_large_numbers,
    "all at once": lambda value: with_doubled_lists(with_new_words(with_new_fields(value))),
}


def leaves(value: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of all values in ``value``, also of objects and lists."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from leaves(item, (*path, number))


def value_at(value: Json, path: tuple[str | int, ...]) -> Json:
    """Return the value at ``path`` in ``value``."""
    for step in path:
        value = value[step]
    return value


def replaced(value: Json, path: tuple[str | int, ...], new: Json) -> Json:
    """Return a copy of ``value`` with ``new`` at ``path``."""
    result = copy.deepcopy(value)
    value_at(result, path[:-1])[path[-1]] = new
    return result


async def a_running_job() -> ModelServer:
    """Return a server whose job runs and has reported, and has every status field that a job can have while it runs."""
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


# ---- a spec of another version ----

SPECS: dict[str, Callable[[dict[str, Json]], Any]] = {
    "a new field": lambda spec: spec.update(novel=True),
    "a new section in runPolicy": lambda spec: spec.setdefault("runPolicy", {}).update(backend="Job"),
    "a new method": lambda spec: spec.update(method="DoRA"),
    "resources of another shape": lambda spec: spec.update(resources=spec.get("resources", {}) | {"cpu": {"min": 1}}),
    "no dataset": lambda spec: spec.pop("dataset"),
}


def states(server: ModelServer) -> dict[str, tuple[str, str]]:
    """Return status and reason of each condition of the job."""
    return {item["type"]: (item["status"], item["reason"]) for item in server.job["status"]["conditions"]}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("restarted", [False, True])
async def test_the_spec_of_another_version_ends_no_attempt_and_every_order_is_obeyed(
    name: str, restarted: bool
) -> None:
    server, memory = ModelServer(job_manifest(), NOW), Memory()
    await while_it_runs(server, memory)
    before = states(server)
    SPECS[name](server.job["spec"])
    memory = Memory() if restarted else memory
    await pass_minutes(server, 2, memory)
    now = states(server)
    assert (now["Running"], now["Scheduled"]) == (before["Running"], before["Scheduled"])
    assert now["Accepted"] == ("False", "BadInput")
    assert len(server.pods) == 2
    reporting = memory.reporting_attempt(KEY)
    assert reporting is not None
    assert len(reporting.pod_uids) == 2
    server.set_policy(suspend=True)
    await pass_minutes(server, 1, memory)
    assert states(server)["Succeeded"] == ("Unknown", "Suspended")
    assert server.pods == []
    server.set_policy(suspend=False)
    await pass_minutes(server, 2, memory)
    assert len(server.created) == 1, "nothing is started from a spec that can't be read"
    server.set_policy(cancel=True)
    await pass_minutes(server, 1, memory)
    assert states(server)["Succeeded"] == ("False", "Cancelled")


@pytest.mark.parametrize("name", SPECS)
async def test_deadlines_hold_where_the_rest_of_the_spec_can_not_be_read(name: str) -> None:
    server = ModelServer(job_manifest(runPolicy={"activeDeadlineSeconds": 60}), NOW)
    await running(server)
    SPECS[name](server.job["spec"])
    await pass_minutes(server, 3)
    assert states(server)["Succeeded"] == ("False", "DeadlineExceeded")
    assert server.pods == []


@pytest.mark.parametrize("name", SPECS)
async def test_a_new_job_with_the_spec_of_another_version_starts_nothing_and_can_be_cancelled(name: str) -> None:
    manifest = job_manifest(runPolicy={"preflight": "Run"})
    SPECS[name](manifest["spec"])
    server = ModelServer(manifest, NOW)
    await pass_minutes(server, 10)
    assert (server.created, server.tried) == ([], [])
    assert states(server)["Accepted"] == ("False", "BadInput")
    server.set_policy(cancel=True)
    await pass_minutes(server, 1)
    assert states(server)["Succeeded"] == ("False", "Cancelled")


async def test_a_check_that_waits_is_ended_by_its_deadline_where_the_spec_can_not_be_read() -> None:
    server = ModelServer(job_manifest(runPolicy={"preflight": "Run", "pendingDeadlineSeconds": 60}), NOW)
    for _ in range(3):
        await reconciler(server).reconcile(KEY)
    assert server.checks
    server.job["spec"]["novel"] = True
    await pass_minutes(server, 10)
    assert states(server)["Succeeded"] == ("False", "DeadlineExceeded")
    assert server.checks == []


def test_run_policy_is_read_field_by_field() -> None:
    stored = {"cancel": True, "maxRetries": 1000, "preflight": "Later", "queueName": {"of": 1}, "novel": 1}
    policy, unread = read_section(RunPolicySpec, stored, NOW)
    assert (policy.cancel, policy.max_retries, policy.preflight, policy.queue_name) == (True, 1000, "Later", None)
    assert unread == ["queueName"]


@pytest.mark.parametrize("preflight", ["Run", "Skip"])
async def test_a_spec_that_is_corrected_waits_for_no_pause_and_keeps_no_old_sentence(preflight: str) -> None:
    server, memory = ModelServer(job_manifest(runPolicy={"preflight": preflight}), NOW), Memory()
    operator = reconciler(server, memory=memory)
    server.job["spec"]["novel"] = True
    for _ in range(10):
        await operator.reconcile(KEY)
        server.pass_time(301)
    assert states(server)["Accepted"] == ("False", "BadInput")
    del server.job["spec"]["novel"]
    server.set_policy(maxRetries=5)
    for _ in range(4):
        await operator.reconcile(KEY)
        server.pass_time(1)
    assert server.checks or server.pods
    assert not any("novel" in item["message"] for item in server.job["status"]["conditions"])


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
