"""Scenarios for a job from its creation to its end, with `ModelServer` in place of the API server. A scenario says what
the pods do, what a person orders, and how the job must end. `run_to_end` runs a scenario, with or without a crash of
the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from finetune_core.contract import CheckpointRecord, Outcome, Phase, Report
from finetune_core.contract.preflight_result import Finding, FindingKind, PreflightResult
from finetune_operator.kube.api_errors import ApiError
from tests.operator.builders import NOW, former_run, job_manifest, result
from tests.operator.model import CrashedError, ModelServer, Script
from tests.operator.operators import KEY, reconciler

DONE = result(Outcome.COMPLETED, with_artifact=True)
UNREACHED = result(Outcome.GATE_FAILED, "evaluation.require: exact must be at least 0.8", with_artifact=True)

Action = Callable[[ModelServer], bool]


def during(attempt: int, action: Action) -> Action:
    """Return an action that does ``action`` while pods of ``attempt`` exist, else returns False."""
    return lambda world: _attempt(world) == attempt and action(world)


def once(reason: str, action: Action) -> Action:
    """Return an action that does ``action`` while Succeeded has ``reason`` and no training pod exists, else returns
    False."""
    return lambda world: reason_of(world) == reason and not world.pods and action(world)


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
    "crashes, then does not reach a required score": Scenario(
        script=[during(1, ends(1)), during(2, ends(0, UNREACHED))], reason="GateFailed", counts=(2, 1, 0)
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
    "finds an artifact of a former job that did not reach a required score": Scenario(
        script=[checked(0, former_run(done=True, outcome=Outcome.GATE_FAILED))],
        policy=CHECKED,
        reason="GateFailed",
        counts=(0, 0, 0),
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
    """Reconcile the job of ``scenario`` until it has ended, and once more. Return the model server.

    The model server makes the operator crash after write number ``crash_after``; None means no crash. After a crash, a
    new operator goes on. If the caller passes its own ``server`` with the job of ``scenario``, ``crash_after`` has no
    effect. After an answer 409 the job is reconciled again, as `controller.py` does.
    """
    server = server or server_of(scenario, crash_after)
    operator = reconciler(server)
    events = list(scenario.script)
    for _ in range(400):
        was_settled = reason_of(server, settled=True)
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
        if reason_of(server, settled=True):
            continue
        if events and outcome.after != 0 and events[0](server):
            events.pop(0)
            continue
        server.pass_time(1 if outcome.after is None else max(1, outcome.after))
    raise AssertionError(f"the job did not end: {server.job.get('status')}")


def _attempt(server: ModelServer) -> int:
    current = server.job.get("status", {}).get("attempts", {}).get("current")
    return int(current["number"]) if current and server.pods else 0


def reason_of(server: ModelServer, *, settled: bool = False) -> str:
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


def report_of(*checkpoints: int) -> Report:
    """Return a report of pod `p` with committed checkpoints of the steps ``checkpoints``."""
    records = [
        CheckpointRecord(run=1, step=step, uri="s3://b/c", bytes=9, manifest_sha256="ab", time=NOW)
        for step in checkpoints
    ]
    return Report(
        run=1, pod_uid="p", phase=Phase.ENDED, ranks=2, step=max(checkpoints), total_steps=60, epoch=0.5, metrics={},
        history=[], checkpoints=records,
    )  # fmt: skip
