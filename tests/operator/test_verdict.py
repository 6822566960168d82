"""Which verdict an attempt gets. Tables list pods and PyTorchJob of an attempt, and the expected verdict and reason."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import AttemptCause
from finetune_core.contract import Outcome, Result
from finetune_operator.decide.evidence import Evidence
from finetune_operator.decide.rules import RULES, judge
from finetune_operator.decide.verdict import Ruling, Verdict, replaces
from finetune_operator.objects.observations import START_ERRORS, ContainerObservation, ContainerState
from finetune_operator.observe.observation import is_of_an_earlier_admission
from tests.operator.builders import CHILD_UID, NOW, at, child, current, pod, result
from tests.operator.kubelet_refusals import KUBELET_REFUSALS

DONE = result(Outcome.COMPLETED, with_artifact=True)
GATE = result(Outcome.GATE_FAILED, "evaluation.require: exact must be at least 0.8 and is 0.5", with_artifact=True)
BAD = result(Outcome.BAD_INPUT, "dataset.train: column `meaning` must exist")


def ruled(pods: list[Any], **changes: Any) -> tuple[str, str] | None:
    """Judge an attempt of two pods and return verdict and reason."""
    ruling = _judge(pods, **changes)
    return (str(ruling.verdict), ruling.reason) if ruling else None


def _judge(pods: list[Any], **changes: Any) -> Ruling | None:
    return judge(_evidence(pods, **changes))


def _evidence(pods: list[Any], **changes: Any) -> Evidence:
    values: dict[str, Any] = {
        "current": current(),
        "child": child(),
        "child_uid": CHILD_UID,
        "pods": pods,
        "nodes": 2,
        "final_result": None,
        "policy": RunPolicySpec(),
        "now": NOW,
    }
    return Evidence(**(values | changes))


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


SAME_SECOND = {
    # name: (pods, whether training-operator has failed the PyTorchJob, verdict and reason)
    "the backend cleaned up after a crash": (
        [pod(0, exit_code=1, finished=5), pod(1, exit_code=143, finished=5, deleted=5)],
        True,
        ("Charged", "Crashed"),
    ),
    "the backend cleaned up after a 75": (
        [pod(0, exit_code=75, finished=5), pod(1, exit_code=143, finished=5, deleted=5)],
        True,
        ("Charged", "OutsideFailure"),
    ),
    "somebody deleted a pod and its peer crashed for it": (
        [pod(0, exit_code=1, finished=5), pod(1, deleted=5)],
        False,
        ("Free", "PodDeleted"),
    ),
    "somebody deleted a pod and both left with 143": (
        [pod(0, exit_code=143, finished=5), pod(1, exit_code=143, finished=5, deleted=5)],
        True,
        ("Free", "PodDeleted"),
    ),
    "somebody deleted a pod that left at once": (
        [pod(0), pod(1, exit_code=143, finished=5, deleted=5)],
        False,
        ("Free", "PodDeleted"),
    ),
    "somebody deleted a pod that was killed at once": (
        [pod(0), pod(1, exit_code=137, finished=5, deleted=5)],
        False,
        ("Free", "PodDeleted"),
    ),
    "a pod that failed and was deleted then": (
        [pod(0), pod(1, exit_code=1, finished=5, deleted=5)],
        False,
        ("Charged", "Crashed"),
    ),
    "bad input in the second of a deletion": (
        [pod(0), pod(1, exit_code=64, finished=5, deleted=5)],
        False,
        ("Permanent", "BadInput"),
    ),
    "143 before anybody asked for it": (
        [pod(0), pod(1, exit_code=143, finished=4, deleted=5)],
        True,
        ("Charged", "Stopped"),
    ),
}


@pytest.mark.parametrize("name", SAME_SECOND)
def test_in_the_same_second_it_counts_whether_the_backend_had_begun_to_clean_up(name: str) -> None:
    pods, backend_failed, expected = SAME_SECOND[name]
    assert ruled(pods, child=child(failed=backend_failed)) == expected


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0)])
def test_a_free_attempt_names_the_pod_that_a_person_deleted(first: int, second: int) -> None:
    """A person deletes the first pod. training-operator deletes the other pod in the same second.

    The resourceVersion, which is higher for the other pod, shows the order of the deletions.
    """
    pods = [pod(first, deleted=5, version=1000), pod(second, deleted=5, version=1001)]
    for order in (pods, pods[::-1]):
        ruling = _judge(order, child=child(failed=True))
        assert ruling is not None
        assert (ruling.message, ruling.node) == (f"pod job-1-worker-{first} was deleted", f"node-{first}")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (None, "ChildDeleted"),
        (child(deleting=True), "ChildDeleted"),
        (child(uid="another"), "ChildReplaced"),
        (child(replicas=1), "ChildChanged"),
    ],
)
def test_a_free_attempt_names_the_child_where_its_pods_go_for_it(changed: Any, reason: str) -> None:
    assert ruled([pod(0), pod(1, deleted=5)], child=changed) == ("Free", reason)


RESUMED = {"resumed_at": at(100)}


def test_pods_of_an_earlier_admission_are_told_by_when_they_were_deleted() -> None:
    suspended = child(**RESUMED)
    assert is_of_an_earlier_admission(pod(0, deleted=60), suspended)
    assert is_of_an_earlier_admission(pod(0, deleted=100), suspended)
    assert not is_of_an_earlier_admission(pod(0, deleted=101), suspended)
    assert not is_of_an_earlier_admission(pod(0), suspended)
    assert not is_of_an_earlier_admission(pod(0, deleted=60), child())


@pytest.mark.parametrize(
    ("pods", "failed_at", "expected"),
    [
        ([], 101, ("Free", "ResumedTooEarly")),
        ([pod(0, deleted=102)], 101, ("Free", "ResumedTooEarly")),
        ([pod(0, exit_code=1, finished=150), pod(1)], 151, ("Charged", "Crashed")),
        ([], 400, ("Charged", "ChildFailed")),
    ],
    ids=["old pods only", "and new ones that the backend deletes", "a new pod failed", "much later"],
)
def test_a_child_that_failed_for_the_pods_of_an_earlier_admission_is_free(
    pods: list[Any], failed_at: float, expected: tuple[str, str]
) -> None:
    failed = child(failed=True, failed_at=at(failed_at), **RESUMED)
    assert ruled(pods, child=failed, current=current(indexes=())) == expected


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
]
"""Pods and other evidence of attempts. Each rule of `RULES` decides at least one of these cases."""


def test_every_rule_decides_somewhere_with_the_verdict_that_the_table_names() -> None:
    """Each rule must decide with the verdict that `RULES` states for it, and that docs/architecture.md shows."""
    decided = set()
    for pods, changes in CASES:
        evidence = _evidence(pods, **changes)
        rule = next((rule for rule in RULES if rule.decide(evidence) is not None), None)
        if rule is not None:
            decided.add(rule.name)
            answer = rule.decide(evidence)
            assert getattr(answer, "verdict", None) == rule.verdict, rule.name
            assert getattr(answer, "ordered", False) is rule.is_order, rule.name
    assert decided == {rule.name for rule in RULES}


def test_an_order_is_obeyed_only_while_no_cause_is_recorded() -> None:
    cancelled = {"policy": RunPolicySpec(cancel=True)}
    assert ruled([pod(0), pod(1)], **cancelled) == ("Permanent", "Cancelled")
    ending = current().model_copy(update={"cause": _cause(Verdict.CHARGED, "Crashed")})
    assert ruled([pod(0), pod(1)], current=ending, **cancelled) is None


def test_all_pods_that_are_gone_are_named() -> None:
    """Both pods are gone when the operator reconciles, so nothing shows which of them a person deleted first."""
    ruling = _judge([])
    assert ruling is not None
    assert (ruling.verdict, ruling.reason) == (Verdict.FREE, "PodVanished")
    assert ruling.message == "pods job-1-worker-0, job-1-worker-1 are gone"


def test_what_is_gone_comes_before_what_the_backend_deleted_after_it() -> None:
    ruling = _judge([pod(0, deleted=1)])
    assert ruling is not None
    assert ruling.reason == "PodVanished"
    assert ruling.message == "pod job-1-worker-1 is gone; pod job-1-worker-0 was deleted"
    ruling = _judge([pod(0, deleted=1, exit_code=143, finished=2)])
    assert ruling is not None
    assert ruling.reason == "PodVanished"


def test_a_pod_in_the_place_of_another_is_named_once() -> None:
    ruling = _judge([pod(0), pod(1, uid="another", deleted=1)])
    assert ruling is not None
    assert ruling.reason == "PodReplaced"
    assert ruling.message == "pod job-1-worker-1 was deleted and another one took its place"


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
    ruling = _judge([pod(0, exit_code=64, message=BAD), pod(1)])
    assert ruling is not None
    assert ruling.message == "dataset.train: column `meaning` must exist"
    assert ruling.node == "node-0"


def test_a_kill_for_lack_of_memory_says_when_how_much_and_what_to_change() -> None:
    killed = pod(0, exit_code=137, reason="OOMKilled", memory_limit="64Gi")
    ruling = _judge([killed, pod(1)], last_phase="Training")
    assert ruling is not None
    assert "in phase Training at its memory limit of 64Gi; raise `resources.memory`" in ruling.message
    ruling = _judge([pod(0, exit_code=137, reason="OOMKilled"), pod(1)])
    assert ruling is not None
    assert "killed the trainer at its memory limit; raise" in ruling.message


def test_a_container_that_can_be_judged_by_its_pod_only() -> None:
    waiting = ContainerObservation(state=ContainerState.WAITING)
    failed = pod(1, container=waiting, phase="Failed", reason_="Evicted", message_="low on memory")
    assert ruled([pod(0), failed]) == ("Charged", "Evicted")


def test_a_deletion_is_no_cause_of_an_eviction_whose_time_is_not_known_yet() -> None:
    container = ContainerObservation(state=ContainerState.RUNNING)
    pods = [pod(0, deleted=0), pod(1, container=container, phase="Failed", reason_="Evicted", message_="disk")]
    assert ruled(pods, child=child(failed=True)) == ("Charged", "Evicted")
    # training-operator deletes pods only after it has failed the PyTorchJob, so a person deleted this pod.
    assert ruled(pods, child=child()) == ("Free", "PodDeleted")


WAITING = ContainerObservation(state=ContainerState.WAITING, reason="ContainerCreating")


@pytest.mark.parametrize("reason", sorted({*KUBELET_REFUSALS, "OutOfexample.com/fpga", "AReasonOfAnotherVersion"}))
def test_a_pod_that_a_kubelet_refuses_is_never_charged_whatever_the_reason(reason: str) -> None:
    refused = pod(1, phase="Failed", reason_=reason, message_="Pod was rejected: the node ...", container=None)
    ruling = _judge([pod(0), refused])
    assert ruling is not None
    assert (ruling.verdict, ruling.reason, ruling.node) == (Verdict.FREE, "NodeRefused", "node-1")
    assert ruling.message == f"node node-1 did not start pod job-1-worker-1: {reason}: Pod was rejected: the node ..."
    if reason != "Evicted":
        assert ruled([pod(0), replace(refused, container=WAITING)]) == ("Free", "NodeRefused")


@pytest.mark.parametrize("reason", sorted(START_ERRORS))
def test_a_container_that_its_runtime_could_not_start_is_never_charged_whatever_the_exit_code(reason: str) -> None:
    for code, phase in itertools.product((1, 127, 128, 137), ("Pending", "Running", "Failed")):
        assert ruled([pod(0), pod(1, exit_code=code, reason=reason, phase=phase)]) == ("Free", "NodeRefused")


@pytest.mark.parametrize("reason", sorted(START_ERRORS))
def test_a_container_that_its_runtime_goes_on_refusing_ends_the_attempt_after_two_minutes(reason: str) -> None:
    waiting = ContainerObservation(state=ContainerState.WAITING, reason=reason, message="unresolvable CDI device")
    stuck = pod(1, phase="Pending", container=waiting)
    assert ruled([pod(0), replace(stuck, start_error_seconds=119)]) is None
    ruling = _judge([pod(0), replace(stuck, start_error_seconds=120)])
    assert ruling is not None
    assert (ruling.verdict, ruling.reason, ruling.node) == (Verdict.FREE, "NodeRefused", "node-1")
    assert ruling.message.endswith(f"{reason}: unresolvable CDI device")
    deleted = pod(1, phase="Pending", container=waiting, deleted=1, start_error_seconds=120)
    assert ruled([pod(0), deleted]) == ("Free", "PodDeleted")


def test_a_container_that_ended_without_a_start_is_recognised_by_its_times() -> None:
    """The kubelet shows the start of a container that never ran as the beginning of Unix time."""
    ended = pod(1, exit_code=128, reason="Error", message="no such device")
    assert ended.container is not None
    unstarted = replace(ended.container, started_at=datetime.fromtimestamp(0, UTC))
    assert ruled([pod(0), replace(ended, container=unstarted)]) == ("Free", "NodeRefused")
    ran = replace(ended.container, started_at=NOW)
    assert ruled([pod(0), replace(ended, container=ran)]) == ("Charged", "Crashed")


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
