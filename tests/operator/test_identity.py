"""A job is identified by its uid: the operator never counts objects or reports of somebody else, or of an earlier job
of the same name, as those of the job.

The tests run `Reconciler` against `ModelServer`, an in-memory API server.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from finetune_core.api.conditions import Reason
from finetune_core.contract import CheckpointRecord, CurvePoint, Phase, Report
from finetune_operator.kube.api_errors import ApiError
from finetune_operator.queue.memory import Memory, ReportingAttempt
from finetune_operator.queue.retryable import RetryableError
from tests.operator.builders import NOW, UID, job_manifest
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.scenarios import DONE

OTHER_UID = "99999999-8888-7777-6666-555555555555"


def report(pod_uid: str) -> Report:
    """Return a report of a run at its last step, 80 of 80, with a committed checkpoint."""
    checkpoint = CheckpointRecord(
        run=1, step=80, uri=f"s3://b/{UID}/80", bytes=1, manifest_sha256="a", perplexity=1.2, time=NOW
    )
    return Report(
        run=1, pod_uid=pod_uid, phase=Phase.TRAINING, ranks=2, step=80, total_steps=80, epoch=1.6,
        metrics={"loss": 0.003}, history=[CurvePoint(step=80, loss=0.003)], checkpoints=[checkpoint],
        notices=["3 rows were left out"],
    )  # fmt: skip


async def while_it_runs(server: ModelServer, memory: Memory) -> None:
    """Let the job of ``server`` run, and report its progress."""
    operator = reconciler(server, memory=memory)
    for _ in range(4):
        await operator.reconcile(KEY)
    memory.store_report(KEY, UID, report(server.pods[0]["metadata"]["uid"]), server.now)
    server.pass_time(11)
    await operator.reconcile(KEY)
    assert server.job["status"]["progress"]["step"] == 80


async def after_its_end(server: ModelServer, memory: Memory) -> None:
    """Let the job of ``server`` run, report, and end."""
    await while_it_runs(server, memory)
    server.end_pods(64)
    for _ in range(4):
        await reconciler(server, memory=memory).reconcile(KEY)
    assert server.job["status"]["completionTime"]


async def between_its_attempts(server: ModelServer, memory: Memory) -> None:
    """Let the job of ``server`` run, report, and lose its first attempt."""
    await while_it_runs(server, memory)
    server.end_pods(1)
    for _ in range(3):
        await reconciler(server, memory=memory).reconcile(KEY)
    assert "current" not in server.job["status"]["attempts"]


async def while_it_is_refused(server: ModelServer, memory: Memory) -> None:
    """Let the creation of the child of ``server``'s job be refused often, so that the job waits for a long back-off."""
    server.refuses = "exceeded quota"
    operator = reconciler(server, memory=memory)
    for _ in range(12):
        outcome = await operator.reconcile(KEY)
        server.pass_time(outcome.after or 0)
    server.refuses = ""
    assert memory.job(KEY, UID).failures > 1


PASTS = (while_it_runs, after_its_end, between_its_attempts, while_it_is_refused)


def recreate(server: ModelServer) -> None:
    """Delete the job and create it again under the same name, as `kubectl replace --force` does."""
    fresh = job_manifest()
    fresh["metadata"] |= {"uid": OTHER_UID, "resourceVersion": "700"}
    server.job, server.pods, server.children, server.config_maps = fresh, [], {}, {}


async def lives(server: ModelServer, memory: Memory) -> list[Any]:
    """Reconcile the job of ``server`` six times. Return for each reconcile the job's status, the names of the
    PyTorchJobs, and the outcome."""
    operator, found = reconciler(server, memory=memory), []
    for _ in range(6):
        outcome = await operator.reconcile(KEY)
        found.append((copy.deepcopy(server.job.get("status")), sorted(server.children), outcome))
    return found


@pytest.mark.parametrize("past", PASTS, ids=lambda past: past.__name__)
async def test_a_job_created_again_under_the_same_name_lives_as_if_no_other_job_had_been(past: Any) -> None:
    server, memory = ModelServer(job_manifest(), NOW), Memory(lambda: server.now.timestamp())
    await past(server, memory)
    recreate(server)
    untouched = ModelServer(copy.deepcopy(server.job), server.now)
    # The second server goes on with the counters of the first, so that both servers give the same names and
    # resourceVersions.
    untouched._version, untouched._generation, untouched.created = (
        server._version,
        server._generation,
        [*server.created],
    )
    again = await lives(server, memory)
    assert again == await lives(untouched, Memory())
    assert again[-1][0]["attempts"]["started"] == 1


async def test_a_late_report_of_a_deleted_job_does_not_reach_the_job_that_took_its_name() -> None:
    memory = Memory()
    memory.set_reporting_attempt(KEY, UID, ReportingAttempt(uid=UID, attempt=1, pod_uids=frozenset({"p"})))
    memory.set_reporting_attempt(KEY, OTHER_UID, ReportingAttempt(uid=OTHER_UID, attempt=1, pod_uids=frozenset({"q"})))
    assert not memory.store_report(KEY, UID, report("p"), NOW)
    assert memory.newest_report(KEY, OTHER_UID) is None
    assert memory.newest_report(KEY, UID) is None


def test_the_memory_of_a_job_starts_empty_for_another_uid() -> None:
    memory = Memory()
    old = memory.job(KEY, UID)
    old.problem, old.retry_at, old.failures = RetryableError(Reason.BACKEND_UNAVAILABLE, "no"), 300.0, 5
    old.event_created_at["Running"] = 1.0
    assert memory.job(KEY, UID) is old
    new = memory.job(KEY, OTHER_UID)
    assert (new.problem, new.retry_at, new.failures, new.event_created_at) == (None, 0.0, 0, {})


# ---- pods ----


async def running(server: ModelServer, memory: Memory | None = None) -> None:
    """Let both pods of attempt 1 run, and let the status record them."""
    for _ in range(5):
        await reconciler(server, memory=memory).reconcile(KEY)
        server.pass_time(1)
    assert len(server.job["status"]["attempts"]["current"]["pods"]) == 2


async def pass_minutes(server: ModelServer, minutes: float, memory: Memory | None = None) -> None:
    """Reconcile the job whenever the operator asks for it and at least every 5 s, until ``minutes`` have passed. Each
    reconcile is made by a new operator. If ``memory`` is given, all these operators use it."""
    end = server.now.timestamp() + 60 * minutes
    while server.now.timestamp() < end:
        outcome = await reconciler(server, memory=memory).reconcile(KEY)
        server.pass_time(min(5 if outcome.after is None else outcome.after, 5, end - server.now.timestamp()) or 0.1)


def copied(pod: dict[str, Any]) -> dict[str, Any]:
    """Make ``pod`` the copy that `kubectl debug --copy-to=debug --keep-labels` creates, which has no owner."""
    pod["metadata"]["name"] = "debug"
    del pod["metadata"]["ownerReferences"]
    return pod


def adopted(pod: dict[str, Any]) -> dict[str, Any]:
    """Make ``pod`` a copy named "debug" that training-operator has adopted, because its labels are those of the
    PyTorchJob's pods."""
    pod["metadata"]["name"] = "debug"
    return pod


def of_another_object_of_that_name(pod: dict[str, Any]) -> dict[str, Any]:
    """Give the pod a controller that has the name of the attempt's PyTorchJob but another uid."""
    pod["metadata"]["ownerReferences"][0]["uid"] = "foreign"
    return pod


def of_another_kind(pod: dict[str, Any]) -> dict[str, Any]:
    """Give the pod a Job as controller."""
    pod["metadata"]["ownerReferences"][0] |= {"apiVersion": "batch/v1", "kind": "Job"}
    return pod


def owned_but_not_controlled(pod: dict[str, Any]) -> dict[str, Any]:
    """Let the attempt's PyTorchJob own the pod without being its controller."""
    pod["metadata"]["ownerReferences"][0]["controller"] = False
    return pod


def of_an_attempt_to_come(pod: dict[str, Any]) -> dict[str, Any]:
    """Give the pod the label of an attempt that was never started."""
    pod["metadata"]["labels"]["finetune.dev/attempt"] = "7"
    return pod


FOREIGN = (
    copied,
    adopted,
    of_another_object_of_that_name,
    of_another_kind,
    owned_but_not_controlled,
    of_an_attempt_to_come,
)


@pytest.mark.parametrize("change", FOREIGN, ids=lambda change: change.__name__)
@pytest.mark.parametrize("state", ["running", "failed", "being deleted"])
async def test_a_pod_with_copied_labels_changes_nothing_about_the_job(change: Any, state: str) -> None:
    server, memory = ModelServer(job_manifest(), NOW), Memory()
    await running(server, memory)
    foreign = change(copy.deepcopy(server.pods[0]))
    foreign["metadata"]["uid"] = "foreign"
    foreign["child"] = None
    if state == "failed":
        end = {"exitCode": 64, "message": "no column", "finishedAt": server.now.isoformat()}
        foreign["status"] |= {"phase": "Failed"}
        foreign["status"]["containerStatuses"][0]["state"] = {"terminated": end}
    if state == "being deleted":
        foreign["metadata"] |= {"deletionTimestamp": server.now.isoformat(), "deletionGracePeriodSeconds": 0}
    server.pods.insert(0, foreign)
    before = copy.deepcopy(server.job["status"]["attempts"])
    await pass_minutes(server, 5, memory)
    assert server.job["status"]["attempts"] == before
    reporting = memory.reporting_attempt(KEY)
    assert reporting is not None
    assert "foreign" not in reporting.pod_uids
    mine = [pod for pod in server.pods if pod is not foreign]
    server.pods = mine
    assert server.end_pods(0, DONE)
    server.pods = [foreign, *mine]
    await pass_minutes(server, 5, memory)
    assert server.job["status"]["conditions"][-1]["reason"] == "Completed"
    assert foreign in server.pods, "a pod of somebody else is never deleted"
    assert server.job["status"]["usage"]["gpuSeconds"] % 2 == 0, "the GPUs of two pods are counted"


async def test_a_foreign_pod_does_not_keep_the_next_attempt_from_starting() -> None:
    server = ModelServer(job_manifest(), NOW)
    await running(server)
    foreign = copied(copy.deepcopy(server.pods[0]))
    foreign["metadata"]["uid"] = "foreign"
    foreign["child"] = None
    server.end_pods(1)
    server.pods.append(foreign)
    await pass_minutes(server, 2)
    assert server.job["status"]["attempts"]["current"]["number"] == 2
    assert foreign in server.pods


async def test_a_preflight_pod_with_copied_labels_is_no_check() -> None:
    server = ModelServer(job_manifest(runPolicy={"preflight": "Run"}), NOW)
    for _ in range(3):
        await reconciler(server).reconcile(KEY)
    (check,) = server.checks
    foreign = copied(copy.deepcopy(check))
    foreign["metadata"]["uid"] = "foreign"
    end = {"exitCode": 64, "message": "no", "finishedAt": server.now.isoformat()}
    foreign["status"]["containerStatuses"][0]["state"] = {"terminated": end}
    server.checks.insert(0, foreign)
    await pass_minutes(server, 0.5)
    assert (server.job["status"]["preflight"]["tries"], server.job["status"]["preflight"]["verdict"]) == (0, "")
    assert server.end_check(0)
    await pass_minutes(server, 1)
    assert foreign in server.checks
    assert server.job["status"]["attempts"]["started"] == 1


@pytest.mark.parametrize("saving", [0, 30])
async def test_pods_that_were_orphaned_are_removed_after_a_minute(saving: float) -> None:
    server = ModelServer(job_manifest(), NOW, saving=saving)
    await running(server)
    first = {pod["metadata"]["uid"] for pod in server.pods}
    assert server.orphan_pods()
    await pass_minutes(server, 0.9)
    attempts = server.job["status"]["attempts"]
    assert (attempts["recent"][0]["reason"], attempts.get("current")) == ("ChildDeleted", None)
    assert {pod["metadata"]["uid"] for pod in server.pods} == first
    await pass_minutes(server, 1)
    assert server.job["status"]["attempts"]["current"]["number"] == 2
    assert {pod["metadata"]["uid"] for pod in server.pods}.isdisjoint(first)


async def test_orphaned_pods_that_have_ended_are_removed_too() -> None:
    server = ModelServer(job_manifest(), NOW)
    await running(server)
    assert server.orphan_pods()
    await pass_minutes(server, 0.5)
    assert server.end_pods(0)
    await pass_minutes(server, 1.5)
    assert server.job["status"]["attempts"]["current"]["number"] == 2


async def test_an_operator_that_was_away_removes_orphaned_pods_before_the_next_attempt() -> None:
    server = ModelServer(job_manifest(), NOW)
    await running(server)
    first = {pod["metadata"]["uid"] for pod in server.pods}
    assert server.orphan_pods()
    await pass_minutes(server, 0.5)
    server.pass_time(3600)
    await pass_minutes(server, 0.5)
    assert server.job["status"]["attempts"]["current"]["number"] == 2
    assert {pod["metadata"]["uid"] for pod in server.pods}.isdisjoint(first)


class _KeepsPods(ModelServer):
    """Refuses to delete pods, as an admission policy may."""

    async def delete_pod(self, _namespace: str, name: str, uid: str) -> bool:
        raise ApiError(403, "Forbidden", "pods may not be deleted")


async def test_orphaned_pods_whose_deletion_is_refused_are_no_longer_waited_for() -> None:
    server, memory = _KeepsPods(job_manifest(), NOW), Memory()
    await running(server, memory)
    assert server.orphan_pods()
    await pass_minutes(server, 2, memory)
    assert server.job["status"]["attempts"]["current"]["number"] == 2
    assert len(server.pods) == 4
