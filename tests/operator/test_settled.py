"""What is removed after a job has ended.

With a TTL, everything but the FineTuneJob is removed when the TTL is over. Without a TTL, the pods stay for their logs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from finetune_operator.observe.stored_job import parse_stored_job
from finetune_operator.queue.memory import JobMemory
from tests.operator.builders import NOW, job_manifest
from tests.operator.model import CrashedError, Manifest, ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.scenarios import DONE, Scenario, during, ends, run_to_end


async def ended(**policy: object) -> ModelServer:
    scenario = Scenario(script=[during(1, ends(0, DONE))], reason="Completed", counts=(1, 0, 0), policy=policy)
    server = await run_to_end(scenario)
    # This marks the PyTorchJob as succeeded, as training-operator does at the end.
    for child in server.children.values():
        child["status"] = {"conditions": [{"type": "Succeeded", "status": "True"}]}
    return server


async def test_after_the_ttl_everything_is_removed_but_the_job_and_its_status() -> None:
    server = await ended(ttlSecondsAfterFinished=600)
    status = dict(server.job["status"])
    outcome = await reconciler(server).reconcile(KEY)
    assert outcome.after == 600
    server.pass_time(599)
    assert (await reconciler(server).reconcile(KEY)).after == 1
    assert len(server.children) == len(server.config_maps) == 1
    server.pass_time(1)
    assert (await reconciler(server).reconcile(KEY)).after is None
    assert (server.children, server.config_maps, server.network_policies, server.pods) == ({}, {}, {}, [])
    assert server.job["status"].pop("child", None) is None
    status.pop("child")
    assert server.job["status"] == status
    writes = list(server.writes)
    await reconciler(server).reconcile(KEY)
    assert server.writes == writes


async def test_without_a_ttl_the_pods_stay_for_their_logs() -> None:
    server = await ended()
    server.pass_time(10**7)
    assert (await reconciler(server).reconcile(KEY)).after is None
    assert len(server.children) == 1


async def test_a_ttl_of_zero_removes_at_once_and_one_that_is_set_later_counts_from_the_end() -> None:
    server = await ended(ttlSecondsAfterFinished=0)
    await reconciler(server).reconcile(KEY)
    assert server.children == {}
    server = await ended()
    server.pass_time(1000)
    server.set_policy(ttlSecondsAfterFinished=900)
    await reconciler(server).reconcile(KEY)
    assert server.children == {}


async def test_somebody_elses_objects_under_the_names_stay() -> None:
    server = await ended()
    server.set_policy(ttlSecondsAfterFinished=0)
    for kept in (*server.children.values(), *server.config_maps.values(), *server.network_policies.values()):
        kept["metadata"]["ownerReferences"][0]["uid"] = "another"
    await reconciler(server).reconcile(KEY)
    assert len(server.children) == len(server.config_maps) == len(server.network_policies) == 1


async def test_a_run_file_whose_child_was_never_created_goes_with_its_job() -> None:
    job = job_manifest(runPolicy={"pendingDeadlineSeconds": 60})
    server = ModelServer(job, NOW, crash_after=_writes_until_the_run_file(await _begun(job)))
    with pytest.raises(CrashedError):
        await _reconcile_until(server, lambda: False)
    assert (len(server.config_maps), server.children) == (1, {})
    # No reconcile happens until `runPolicy.pendingDeadlineSeconds` is over.
    server.pass_time(100)
    await _reconcile_until(server, lambda: bool(server.job["status"].get("completionTime")))
    await reconciler(server).reconcile(KEY)
    assert server.config_maps == {}


async def _begun(job: Manifest) -> ModelServer:
    server = ModelServer(copy.deepcopy(job), NOW)
    await _reconcile_until(server, lambda: bool(server.children))
    return server


def _writes_until_the_run_file(server: ModelServer) -> int:
    return 1 + next(number for number, what in enumerate(server.writes) if "create configmap" in what)


async def _reconcile_until(server: ModelServer, reached: Callable[[], bool]) -> None:
    operator = reconciler(server)
    for _ in range(20):
        await operator.reconcile(KEY)
        if reached():
            return
    raise AssertionError(server.job.get("status"))


@pytest.mark.parametrize(
    ("raw", "seconds"),
    [
        ({}, None),
        ({"spec": {}}, None),
        ({"spec": {"runPolicy": {}}}, None),
        ({"spec": {"runPolicy": {"ttlSecondsAfterFinished": 0}}}, 0),
        ({"spec": {"runPolicy": {"ttlSecondsAfterFinished": "soon"}}}, None),
    ],
)
def test_the_ttl_is_read_from_a_spec_that_need_not_be_readable(raw: dict[str, object], seconds: int | None) -> None:
    stored = parse_stored_job(KEY, {**job_manifest(), "spec": None, **raw}, JobMemory(), NOW)
    assert stored.policy.ttl_seconds_after_finished == seconds


async def _ended_with_an_orphan(**policy: object) -> ModelServer:
    """Return a server with an ended job and two orphaned pods. Somebody deleted the PyTorchJob without its pods, and
    then one pod ended with exit code 64, which ended the job."""
    server = ModelServer(job_manifest(runPolicy=policy), NOW)
    for _ in range(4):
        await reconciler(server).reconcile(KEY)
        server.pass_time(1)
    assert server.orphan_pods()
    container = server.pods[0]["status"]["containerStatuses"][0]
    container["state"] = {"terminated": {"exitCode": 64, "finishedAt": server.now.isoformat()}}
    for _ in range(3):
        await reconciler(server).reconcile(KEY)
    assert server.job["status"]["completionTime"]
    return server


async def test_an_orphaned_pod_that_outlives_its_job_is_removed_after_a_minute() -> None:
    server = await _ended_with_an_orphan()
    await _pass(server, 50)
    assert len(server.pods) == 2
    await _pass(server, 20)
    assert [pod["metadata"]["labels"]["training.kubeflow.org/replica-index"] for pod in server.pods] == ["0"]
    await _pass(server, 600)
    assert len(server.pods) == 1, "the pod that has ended stays for its log"


async def test_after_the_ttl_orphaned_pods_are_removed_too_but_not_those_of_others() -> None:
    server = await _ended_with_an_orphan(ttlSecondsAfterFinished=30)
    copied, younger, adopted = (copy.deepcopy(server.pods[0]) for _ in range(3))
    copied["metadata"] |= {"name": "debug", "uid": "copied"}
    younger["metadata"] |= {"uid": "younger", "creationTimestamp": "2030-01-01T00:00:00Z"}
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "x", "uid": "x", "controller": True}
    adopted["metadata"] |= {"uid": "adopted", "ownerReferences": [owner]}
    server.pods += [copied, younger, adopted]
    await _pass(server, 40)
    assert [pod["metadata"]["uid"] for pod in server.pods] == ["copied", "younger", "adopted"]


async def _pass(server: ModelServer, seconds: int) -> None:
    operator = reconciler(server)
    for _ in range(seconds // 10):
        server.pass_time(10)
        await operator.reconcile(KEY)


@pytest.mark.parametrize("unreadable", [{"seconds": 5}, ["novel"], "novel"])
async def test_an_ended_job_whose_time_of_completion_can_not_be_read_is_cleaned_up(unreadable: object) -> None:
    server = await ended(ttlSecondsAfterFinished=600)
    server.job["status"]["completionTime"] = unreadable
    await _pass(server, 590)
    assert len(server.children) == 1
    await _pass(server, 30)
    assert (server.children, server.config_maps, server.pods) == ({}, {}, [])
    assert server.job["status"]["completionTime"] == unreadable
