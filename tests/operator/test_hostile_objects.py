"""Whoever may write the status of a pod or of a PyTorchJob may write any value that the API server accepts. No such
value stops the operator from reconciling the job, and none keeps a person from cancelling it.

The tests run `Reconciler` against `ModelServer`, an in-memory API server.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from finetune_core.names import attempt_name
from finetune_operator.objects.backends.pytorchjob import parse_pytorchjob
from finetune_operator.objects.observations import EARLIEST, LATEST, parse_time
from tests.operator.builders import NOW, UID, job_manifest
from tests.operator.model import Manifest, ModelServer
from tests.operator.operators import KEY
from tests.operator.scenarios import DONE
from tests.operator.skewed_statuses import leaves, value_at
from tests.operator.test_identity import pass_minutes

TIMES = (
    "0000-01-01T00:00:00Z",
    "0001-01-01T00:00:00Z",
    "0001-01-01T00:00:00+14:00",
    "1754-08-30T22:43:41Z",
    "2026-11-24t12:00:00z",
    "2026-11-24T12:00:00+99:99",
    "2026-11-24T23:59:60Z",
    "9999-12-31T23:59:59Z",
    "9999-12-31T23:59:59-14:00",
)
"""Times that the API server accepts in an object, at the ends of the calendar or in an unusual form."""


def places_of_times(manifest: Manifest) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of all times in ``manifest``."""
    for path in leaves(manifest):
        if isinstance(path[-1], str) and path[-1].endswith(("Time", "Timestamp", "At")):
            yield path


def fails(server: ModelServer) -> None:
    server.end_pods(1)


def succeeds(server: ModelServer) -> None:
    server.end_pods(0, DONE)


def is_deleted(server: ModelServer) -> None:
    server.end_pods_of(server.created[0])


def goes_on(_server: ModelServer) -> None:
    """Leave the pods as they are."""


@pytest.mark.parametrize("happens", [goes_on, fails, succeeds, is_deleted])
@pytest.mark.parametrize("time", TIMES)
async def test_no_time_in_a_pod_stops_the_reconciles_of_its_job(
    time: str, happens: Callable[[ModelServer], None]
) -> None:
    async def with_pod() -> tuple[ModelServer, Manifest]:
        server = ModelServer(job_manifest(), NOW, saving=30)
        await pass_minutes(server, 0.05)
        happens(server)
        return server, server.pods[0]

    paths = list(places_of_times((await with_pod())[1]))
    assert len(paths) >= 3
    for path in paths:
        server, pod = await with_pod()
        value_at(pod, path[:-1])[path[-1]] = time
        await pass_minutes(server, 1)
        server.set_policy(cancel=True)
        await pass_minutes(server, 3)
        # A pod whose deletion ends in the year 9999 exists until then, and a cancelled job waits for its pods.
        waits_for_pod = path[-1] == "deletionTimestamp" and time.startswith("9")
        assert waits_for_pod or server.job["status"].get("completionTime"), path


@pytest.mark.parametrize("kind", ["Suspended", "Failed"])
@pytest.mark.parametrize("time", TIMES)
async def test_no_time_in_a_pytorchjob_stops_the_reconciles_of_its_job(time: str, kind: str) -> None:
    server = ModelServer(job_manifest(), NOW)
    await pass_minutes(server, 0.05)
    (child,) = server.children.values()
    status = "False" if kind == "Suspended" else "True"
    child["status"] = {"conditions": [{"type": kind, "status": status, "lastTransitionTime": time}]}
    await pass_minutes(server, 1)
    server.set_policy(cancel=True)
    await pass_minutes(server, 3)
    assert server.job["status"]["completionTime"]


@pytest.mark.parametrize("time", ["", "2026-11-24", "2026-11-24T12:00:00", "x", "0000-01-01T00:00:00Z"])
def test_a_text_that_is_no_time_with_a_zone_is_no_time(time: str) -> None:
    assert parse_time(time) is None


def test_times_at_the_ends_of_the_calendar_are_taken_to_lie_between_them() -> None:
    assert parse_time("0001-01-01T00:00:00+14:00") == EARLIEST
    assert parse_time("9999-12-31T23:59:59-14:00") == LATEST
    assert parse_time("2026-11-24t12:00:00z") == NOW


EMPTY: tuple[dict[str, Any], ...] = (
    {},
    {"spec": {"pytorchReplicaSpecs": {}}},
    {"spec": {"pytorchReplicaSpecs": {"Master": {}}, "runPolicy": {}}, "status": {"conditions": []}},
    {"status": {"conditions": [{"type": "Failed", "status": "True"}, {"type": "Suspended", "status": "False"}]}},
)
"""Parts of PyTorchJobs that the CRD allows, although training-operator does nothing with such a PyTorchJob."""


@pytest.mark.parametrize("parts", EMPTY)
async def test_a_foreign_pytorchjob_with_next_to_nothing_in_it_is_named_as_a_conflict(parts: dict[str, Any]) -> None:
    server = ModelServer(job_manifest(), NOW)
    name = attempt_name(KEY.name, UID, 1)
    foreign = {"kind": "PyTorchJob", "metadata": {"name": name, "namespace": KEY.namespace, "uid": "x"}} | parts
    assert parse_pytorchjob(foreign).owner_uid == ""
    server.children[name] = copy.deepcopy(foreign)
    await pass_minutes(server, 1)
    assert server.children[name] == foreign
    reasons = {item["type"]: item["reason"] for item in server.job["status"]["conditions"]}
    assert reasons["Ready"] == "NameConflict"
