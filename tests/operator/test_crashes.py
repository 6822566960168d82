"""The operator crashes after each single write in turn, and the job must end as it does without a crash.

No attempt may be doubled or lost. The tests run `Reconciler` against `ModelServer`, an in-memory API server.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import pytest

from finetune_core.contract import CheckpointRecord, Outcome, Phase, Report, RunConfig
from finetune_core.contract.preflight_result import Finding, FindingKind, PreflightResult
from finetune_core.names import attempt_name
from finetune_operator.kube.client import ApiError
from finetune_operator.queue.memory import Memory
from tests.operator.builders import NOW, UID, former_run, job_manifest, result
from tests.operator.model import CrashedError, ModelServer, Script
from tests.operator.operators import KEY, reconciler

DONE = result(Outcome.COMPLETED, with_artifact=True)

Action = Callable[[ModelServer], bool]


def during(attempt: int, action: Action) -> Action:
    """Return an action that does ``action`` while pods of ``attempt`` exist, else returns False."""
    return lambda world: _attempt(world) == attempt and action(world)


def once(reason: str, action: Action) -> Action:
    """Return an action that does ``action`` while Succeeded has ``reason`` and no pod exists, else returns False."""
    return lambda world: _reason(world) == reason and not world.pods and action(world)


def ends(exit_code: int, message: str = "") -> Action:
    return lambda world: world.end_pods(exit_code, message)


def sets(**policy: Any) -> Action:
    return lambda world: world.set_policy(**policy)


def found(kind: FindingKind, sentence: str) -> str:
    """Return the termination message of a preflight check that found one problem."""
    return PreflightResult(findings=[Finding(kind=kind, message=sentence)]).to_termination_message()


def checked(exit_code: int, message: str = "") -> Action:
    """Return an action that ends the running preflight pod."""
    return lambda world: world.end_check(exit_code, message)


def lose_check(world: ModelServer) -> bool:
    """Delete the running preflight pod while its kubelet is dead, so that the pod stays Terminating."""
    for check in world.checks:
        if "running" in check["status"]["containerStatuses"][0]["state"]:
            check["metadata"] |= {"deletionTimestamp": world.now.isoformat(), "deletionGracePeriodSeconds": 2}
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A scenario: the events that happen to a job, and how the job must end."""

    script: Script
    reason: str
    """Reason of the condition Succeeded at the end."""
    counts: tuple[int, int, int]
    """Numbers of attempts at the end: started, charged, free."""
    policy: dict[str, Any] = field(default_factory=dict)
    refuses: str = ""
    """Message with which the API server refuses to create the PyTorchJob; empty where it does not refuse."""
    pods_run: bool = True


CHECKED = {"preflight": "Run"}
FINAL = found(FindingKind.FINAL, "dataset.train.s3.uri: there is no object")
OUTSIDE = found(FindingKind.OUTSIDE, "storage.uri: bucket 'b' does not exist")

SCENARIOS: dict[str, Scenario] = {
    "succeeds at once": Scenario(script=[during(1, ends(0, DONE))], reason="Completed", counts=(1, 0, 0)),
    "crashes, then succeeds": Scenario(
        script=[during(1, ends(1)), during(2, ends(0, DONE))], reason="Completed", counts=(2, 1, 0)
    ),
    "loses a pod, then succeeds": Scenario(
        script=[during(1, lambda world: world.ask_deletion(1)), during(2, ends(0, DONE))],
        reason="Completed",
        counts=(2, 0, 1),
    ),
    "is refused": Scenario(
        script=[during(1, ends(64, result(Outcome.BAD_INPUT, "no column")))], reason="BadInput", counts=(1, 0, 0)
    ),
    "is given up": Scenario(
        script=[during(n, ends(75)) for n in (1, 2, 3, 4)], reason="RetriesExhausted", counts=(4, 4, 0)
    ),
    "is suspended and resumed": Scenario(
        script=[
            during(1, sets(suspend=True)),
            once("Suspended", sets(suspend=False)),
            during(2, ends(0, DONE)),
        ],
        reason="Completed",
        counts=(2, 0, 1),
    ),
    "is applied suspended": Scenario(
        script=[once("Suspended", sets(suspend=False)), during(1, ends(0, DONE))],
        policy={"suspend": True},
        reason="Completed",
        counts=(1, 0, 0),
    ),
    "is held and released by its queue": Scenario(
        script=[
            during(1, lambda world: world.hold_child()),
            once("Queued", lambda world: world.release_child()),
            during(1, ends(0, DONE)),
        ],
        policy={"queueName": "gpu"},
        reason="Completed",
        counts=(1, 0, 0),
    ),
    "is cancelled while it runs": Scenario(script=[during(1, sets(cancel=True))], reason="Cancelled", counts=(1, 0, 0)),
    "is cancelled while it is suspended": Scenario(
        script=[during(1, sets(suspend=True)), once("Suspended", sets(cancel=True))],
        reason="Cancelled",
        counts=(1, 0, 1),
    ),
    "is cancelled while it retries": Scenario(
        script=[during(1, ends(1)), once("Retrying", sets(cancel=True))], reason="Cancelled", counts=(1, 1, 0)
    ),
    "is cancelled before it began": Scenario(script=[], policy={"cancel": True}, reason="Cancelled", counts=(0, 0, 0)),
    "is cancelled while something outside is missing": Scenario(
        script=[once("BackendUnavailable", sets(cancel=True))],
        refuses="exceeded quota",
        reason="Cancelled",
        counts=(1, 0, 0),
    ),
    "never comes to run": Scenario(
        script=[],
        policy={"pendingDeadlineSeconds": 60},
        pods_run=False,
        reason="DeadlineExceeded",
        counts=(1, 0, 0),
    ),
    "waits for something outside for too long": Scenario(
        script=[],
        policy={"pendingDeadlineSeconds": 60},
        refuses="exceeded quota",
        reason="DeadlineExceeded",
        counts=(1, 0, 0),
    ),
    "passes its check": Scenario(
        script=[checked(0), during(1, ends(0, DONE))], policy=CHECKED, reason="Completed", counts=(1, 0, 0)
    ),
    "finds the artifact of a former job": Scenario(
        script=[checked(0, former_run(done=True))], policy=CHECKED, reason="Completed", counts=(0, 0, 0)
    ),
    "resumes the run of a former job": Scenario(
        script=[checked(0, former_run(done=False)), during(1, ends(0, DONE))],
        policy=CHECKED,
        reason="Completed",
        counts=(1, 0, 0),
    ),
    "is impossible by its check": Scenario(
        script=[checked(64, FINAL)], policy=CHECKED, reason="BadInput", counts=(0, 0, 0)
    ),
    "waits for a bucket, a broken pod and a lost one, then succeeds": Scenario(
        script=[checked(75, OUTSIDE), checked(1), lose_check, checked(0), during(1, ends(0, DONE))],
        policy=CHECKED,
        reason="Completed",
        counts=(1, 0, 0),
    ),
    "is checked for too long": Scenario(
        script=[checked(75, OUTSIDE)],
        policy=CHECKED | {"pendingDeadlineSeconds": 60},
        reason="DeadlineExceeded",
        counts=(0, 0, 0),
    ),
    "is suspended while it is checked": Scenario(
        script=[
            lambda world: bool(world.checks) and world.set_policy(suspend=True),
            once("Suspended", sets(suspend=False)),
            checked(0),
            during(1, ends(0, DONE)),
        ],
        policy=CHECKED,
        reason="Completed",
        counts=(1, 0, 0),
    ),
    "is cancelled while it is checked": Scenario(
        script=[lambda world: bool(world.checks) and world.set_policy(cancel=True)],
        policy=CHECKED,
        reason="Cancelled",
        counts=(0, 0, 0),
    ),
    "skips a check that does not end": Scenario(
        script=[
            lambda world: bool(world.checks) and world.set_policy(preflight="Skip"),
            during(1, ends(0, DONE)),
        ],
        policy=CHECKED,
        reason="Completed",
        counts=(1, 0, 0),
    ),
    "runs for too long": Scenario(
        script=[during(1, ends(1))],
        policy={"activeDeadlineSeconds": 60},
        reason="DeadlineExceeded",
        counts=(2, 1, 0),
    ),
}


def server_of(scenario: Scenario, crash_after: int | None = None) -> ModelServer:
    """Return the model server of ``scenario``; the operator crashes after write number ``crash_after``."""
    job = job_manifest(runPolicy=scenario.policy)
    return ModelServer(job, NOW, crash_after=crash_after, refuses=scenario.refuses, pods_run=scenario.pods_run)


async def run_to_end(
    scenario: Scenario, crash_after: int | None = None, server: ModelServer | None = None
) -> ModelServer:
    """Reconcile the job of ``scenario`` until it has ended. After a crash, a new operator goes on.

    The model server makes the operator crash after write number ``crash_after``; None means no crash. ``server`` may be
    another server with the job of ``scenario``. After an answer 409 the job is reconciled again, as `controller.py`
    does.
    """
    server = server or server_of(scenario, crash_after)
    operator = reconciler(server)
    events = list(scenario.script)
    for _ in range(400):
        was_settled = _reason(server, settled=True)
        try:
            outcome = await operator.reconcile(KEY)
        except CrashedError:
            operator = reconciler(server)
            continue
        except ApiError as error:
            if error.status != HTTPStatus.CONFLICT:
                raise
            continue
        if was_settled:
            return server  # this was the reconcile after the job's end, which deletes leftover objects
        if _reason(server, settled=True):
            continue
        if events and outcome.after != 0 and events[0](server):
            events.pop(0)
            continue
        server.pass_time(1 if outcome.after is None else max(1, outcome.after))
    raise AssertionError(f"the job did not end: {server.job.get('status')}")


def _attempt(server: ModelServer) -> int:
    current = server.job.get("status", {}).get("attempts", {}).get("current")
    return int(current["number"]) if current and server.pods else 0


def _reason(server: ModelServer, *, settled: bool = False) -> str:
    """Return the reason of the condition Succeeded.

    With ``settled``, return an empty text while the job has not ended.
    """
    for item in server.job.get("status", {}).get("conditions", []):
        if item["type"] == "Succeeded" and not (settled and item["status"] == "Unknown"):
            return str(item["reason"])
    return ""


def essence(server: ModelServer) -> dict[str, Any]:
    """Return those parts of the final state that a crash must not change. Times are left out."""
    status = server.job["status"]
    attempts = status["attempts"]
    return {
        "conditions": [(item["type"], item["status"], item["reason"]) for item in status["conditions"]],
        "counts": (attempts["started"], attempts["charged"], attempts["free"]),
        "recent": [(past["number"], past["verdict"], past["reason"]) for past in attempts["recent"]],
        "artifact": status.get("artifact"),
        "created": server.created,
        "tried": server.tried,
        "checks": [check["metadata"]["name"] for check in server.checks],
        "preflight": {name: status.get("preflight", {}).get(name) for name in ("tries", "verdict")},
        "left": (sorted(server.children), sorted(server.config_maps), sorted(server.network_policies)),
    }


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_crash_after_any_write_changes_nothing(name: str) -> None:
    scenario = SCENARIOS[name]
    faultless = await run_to_end(scenario)
    expected = essence(faultless)
    assert (_reason(faultless, settled=True), expected["counts"]) == (scenario.reason, scenario.counts)
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
    while not _reason(server, settled=True):
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
    memory.store_report(KEY, UID, _report(20), server.now)
    await operator.reconcile(KEY)
    while memory.job(KEY, UID).reported_writes.take(server.now.timestamp()):
        pass  # takes every token of the job
    memory.store_report(KEY, UID, _report(20, 46), server.now)
    # The pods end while the newest report must wait for its status write, because the job's token bucket is empty.
    server.pods = []
    outcome = await operator.reconcile(KEY)
    assert memory.reporting_attempt(KEY) is None
    assert outcome.after is not None
    server.pass_time(outcome.after)
    await operator.reconcile(KEY)
    assert [item["step"] for item in server.job["status"]["checkpoints"]] == [20, 46]


def _report(*checkpoints: int) -> Report:
    """Return a report of pod `p` with committed checkpoints of the steps ``checkpoints``."""
    records = [
        CheckpointRecord(run=1, step=step, uri="s3://b/c", bytes=9, manifest_sha256="ab", time=NOW)
        for step in checkpoints
    ]
    return Report(
        run=1, pod_uid="p", phase=Phase.ENDED, ranks=2, step=max(checkpoints), total_steps=60, epoch=0.5, metrics={},
        history=[], checkpoints=records,
    )  # fmt: skip


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
    assert _reason(server) == "Completed"
    assert server.job["status"]["attempts"]["charged"] == 0
