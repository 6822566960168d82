"""The next attempt avoids, if possible, the nodes that ended earlier attempts. Only the newest two attempts count;
attempts that ended by a suspension are skipped. A job ends if no node can start its pods."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import AttemptsStatus, CheckpointStatus, PastAttempt
from finetune_operator.decide.decision import JobEnd
from finetune_operator.decide.failed_nodes import nodes_to_avoid
from finetune_operator.objects.observations import PodObservation
from finetune_operator.objects.pod_template import AttemptSpec, pod_template
from finetune_operator.process.metrics import Metrics
from tests.operator.builders import NOW, advance, at, checkpoint, current, job, job_manifest, pod
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.test_attempts import running, seen, seen_no_child

PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def past(number: int, reason: str = "NodeRefused", node: str = "", verdict: str = "Free") -> PastAttempt:
    return PastAttempt(
        number=number, verdict=verdict, reason=reason, node=node or f"gpu-{number}", start_time=at(0), end_time=at(1)
    )


def affinity(nodes: tuple[str, ...], **template: Any) -> dict[str, Any]:
    """Return the affinity of the pods of an attempt that is to avoid ``nodes``."""
    attempt = AttemptSpec(number=2, name="a-2", image="i", report_base_url="https://o", avoided_nodes=nodes)
    found: dict[str, Any] = pod_template(job(podTemplate=template), attempt)["spec"].get("affinity", {})
    return found


def test_the_nodes_of_the_newest_two_attempts_that_a_node_ended_are_avoided() -> None:
    assert nodes_to_avoid([]) == ()
    assert nodes_to_avoid([past(1), past(2), past(3)]) == ("gpu-2", "gpu-3")
    assert nodes_to_avoid([past(1, node="a"), past(2, node="a")]) == ("a",)
    assert nodes_to_avoid([past(1), past(2, "Crashed")]) == ("gpu-1",)
    assert nodes_to_avoid([past(1), past(2, "Suspended"), past(3, "ResumedTooEarly")]) == ("gpu-1",)


@pytest.mark.parametrize("reason", ["NodeLost", "DeletionByTaintManager", "TerminationByKubelet", "DeletionByPodGC"])
def test_a_node_that_is_lost_is_avoided_like_a_node_that_refuses(reason: str) -> None:
    assert nodes_to_avoid([past(1, reason)]) == ("gpu-1",)


@pytest.mark.parametrize("reason", ["EvictionByEvictionAPI", "PreemptionByScheduler", "PodDeleted", "BadInput"])
def test_a_node_is_not_blamed_for_what_somebody_else_did(reason: str) -> None:
    assert nodes_to_avoid([past(1, reason)]) == ()


def test_the_pods_prefer_every_node_but_those() -> None:
    assert affinity(()) == {}
    requirements = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in ("gpu-1", "gpu-2")]
    preference = {"weight": 100, "preference": {"matchFields": requirements}}
    assert affinity(("gpu-1", "gpu-2")) == {"nodeAffinity": {PREFERRED: [preference]}}


def test_the_affinity_of_the_user_is_kept_whole() -> None:
    zone = {"key": "zone", "operator": "In", "values": ["a"]}
    own = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [zone]}]},
            PREFERRED: [{"weight": 7, "preference": {"matchExpressions": [zone]}}],
        },
        "podAntiAffinity": {
            PREFERRED: [
                {
                    "weight": 1,
                    "podAffinityTerm": {
                        "labelSelector": {"matchLabels": {"a": "b"}},
                        "topologyKey": "kubernetes.io/hostname",
                    },
                }
            ]
        },
    }
    plain, merged = affinity((), affinity=own), affinity(("gpu-1",), affinity=own)
    added = merged["nodeAffinity"][PREFERRED].pop()
    assert added["preference"]["matchFields"][0]["values"] == ["gpu-1"]
    assert merged == plain


def refused(attempt: int) -> list[PodObservation]:
    command = "exec: no-such-program: executable file not found in $PATH"
    return [
        pod(0, attempt=attempt, exit_code=128, reason="StartError", message=command, uid=f"0-{attempt}"),
        pod(1, attempt=attempt, exit_code=128, reason="StartError", message=command, uid=f"1-{attempt}"),
    ]


def _until_the_end(policy: RunPolicySpec, checkpoint_in: int = 0) -> tuple[AttemptsStatus, JobEnd]:
    """Simulate attempts of an image that no node can start, until the job ends. Return `status.attempts` and the job's
    end. If ``checkpoint_in`` is not 0, the attempt with this number commits a checkpoint."""
    attempts, checkpoints = AttemptsStatus(), list[CheckpointStatus]()
    for number in range(1, 100):
        started = number * 1000.0
        opened = running(
            started=number,
            current=current(number, started=started, indexes=()),
            **attempts.model_dump(include={"charged", "free", "recent"}),
        )
        if number == checkpoint_in:
            checkpoints = [checkpoint(started + 1)]
        shown: dict[str, Any] = {"policy": policy.model_dump(), "checkpoints": checkpoints}
        step = advance(opened, seen(refused(number), now=started + 20, **shown))
        attempts = step.attempts
        if step.end is None and attempts.current is not None:
            step = advance(attempts, seen(refused(number), now=started + 40, **shown))
            attempts = step.attempts
        if step.end is not None:
            return attempts, step.end
    raise AssertionError("the job is tried for ever")


def test_an_image_that_no_node_can_start_is_charged_from_the_fourth_attempt_on() -> None:
    attempts, end = _until_the_end(RunPolicySpec(max_retries=2))
    assert [one.verdict for one in attempts.recent] == ["Free"] * 3 + ["Charged"] * 3
    assert (end.succeeded, end.reason) == (False, "RetriesExhausted")
    assert "executable file not found" in end.message


def test_a_checkpoint_makes_refusals_free_again() -> None:
    attempts, _ = _until_the_end(RunPolicySpec(max_retries=0), checkpoint_in=2)
    assert [one.verdict for one in attempts.recent] == ["Free"] * 5 + ["Charged"]


def test_a_free_attempt_for_another_reason_is_not_charged_for_refusals_that_were() -> None:
    recent = [*(past(number) for number in (1, 2, 3)), past(4, verdict="Charged")]
    opened = running(started=5, charged=1, free=3, recent=recent, current=current(5, started=100))
    step = advance(opened, seen([pod(0, attempt=5, deleted=130), pod(1, attempt=5)], now=150))
    step = advance(step.attempts, seen([pod(0, attempt=5, deleted=130), pod(1, attempt=5)], now=170))
    assert step.attempts.recent[-1].verdict == "Free"
    assert advance(step.attempts, seen_no_child(now=180)).end is None


async def test_an_attempt_whose_containers_a_runtime_goes_on_refusing_ends_and_the_next_avoids_the_node() -> None:
    server = ModelServer(job_manifest(runPolicy={"preflight": "Skip"}), NOW)
    metrics = Metrics()
    operator = reconciler(server, metrics=metrics)

    async def pass_time(seconds: int) -> None:
        for _ in range(seconds):
            await operator.reconcile(KEY)
            server.pass_time(1)

    await pass_time(5)
    for stuck in server.pods:
        waiting = {"reason": "CreateContainerError", "message": "CDI device injection failed"}
        stuck["status"]["containerStatuses"][0]["state"] = {"waiting": waiting}
    await pass_time(115)
    assert server.job["status"]["attempts"]["recent"] == []
    await pass_time(60)
    attempts = server.job["status"]["attempts"]
    (ended,) = attempts["recent"]
    assert (ended["verdict"], ended["reason"], ended["node"]) == ("Free", "NodeRefused", "node-1")
    assert "CreateContainerError: CDI device injection failed" in ended["message"]
    assert attempts["started"] == 2
    (child,) = server.children.values()
    pods = child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (preference,) = pods["affinity"]["nodeAffinity"][PREFERRED]
    assert preference["preference"]["matchFields"] == [
        {"key": "metadata.name", "operator": "NotIn", "values": ["node-1"]}
    ]
    assert 'finetune_node_refusals_total{node="node-1"} 1.0' in metrics.render().decode()
