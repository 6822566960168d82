"""How much memory and how many CPUs a training pod gets: what the job says, else what its plan says, else a default."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_core.api.status import PlanStatus
from finetune_core.contract.preflight_result import PlannedNeeds, PreflightResult
from finetune_operator.objects.pod_template import AttemptSpec, pod_template
from tests.operator.builders import NOW, job, job_manifest
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler

GIB = 1 << 30
DEFAULTS = {"cpu": "8", "memory": "64Gi"}
OPEN: dict[str, Any] = {"gpusPerNode": 2, "sharedMemory": "1Gi"}
"""`resources` of a job that leaves CPUs and memory open."""
PLANNED = PlannedNeeds(gpu_memory_bytes=7 * GIB, memory_bytes=100 * GIB + 1, cpus=16)


def plan(**values: Any) -> PlanStatus:
    return PlanStatus(processes=2, micro_batch_size=1, gradient_accumulation_steps=1, **values)


def amounts_of(template: dict[str, Any]) -> dict[str, str]:
    """Return CPUs and memory of the training container in ``template``, whose memory is its limit."""
    resources = template["spec"]["containers"][0]["resources"]
    requests = {name: resources["requests"][name] for name in DEFAULTS}
    assert resources["limits"]["memory"] == requests["memory"]
    assert "cpu" not in resources["limits"]
    return requests


@pytest.mark.parametrize(
    ("resources", "planned", "amounts"),
    [
        ({}, None, DEFAULTS),
        ({}, plan(), DEFAULTS),
        ({}, plan(memory_bytes=100 * GIB, cpus=16), {"cpu": "16", "memory": "100Gi"}),
        ({}, plan(memory_bytes=100 * GIB + 1, cpus=16), {"cpu": "16", "memory": "101Gi"}),
        ({"cpu": "32"}, plan(memory_bytes=100 * GIB, cpus=16), {"cpu": "32", "memory": "100Gi"}),
        ({"memory": "9Gi"}, plan(memory_bytes=100 * GIB, cpus=16), {"cpu": "16", "memory": "9Gi"}),
        (DEFAULTS, plan(memory_bytes=100 * GIB, cpus=16), DEFAULTS),
    ],
    ids=[
        "neither job nor plan", "a plan without figures", "plan", "whole GiB", "CPUs of the job", "memory of the job",
        "a job that older versions stored with their defaults",
    ],
)  # fmt: skip
def test_the_job_wins_over_its_plan_and_the_plan_over_the_defaults(
    resources: dict[str, str], planned: PlanStatus | None, amounts: dict[str, str]
) -> None:
    attempt = AttemptSpec(number=1, name="a", image="i", report_base_url="https://o", plan=planned)
    assert amounts_of(pod_template(job(resources=OPEN | resources), attempt)) == amounts


async def amounts_of_attempts(message: str, *, attempts: int, preflight: str = "Run", **resources: str) -> list[Any]:
    """Return CPUs and memory of the pods of each of ``attempts`` attempts, all of which but the last one fail for lack
    of memory. ``message`` is the termination message of the preflight check. The operator starts anew before each
    reconcile."""
    policy = {"preflight": preflight, "maxRetries": attempts}
    training = {"maxSteps": 5, "globalBatchSize": 16, "microBatchSize": 8}
    server = ModelServer(job_manifest(runPolicy=policy, training=training, resources=OPEN | resources), NOW)
    found: dict[str, dict[str, str]] = {}
    for _ in range(200):
        await reconciler(server).reconcile(KEY)
        server.end_check(0, message)
        for name, child in server.children.items():
            found[name] = amounts_of(child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"])
        if len(found) == attempts:
            return list(found.values())
        server.end_pods(66)
        server.pass_time(10)
    raise AssertionError(f"only {len(found)} attempts were created")


def checked(**planned: Any) -> str:
    """Return the termination message of a check that has passed. ``planned`` replaces fields of its plan."""
    result = json.loads(PreflightResult(findings=[], planned=PLANNED).to_termination_message())
    result["planned"] |= planned
    return json.dumps(result)


async def test_every_attempt_gets_what_the_check_has_planned() -> None:
    """The second attempt has half the micro-batch, on which the memory of a pod does not depend."""
    assert await amounts_of_attempts(checked(), attempts=2) == [{"cpu": "16", "memory": "101Gi"}] * 2


async def test_what_the_job_sets_stands_in_every_attempt() -> None:
    assert await amounts_of_attempts(checked(), attempts=2, **DEFAULTS) == [DEFAULTS] * 2


async def test_without_a_check_there_is_no_plan() -> None:
    assert await amounts_of_attempts("", attempts=1, preflight="Skip") == [DEFAULTS]


@pytest.mark.parametrize("value", [-1, 0, 99 * 1024 * GIB + 1, 10**30, 1.5, None, "9Gi"])
@pytest.mark.parametrize("field", ["memoryBytes", "cpus"])
async def test_no_answer_of_a_check_gives_a_pod_what_a_job_could_not_ask_for(field: str, value: Any) -> None:
    assert await amounts_of_attempts(checked(**{field: value}), attempts=1) == [DEFAULTS]
