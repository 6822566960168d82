"""Where the pods of a job write: the scratch folder with its request and limit of `ephemeral-storage`, and the volumes
of `storage.cache`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetune_core.contract.preflight_result import InputSizes, PreflightResult
from finetune_operator.objects.pod_template import AttemptSpec, pod_template
from finetune_operator.objects.preflight_pod import PreflightSpec, build_preflight_pod
from finetune_operator.queue.key import Key
from finetune_trainer.pod.settings import Paths
from tests.operator.builders import NOW, job, job_manifest
from tests.operator.model import ModelServer
from tests.operator.operators import reconciler

GIB = 1 << 30
STORAGE = {"uri": "s3://bucket/runs"}
ADDED_TOKENS = {"s3": {"uri": "s3://bucket/model"}, "addedTokens": ["<A>"]}
EPHEMERAL = {"size": "500Gi", "storageClassName": "local-nvme"}


def pod(sizes: InputSizes | None = None, **spec: Any) -> dict[str, Any]:
    """Return the spec of a training pod of the quickstart job. ``spec`` replaces sections of the job's spec."""
    attempt = AttemptSpec(number=1, name="a", image="i", report_base_url="https://o", sizes=sizes)
    found: dict[str, Any] = pod_template(job(**spec), attempt)["spec"]
    return found


def check_pod(**spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = build_preflight_pod(job(**spec), PreflightSpec(number=1, name="c", image="i"))["spec"]
    return found


def disk(spec: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return the request and the limit of `ephemeral-storage` of the container in the pod spec ``spec``. An amount that
    the container does not have is None."""
    amounts = spec["containers"][0]["resources"]
    return amounts["requests"].get("ephemeral-storage"), amounts["limits"].get("ephemeral-storage")


def volume(spec: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [dict(volume) for volume in spec["volumes"] if volume["name"] == name]
    assert found.pop("name") == name
    return found


def mount(spec: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == name]
    return dict(found)


def test_without_any_size_little_is_requested_and_nothing_bounds_the_pod() -> None:
    spec = pod()
    assert disk(spec) == ("1Gi", None)
    assert volume(spec, "scratch") == {"emptyDir": {}}


def test_the_sizes_of_model_and_data_make_request_and_limits() -> None:
    spec = pod(InputSizes(model_bytes=14 * GIB, data_bytes=GIB), method="LoRA", storage=STORAGE)
    assert disk(spec) == ("19Gi", "108Gi")
    assert volume(spec, "scratch") == {"emptyDir": {"sizeLimit": "108Gi"}}


@pytest.mark.parametrize(
    ("changes", "request_"),
    [
        ({"storage": STORAGE | {"artifact": "Merged"}}, "33Gi"),
        ({"method": "Full", "lora": None, "resources": {"nodes": 1}}, "115Gi"),
        ({"method": "Full", "lora": None, "resources": {"nodes": 2}}, "115Gi"),
        ({"method": "Full", "lora": None, "model": ADDED_TOKENS}, "129Gi"),
        ({"lora": {"rank": 400}}, "31Gi"),
        ({"model": {"volume": {"claimName": "models", "path": "m"}}}, "5Gi"),
        ({"storage": STORAGE | {"cache": {"ephemeral": EPHEMERAL}}}, "5Gi"),
        ({"storage": STORAGE | {"cache": {"claimName": "models"}}}, "19Gi"),
        ({"resources": {"scratch": {"size": "7Gi"}}}, "9Gi"),
    ],
    ids=[
        "merged", "full", "two nodes", "full with added tokens", "rank", "model on a volume", "model on its own volume",
        "model in a cache", "size",
    ],
)  # fmt: skip
def test_what_is_requested_follows_from_what_the_job_writes(changes: dict[str, Any], request_: str) -> None:
    spec = pod(InputSizes(model_bytes=14 * GIB, data_bytes=GIB), **{"storage": STORAGE} | changes)
    assert disk(spec)[0] == request_


@pytest.mark.parametrize(("size", "amount"), [("200Gi", "202Gi"), ("1500Mi", "3548Mi"), ("1.5Ti", "1538Gi")])
def test_a_size_bounds_the_folder_and_is_requested_with_room_for_tmp_and_logs(size: str, amount: str) -> None:
    spec = pod(resources={"scratch": {"size": size}})
    assert volume(spec, "scratch") == {"emptyDir": {"sizeLimit": size}}
    assert disk(spec) == (amount, amount)


def test_with_a_class_the_scratch_folder_is_a_volume_of_each_pod() -> None:
    spec = pod(resources={"scratch": EPHEMERAL})
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "local-nvme",
        "resources": {"requests": {"storage": "500Gi"}},
    }
    assert volume(spec, "scratch") == {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
    assert mount(spec, "scratch") == {"name": "scratch", "mountPath": "/scratch"}
    assert disk(spec) == ("2Gi", "2Gi")


def test_the_claim_of_the_cache_is_mounted_where_the_trainer_looks_for_it() -> None:
    storage = STORAGE | {"cache": {"claimName": "models"}}
    for spec in (pod(storage=storage), check_pod(storage=storage)):
        assert volume(spec, "model-cache") == {"persistentVolumeClaim": {"claimName": "models"}}
        assert mount(spec, "model-cache") == {"name": "model-cache", "mountPath": str(Paths().model_cache)}


def test_a_volume_for_the_model_is_made_for_training_pods_only() -> None:
    """The pod of the preflight check stores no model, so it must not wait for a volume."""
    spec: dict[str, Any] = {
        "storage": STORAGE | {"cache": {"ephemeral": {"size": "500Gi"}}},
        "resources": {"scratch": EPHEMERAL},
    }
    training = pod(**spec)
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "500Gi"}}}
    assert volume(training, "model") == {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
    assert mount(training, "model") == {"name": "model", "mountPath": str(Paths().model_volume)}
    check = check_pod(**spec)
    assert all("ephemeral" not in volume for volume in check["volumes"])
    assert disk(check) == ("256Mi", "4Gi")


async def test_every_attempt_requests_what_follows_from_the_sizes_that_the_check_found() -> None:
    server = ModelServer(job_manifest(runPolicy={"preflight": "Run", "maxRetries": 1}, storage=STORAGE), NOW)
    operator = reconciler(server)
    sizes = InputSizes(model_bytes=14 * GIB, data_bytes=GIB)
    ends: tuple[Callable[[], object], ...] = (
        lambda: server.end_check(0, PreflightResult(findings=[], sizes=sizes).to_termination_message()),
        lambda: server.end_pods(1),
        lambda: True,
    )
    for end in ends:
        for _ in range(40):
            await operator.reconcile(Key("team", "quickstart"))
            server.pass_time(10)
        assert end()
    found = [child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"] for child in server.children.values()]
    assert server.job["status"]["attempts"]["started"] == 2
    assert [disk(spec) for spec in found] == [("19Gi", "108Gi")] * len(found)
    assert found


def test_without_a_cache_nothing_is_mounted_for_one() -> None:
    names = {mount["name"] for mount in pod()["containers"][0]["volumeMounts"]}
    assert names.isdisjoint({"model", "model-cache"})
