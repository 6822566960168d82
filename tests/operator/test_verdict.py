"""Which verdict an attempt gets. `TABLE` lists the pods of attempts with the expected verdict and reason. `CASES` adds
other evidence, such as the PyTorchJob."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import AttemptCause
from finetune_core.contract import Outcome, Phase, Result
from finetune_operator.decide.rules import RULES
from finetune_operator.decide.verdict import Ruling, Verdict, replaces
from finetune_operator.objects.observations import ContainerObservation, ContainerState
from finetune_operator.observe.observation import BatchObservation
from tests.operator.builders import NOW, at, child, current, pod, result
from tests.operator.verdicts import evidence_of, judged, ruled

DONE = result(Outcome.COMPLETED, with_artifact=True)
GATE = result(Outcome.GATE_FAILED, "evaluation.require: exact must be at least 0.8 and is 0.5", with_artifact=True)
BAD = result(Outcome.BAD_INPUT, "dataset.train: column `meaning` must exist")
BROKEN = Result(
    outcome=Outcome.OUTSIDE_FAILURE, message="a GPU of the node failed: uncorrectable ECC error", node_fault=True
).to_termination_message()


BATCH = BatchObservation(planned=4, share=8, on_gpus=True)


TABLE = {
    "all pods run": ([pod(0), pod(1)], None),
    "one pod ended with 0, the other still uploads": ([pod(0, exit_code=0, message=DONE), pod(1)], None),
    "all ended with 0 and an artifact": (
        [pod(0, exit_code=0, message=DONE), pod(1, exit_code=0)],
        ("Succeeded", "Completed"),
    ),
    "stopped early": (
        [pod(i, exit_code=0, message=result(Outcome.EARLY_STOPPED, with_artifact=True)) for i in (0, 1)],
        ("Succeeded", "EarlyStopped"),
    ),
    "a required score was not reached": (
        [pod(0, exit_code=0, message=GATE), pod(1, exit_code=0)],
        ("Permanent", "GateFailed"),
    ),
    "all ended with 0 and no artifact": ([pod(0, exit_code=0), pod(1, exit_code=0)], ("Charged", "NoArtifact")),
    "a success that names no artifact": (
        [pod(i, exit_code=0, message=result(Outcome.COMPLETED)) for i in (0, 1)],
        ("Charged", "NoArtifact"),
    ),
    "bad input": ([pod(0, exit_code=64, message=BAD), pod(1)], ("Permanent", "BadInput")),
    "diverged": ([pod(0), pod(1, exit_code=65)], ("Permanent", "Diverged")),
    "out of memory by the trainer's own count": ([pod(0, exit_code=66), pod(1)], ("Permanent", "OutOfMemory")),
    "killed by the kernel": ([pod(0, exit_code=137, reason="OOMKilled"), pod(1)], ("Permanent", "OutOfMemory")),
    "bad input decides before a peer's 75": (
        [pod(0, exit_code=75, finished=1), pod(1, exit_code=64, finished=2)],
        ("Permanent", "BadInput"),
    ),
    "bad input decides before a deleted pod": (
        [pod(0, exit_code=64, finished=5), pod(1, deleted=1)],
        ("Permanent", "BadInput"),
    ),
    "64 of a pod that was deleted before is no evidence": (
        [pod(0, exit_code=64, finished=5, deleted=1), pod(1)],
        ("Free", "PodDeleted"),
    ),
    "a pod was deleted and still runs": ([pod(0), pod(1, deleted=0)], ("Free", "PodDeleted")),
    "a pod was deleted and left with 143": (
        [pod(0, exit_code=143, finished=9), pod(1, exit_code=143, finished=9, deleted=0)],
        ("Free", "PodDeleted"),
    ),
    "a pod was deleted and was killed": (
        [pod(0), pod(1, exit_code=137, finished=90, deleted=0)],
        ("Free", "PodDeleted"),
    ),
    "the backend deleted the others after the first failure": (
        [pod(0, exit_code=1, finished=5), pod(1, exit_code=143, finished=6, deleted=6)],
        ("Charged", "Crashed"),
    ),
    "deleted first, the peer crashed for it": (
        [pod(0, exit_code=1, finished=5), pod(1, deleted=4)],
        ("Free", "PodDeleted"),
    ),
    "drained": (
        [pod(0), pod(1, disruption="EvictionByEvictionAPI", disrupted_at=at(0))],
        ("Free", "EvictionByEvictionAPI"),
    ),
    "bad input of a pod that was drained afterwards": (
        [pod(0, exit_code=64, finished=0, disruption="EvictionByEvictionAPI", disrupted_at=at(5)), pod(1)],
        ("Permanent", "BadInput"),
    ),
    "killed in the second in which the node's pressure showed": (
        [pod(0), pod(1, exit_code=137, finished=1, disruption="TerminationByKubelet", disrupted_at=at(1))],
        ("Free", "TerminationByKubelet"),
    ),
    "a node's pressure took a pod with a sign": (
        [pod(0), pod(1, exit_code=137, finished=1, disruption="TerminationByKubelet", disrupted_at=at(0))],
        ("Free", "TerminationByKubelet"),
    ),
    "evicted without a sign": (
        [pod(0), pod(1, phase="Failed", reason_="Evicted")],
        ("Charged", "Evicted"),
    ),
    "the node is lost": ([pod(0), pod(1, phase="Unknown")], ("Free", "NodeLost")),
    "a pod vanished": ([pod(0)], ("Free", "PodVanished")),
    "a pod was replaced": ([pod(0), pod(1, uid="another")], ("Free", "PodReplaced")),
    "a pod is missing after a failure": ([pod(0, exit_code=1)], ("Charged", "Crashed")),
    "something outside failed": ([pod(0, exit_code=75), pod(1)], ("Charged", "OutsideFailure")),
    "a crash explains the peer's 75": (
        [pod(0, exit_code=75, finished=1), pod(1, exit_code=139, finished=2)],
        ("Charged", "Crashed"),
    ),
    "75 decides before 143": ([pod(0, exit_code=143), pod(1, exit_code=75)], ("Charged", "OutsideFailure")),
    "a kubelet refused a pod": (
        [pod(0, phase="Failed", reason_="UnexpectedAdmissionError", container=None), pod(1)],
        ("Free", "NodeRefused"),
    ),
    "a kubelet made room for a critical pod": (
        [pod(0), pod(1, exit_code=137, finished=3, phase="Failed", reason_="Preempting")],
        ("Free", "NodeRefused"),
    ),
    "a container runtime could not start a container": (
        [pod(0), pod(1, exit_code=128, reason="StartError")],
        ("Free", "NodeRefused"),
    ),
    "a pod that its node did not start explains the peer's 75": (
        [pod(0, exit_code=75, finished=9), pod(1, exit_code=128, reason="StartError")],
        ("Free", "NodeRefused"),
    ),
    "a trainer says that a GPU of its node is broken": (
        [pod(0, exit_code=1), pod(1, exit_code=75, message=BROKEN)],
        ("Free", "NodeRefused"),
    ),
    "a trainer that says so and crashed": ([pod(0), pod(1, exit_code=1, message=BROKEN)], ("Charged", "Crashed")),
    "bad input decides before a broken GPU": (
        [pod(0, exit_code=64, message=BAD), pod(1, exit_code=75, message=BROKEN)],
        ("Permanent", "BadInput"),
    ),
    "bad input decides before a pod that its node did not start": (
        [pod(0, exit_code=64, message=BAD), pod(1, exit_code=128, reason="StartError")],
        ("Permanent", "BadInput"),
    ),
    "a node restarted": ([pod(0), pod(1, exit_code=255, reason="Unknown")], ("Free", "NodeLost")),
    "a container runtime no longer has a container": (
        [pod(0, exit_code=75, finished=9), pod(1, exit_code=137, reason="ContainerStatusUnknown")],
        ("Free", "NodeLost"),
    ),
    "an evicted pod whose container is gone": (
        [pod(0), pod(1, exit_code=137, reason="ContainerStatusUnknown", phase="Failed", reason_="Evicted")],
        ("Charged", "Evicted"),
    ),
    "a program that ended with 255": ([pod(0), pod(1, exit_code=255, reason="Error")], ("Charged", "Crashed")),
    "a program that ended with 128 by itself": (
        [pod(0, exit_code=128, reason="Error"), pod(1)],
        ("Charged", "Crashed"),
    ),
    "a pod that reached a deadline of its own": (
        [pod(0), pod(1, phase="Failed", reason_="DeadlineExceeded", container=None)],
        ("Charged", "DeadlineExceeded"),
    ),
    "137 without a deletion": ([pod(0, exit_code=137), pod(1)], ("Charged", "Crashed")),
}


@pytest.mark.parametrize("name", TABLE)
def test_verdict(name: str) -> None:
    pods, expected = TABLE[name]
    assert ruled(pods) == expected


CASES: list[tuple[list[Any], dict[str, Any]]] = [
    *((pods, {}) for pods, _ in TABLE.values()),
    *(([pod(0), pod(1)], {"policy": RunPolicySpec(**policy)}) for policy in ({"cancel": True}, {"suspend": True})),
    ([pod(0)], {"policy": RunPolicySpec(active_deadline_seconds=60), "active_seconds": 60}),
    (
        [pod(0)],
        {
            "policy": RunPolicySpec(pending_deadline_seconds=60),
            "current": current().model_copy(update={"admitted_time": at(-60)}),
        },
    ),
    ([pod(0)], {"child": child(suspended=True)}),
    ([], {"child": child(failed=True, failed_at=at(101), resumed_at=at(100)), "current": current(indexes=())}),
    ([pod(0, exit_code=0, message=GATE), pod(1, exit_code=0)], {}),
    *(([pod(0), pod(1)], {"child": changed}) for changed in (None, child(uid="another"), child(replicas=3))),
    ([pod(0, exit_code=143), pod(1)], {}),
    ([pod(0), pod(1, phase="Failed", container=None)], {}),
    ([], {"child": child(failed=True), "current": current(indexes=())}),
    *(([pod(0, exit_code=66), pod(1)], {"batch": BATCH, "halvings": halvings}) for halvings in (0, 1, 2)),
]
"""Pods and other evidence of attempts. Each rule of `RULES` decides at least one of these cases."""


def test_every_rule_decides_somewhere_with_the_verdict_that_the_table_names() -> None:
    """Each rule must decide with the verdict that `RULES` states for it, and that docs/architecture.md shows."""
    decided = set()
    for pods, changes in CASES:
        evidence = evidence_of(pods, **changes)
        rule = next((rule for rule in RULES if rule.decide(evidence) is not None), None)
        if rule is not None:
            decided.add(rule.name)
            answer = rule.decide(evidence)
            assert getattr(answer, "verdict", None) == rule.verdict, rule.name
            assert getattr(answer, "ordered", False) is rule.is_order, rule.name
    assert decided == {rule.name for rule in RULES}


@pytest.mark.parametrize(("halvings", "verdict"), [(0, Verdict.CHARGED), (1, Verdict.FREE), (2, Verdict.PERMANENT)])
def test_half_the_micro_batch_is_tried_until_it_is_one(halvings: int, verdict: Verdict) -> None:
    ruling = judged([pod(0, exit_code=66), pod(1)], batch=BATCH, halvings=halvings)
    assert ruling is not None
    assert (ruling.verdict, ruling.reason) == (verdict, "OutOfMemory")


def test_a_pod_of_gpus_that_was_killed_for_its_own_memory_is_not_helped_by_a_smaller_micro_batch() -> None:
    pods = [pod(0, exit_code=137, reason="OOMKilled"), pod(1)]
    assert ruled(pods, batch=BATCH, last_phase="Training") == ("Permanent", "OutOfMemory")
    on_cpus = BatchObservation(planned=4, share=8, on_gpus=False)
    assert ruled(pods, batch=on_cpus, last_phase="Training") == ("Charged", "OutOfMemory")
    assert ruled(pods, batch=on_cpus, last_phase="Loading") == ("Permanent", "OutOfMemory")


@pytest.mark.parametrize(
    ("phase", "verdict"), [(Phase.TRAINING, "Charged"), (Phase.EVALUATING, "Charged"), (Phase.LOADING, "Permanent")]
)
def test_the_phase_of_a_failure_is_that_of_the_result_and_not_that_of_the_final_report(
    phase: Phase, verdict: str
) -> None:
    """A trainer that ends by itself sends a final report, whose phase is Ended."""
    message = Result(outcome=Outcome.OUT_OF_MEMORY, message="no memory", phase=phase).to_termination_message()
    for pods in ([pod(0, exit_code=66, message=message), pod(1)], [pod(0), pod(1, exit_code=66, message=message)]):
        assert ruled(pods, batch=BATCH, last_phase="Ended") == (verdict, "OutOfMemory")


def test_a_final_report_does_not_say_in_which_phase_another_pod_was_killed() -> None:
    on_cpus = BatchObservation(planned=4, share=8, on_gpus=False)
    ruling = judged([pod(0), pod(1, exit_code=137, reason="OOMKilled")], batch=on_cpus, last_phase="Ended")
    assert ruling is not None
    assert ruling.verdict is Verdict.CHARGED
    assert "Ended" not in ruling.message


def test_an_order_is_obeyed_only_while_no_cause_is_recorded() -> None:
    cancelled = {"policy": RunPolicySpec(cancel=True)}
    assert ruled([pod(0), pod(1)], **cancelled) == ("Permanent", "Cancelled")
    ending = current().model_copy(update={"cause": _cause(Verdict.CHARGED, "Crashed")})
    assert ruled([pod(0), pod(1)], current=ending, **cancelled) is None


def test_a_sidecar_does_not_hide_that_training_ended() -> None:
    pods = [pod(i, exit_code=0, message=DONE, phase="Running") for i in (0, 1)]
    assert ruled(pods) == ("Succeeded", "Completed")


def test_the_final_report_counts_once_the_pods_are_gone() -> None:
    final = Result.from_termination_message(DONE)
    assert ruled([], final_result=final) == ("Succeeded", "Completed")
    assert ruled([pod(0), pod(1)], final_result=final) is None


def test_a_deleted_child_is_free_and_a_child_never_seen_is_no_evidence() -> None:
    assert ruled([], child=None, current=current(indexes=())) == ("Free", "ChildDeleted")
    assert ruled([], child=None, child_uid="", current=current(indexes=())) is None


def test_a_child_of_another_uid_or_size_ends_the_attempt() -> None:
    pods = [pod(0), pod(1)]
    assert ruled(pods, child=child(uid="another")) == ("Free", "ChildReplaced")
    assert ruled(pods, child=child(replicas=3)) == ("Free", "ChildChanged")


def test_a_child_that_failed_without_pods_is_charged() -> None:
    assert ruled([], child=child(failed=True), current=current(indexes=())) == ("Charged", "ChildFailed")


def test_a_suspended_child_is_left_alone() -> None:
    assert ruled([], child=child(suspended=True)) is None
    assert ruled([pod(0, deleted=0), pod(1, deleted=0)], child=child(suspended=True)) is None


def test_the_trainers_sentence_is_the_message() -> None:
    ruling = judged([pod(0, exit_code=64, message=BAD), pod(1)])
    assert ruling is not None
    assert ruling.message == "dataset.train: column `meaning` must exist"
    assert ruling.node == "node-0"


def test_a_kill_for_lack_of_memory_says_when_how_much_and_what_to_change() -> None:
    killed = pod(0, exit_code=137, reason="OOMKilled", memory_limit="64Gi")
    ruling = judged([killed, pod(1)], last_phase="Training")
    assert ruling is not None
    assert "in phase Training at its memory limit of 64Gi; raise `resources.memory`" in ruling.message
    ruling = judged([pod(0, exit_code=137, reason="OOMKilled"), pod(1)])
    assert ruling is not None
    assert "killed the trainer at its memory limit; raise" in ruling.message


def test_a_container_that_can_be_judged_by_its_pod_only() -> None:
    waiting = ContainerObservation(state=ContainerState.WAITING)
    failed = pod(1, container=waiting, phase="Failed", reason_="Evicted", message_="low on memory")
    assert ruled([pod(0), failed]) == ("Charged", "Evicted")


def _cause(verdict: Verdict, reason: str) -> AttemptCause:
    return AttemptCause(verdict=verdict, reason=reason, time=NOW)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (None, Ruling(verdict=Verdict.FREE, reason="PodDeleted", message=""), True),
        (_cause(Verdict.FREE, "PodDeleted"), Ruling(verdict=Verdict.CHARGED, reason="Crashed", message=""), False),
        (_cause(Verdict.FREE, "PodDeleted"), Ruling(verdict=Verdict.PERMANENT, reason="BadInput", message=""), True),
        (
            _cause(Verdict.CHARGED, "OutsideFailure"),
            Ruling(verdict=Verdict.CHARGED, reason="Crashed", message=""),
            True,
        ),
        (
            _cause(Verdict.CHARGED, "OutsideFailure"),
            Ruling(verdict=Verdict.FREE, reason="NodeRefused", message=""),
            True,
        ),
        (_cause(Verdict.CHARGED, "Crashed"), Ruling(verdict=Verdict.FREE, reason="PodDeleted", message=""), False),
        (
            _cause(Verdict.PERMANENT, "BadInput"),
            Ruling(verdict=Verdict.PERMANENT, reason="Diverged", message=""),
            False,
        ),
    ],
)
def test_what_was_seen_first_stays_unless_it_was_a_consequence(
    old: AttemptCause | None, new: Ruling, expected: bool
) -> None:
    assert replaces(old, new) is expected
