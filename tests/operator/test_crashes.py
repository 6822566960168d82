"""For each write of each scenario, the operator crashes right after this write. The job must end as it does without a
crash.

No attempt may be doubled or lost. The tests run `Reconciler` against `ModelServer`, an in-memory API server. Further
tests cover parts of a job's life that are in no scenario.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest

from finetune_core.contract import RunConfig
from finetune_core.names import attempt_name
from finetune_operator.queue.memory import Memory
from tests.operator.builders import NOW, UID, job_manifest
from tests.operator.model import CrashedError, ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.scenarios import DONE, SCENARIOS, essence, reason_of, report_of, run_to_end


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_crash_after_any_write_changes_nothing(name: str) -> None:
    scenario = SCENARIOS[name]
    faultless = await run_to_end(scenario)
    expected = essence(faultless)
    assert (reason_of(faultless, settled=True), expected["counts"]) == (scenario.reason, scenario.counts)
    children = 0 if scenario.refuses else scenario.counts[0]
    assert expected["created"] == [attempt_name("quickstart", UID, n + 1) for n in range(children)]
    for crash_after in range(1, len(faultless.writes) + 1):
        crashed = await run_to_end(scenario, crash_after)
        assert essence(crashed) == expected, f"crash after write {crash_after}: {crashed.writes[crash_after - 1]}"


async def test_a_deadline_names_what_pods_wait_for_that_the_status_never_showed() -> None:
    policy = {"pendingDeadlineSeconds": 60}
    faultless = await run_to_end(SCENARIOS["never comes to run"])
    writes = enumerate(faultless.writes, start=1)
    at_child = next(number for number, write in writes if write.startswith("create quick"))
    server = ModelServer(job_manifest(runPolicy=policy), NOW, crash_after=at_child, pods_run=False)
    while len(server.writes) < at_child:
        with contextlib.suppress(CrashedError):
            await reconciler(server).reconcile(KEY)
    server.pass_time(61)
    while not reason_of(server, settled=True):
        outcome = await reconciler(server).reconcile(KEY)
        server.pass_time(outcome.after or 0)
    (message,) = (item["message"] for item in server.job["status"]["conditions"] if item["type"] == "Succeeded")
    assert "worker-0: " in message, "the message must name what the existing pods wait for"


async def test_a_settled_job_is_written_no_more() -> None:
    server = await run_to_end(SCENARIOS["succeeds at once"])
    writes = list(server.writes)
    for _ in range(3):
        await reconciler(server).reconcile(KEY)
        server.pass_time(15)
    assert server.writes == writes


async def test_pods_that_outlive_the_job_go_with_their_child() -> None:
    server = await run_to_end(SCENARIOS["succeeds at once"])
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


async def test_an_upgraded_operator_runs_the_image_of_attempt_1_by_its_digest() -> None:
    server = ModelServer(job_manifest(), NOW)
    for _ in range(5):
        await reconciler(server).reconcile(KEY)
    server.end_pods(1)
    for _ in range(20):
        outcome = await reconciler(server, trainer_image="trainer:2").reconcile(KEY)
        server.pass_time(outcome.after or 0)
    (child,) = server.children.values()
    assert server.job["status"]["attempts"]["started"] == 2
    container = child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert container["image"] == server.job["status"]["image"] == "trainer:1@sha256:0123"


async def test_changes_of_queue_priority_and_retention_take_effect_with_the_next_attempt() -> None:
    server = ModelServer(job_manifest(), NOW)
    for _ in range(5):
        await reconciler(server).reconcile(KEY)
    before = copy.deepcopy(server.children)
    server.set_policy(queueName="other", priorityClassName="urgent")
    server.job["spec"]["storage"]["checkpoint"] = {"keepLast": 7}
    for _ in range(5):
        await reconciler(server).reconcile(KEY)
    assert server.children == before, "the objects of the running attempt are not changed"
    server.end_pods(1)
    for _ in range(20):
        outcome = await reconciler(server).reconcile(KEY)
        server.pass_time(outcome.after or 0)
    ((name, child),) = server.children.items()
    assert child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "other"
    template = child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    assert template["spec"]["priorityClassName"] == "urgent"
    assert RunConfig.model_validate_json(server.config_maps[name]["data"]["run.json"]).storage.keep_last == 7


async def test_the_last_pods_of_a_suspended_attempt_may_still_report_their_checkpoint() -> None:
    server = ModelServer(job_manifest(), NOW)
    memory = Memory(lambda: server.now.timestamp())
    operator = reconciler(server, memory=memory)
    for _ in range(5):
        await operator.reconcile(KEY)
    pods = copy.deepcopy(server.pods)
    server.set_policy(suspend=True)
    await operator.reconcile(KEY)
    await operator.reconcile(KEY)
    server.pods = pods  # the pods are Terminating and still save a checkpoint
    for pod in server.pods:
        pod["metadata"]["deletionTimestamp"] = server.now.isoformat()
    await operator.reconcile(KEY)
    assert server.job["status"]["attempts"].get("current") is None
    reporting = memory.reporting_attempt(KEY)
    assert reporting is not None
    assert (reporting.attempt, len(reporting.pod_uids)) == (1, 2)
    memory.store_report(KEY, UID, report_of(20), server.now)
    await operator.reconcile(KEY)
    while memory.job(KEY, UID).reported_writes.take(server.now.timestamp()):
        pass  # takes all tokens from the job's token bucket
    memory.store_report(KEY, UID, report_of(20, 46), server.now)
    # The pods end while the newest report must wait for its status write, because the job's token bucket is empty.
    server.pods = []
    outcome = await operator.reconcile(KEY)
    assert memory.reporting_attempt(KEY) is None
    assert outcome.after is not None
    server.pass_time(outcome.after)
    await operator.reconcile(KEY)
    assert [item["step"] for item in server.job["status"]["checkpoints"]] == [20, 46]


class _LatePodList(ModelServer):
    """A model server that answers with an empty list of pods once, when the pods have ended.

    So the operator sees an ended PyTorchJob without pods, as if it had read the pods too early.
    """

    late = 0

    async def list_pods(self, namespace: str, selector: str) -> list[dict[str, Any]]:
        pods = await super().list_pods(namespace, selector)
        ended = [pod for pod in pods if "terminated" in pod["status"]["containerStatuses"][0]["state"]]
        if ended and not self.late:
            self.late += 1
            return []
        return pods


async def test_an_attempt_that_ends_between_the_reads_of_pods_and_child_is_judged_by_its_pods() -> None:
    server = _LatePodList(job_manifest(), NOW)
    operator = reconciler(server)
    for _ in range(6):
        await operator.reconcile(KEY)
        server.pass_time(1)
    assert server.end_pods(0, DONE)
    child = next(iter(server.children.values()))
    server._set_child_condition(child, "Succeeded", "True")
    for _ in range(3):
        await operator.reconcile(KEY)
    assert server.late == 1
    assert reason_of(server) == "Completed"
    assert server.job["status"]["attempts"]["charged"] == 0
