"""An operator that was set back to an older version can't read all of a spec that a newer version has accepted.

While the operator can't read a spec, it starts nothing for the job and ends no attempt, but it obeys every order and
every deadline of `runPolicy`. The tests run `Reconciler` against `ModelServer`, an in-memory API server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetune_core.api.reading import read_section
from finetune_core.api.run_policy import RunPolicySpec
from finetune_operator.queue.memory import Memory
from tests.operator.builders import NOW, job_manifest
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.skewed_statuses import Json
from tests.operator.test_identity import pass_minutes, running, while_it_runs
from tests.operator.test_version_skew import states

SPECS: dict[str, Callable[[dict[str, Json]], Any]] = {
    "a new field": lambda spec: spec.update(novel=True),
    "a new section in runPolicy": lambda spec: spec.setdefault("runPolicy", {}).update(backend="Job"),
    "a new method": lambda spec: spec.update(method="DoRA"),
    "resources of another shape": lambda spec: spec.update(resources=spec.get("resources", {}) | {"cpu": {"min": 1}}),
    "no dataset": lambda spec: spec.pop("dataset"),
}


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


@pytest.mark.parametrize("task", ["None", "ViGGO"])
async def test_a_job_of_an_older_version_runs_to_its_end(task: str) -> None:
    """In the CRD of older versions `dataset.task` was a string, with the default `None`."""
    server, memory = ModelServer(job_manifest(), NOW), Memory()
    await while_it_runs(server, memory)
    server.job["spec"]["dataset"]["task"] = task
    before = states(server)
    await pass_minutes(server, 2, memory)
    assert states(server) == before
    assert states(server)["Accepted"][0] == "True"
    assert len(server.pods) == 2
