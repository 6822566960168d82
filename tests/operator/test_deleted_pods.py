"""The verdict of an attempt whose pods or child were deleted, by a person or by the backend. The tests also check which
pods and which node the verdict names."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.decide.verdict import Verdict
from finetune_operator.objects.observations import ContainerObservation, ContainerState
from finetune_operator.observe.observation import is_of_an_earlier_admission
from tests.operator.builders import at, child, current, pod
from tests.operator.verdicts import judged, ruled

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
    """A person deletes the first pod. training-operator deletes the other pod a second later, or in the same second.

    In the same second the message names both, first the pod with the lower resourceVersion, which is probably the one.
    """
    apart = [pod(first, deleted=5, version=1000), pod(second, deleted=6, version=1001)]
    together = [pod(first, deleted=5, version=1000), pod(second, deleted=5, version=1001)]
    alone = f"pod job-1-worker-{first} was deleted"
    both = f"{alone}, and pod job-1-worker-{second} in the same second"
    for order, message in ((apart, alone), (apart[::-1], alone), (together, both), (together[::-1], both)):
        ruling = judged(order, child=child(failed=True))
        assert ruling is not None
        assert (ruling.message, ruling.node) == (message, f"node-{first}")


@pytest.mark.parametrize("ended", [{}, {"exit_code": 143, "finished": 5}])
@pytest.mark.parametrize("first", [0, 1])
def test_where_nothing_shows_which_pod_a_person_deleted_the_message_names_both(
    first: int, ended: dict[str, Any]
) -> None:
    """The kubelet has written the status of the pod that a person deleted once more, for example because the pod has
    ended with 143. The pod's resourceVersion is then higher than that of the pod that training-operator deleted in the
    same second."""
    second = 1 - first
    pods = [pod(first, deleted=5, version=1002, **ended), pod(second, deleted=5, version=1001)]
    ruling = judged(pods, child=child(failed=True))
    assert ruling is not None
    assert (ruling.verdict, ruling.reason) == (Verdict.FREE, "PodDeleted")
    both = f"pod job-1-worker-{second} was deleted, and pod job-1-worker-{first} in the same second"
    assert ruling.message == both


@pytest.mark.parametrize("evicted", [0, 1])
def test_in_the_same_second_an_eviction_comes_before_the_deletion_by_the_backend(evicted: int) -> None:
    """The evicted pod has already ended, so that its resourceVersion is higher than that of the other pod."""
    disrupted: dict[str, Any] = {"disruption": "EvictionByEvictionAPI", "disrupted_at": at(5)}
    ended = pod(evicted, deleted=5, exit_code=143, finished=5, version=9, **disrupted)
    ruling = judged([ended, pod(1 - evicted, deleted=5, version=8)], child=child(failed=True))
    assert ruling is not None
    assert (ruling.verdict, ruling.reason) == (Verdict.FREE, "EvictionByEvictionAPI")
    assert f"pod job-1-worker-{evicted} " in ruling.message


def test_of_many_pods_that_were_deleted_together_the_message_names_two() -> None:
    ended = pod(3, deleted=5, version=1009, exit_code=143, finished=5)
    ruling = judged(
        [*(pod(i, deleted=5, version=1000 + i) for i in range(3)), ended], child=child(failed=True, replicas=4), nodes=4
    )
    assert ruling is not None
    assert ruling.message == (
        "pod job-1-worker-0 was deleted, and 3 further pods in the same second, from job-1-worker-1 on"
    )


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


def test_all_pods_that_are_gone_are_named() -> None:
    """Both pods are gone when the operator reconciles, so nothing shows which of them a person deleted first."""
    ruling = judged([])
    assert ruling is not None
    assert (ruling.verdict, ruling.reason) == (Verdict.FREE, "PodVanished")
    assert ruling.message == "pods job-1-worker-0, job-1-worker-1 are gone"


def test_what_is_gone_comes_before_what_the_backend_deleted_after_it() -> None:
    ruling = judged([pod(0, deleted=1)])
    assert ruling is not None
    assert ruling.reason == "PodVanished"
    assert ruling.message == "pod job-1-worker-1 is gone; pod job-1-worker-0 was deleted"
    ruling = judged([pod(0, deleted=1, exit_code=143, finished=2)])
    assert ruling is not None
    assert ruling.reason == "PodVanished"


def test_a_pod_in_the_place_of_another_is_named_once() -> None:
    ruling = judged([pod(0), pod(1, uid="another", deleted=1)])
    assert ruling is not None
    assert ruling.reason == "PodReplaced"
    assert ruling.message == "pod job-1-worker-1 was deleted and another one took its place"


@pytest.mark.parametrize("code", [137, 143])
@pytest.mark.parametrize("ended", [5, 6, 36])
def test_the_end_of_the_container_is_not_the_time_of_its_eviction(code: int, ended: int) -> None:
    """The kubelet evicts pod 1, and gives its container time to end. training-operator deletes pod 0 as soon as the
    kubelet reports the eviction, so perhaps before the container has ended."""
    evicted = pod(1, exit_code=code, finished=ended, phase="Failed", reason_="Evicted", message_="disk")
    assert ruled([pod(0, deleted=5), evicted], child=child(failed=True)) == ("Charged", "Evicted")


def test_an_eviction_before_the_deletion_by_a_person_is_the_cause() -> None:
    evicted = pod(1, exit_code=137, finished=4, phase="Failed", reason_="Evicted", message_="disk")
    assert ruled([pod(0, deleted=5), evicted], child=child(failed=False)) == ("Charged", "Evicted")


def test_a_deletion_is_no_cause_of_an_eviction_whose_time_is_not_known_yet() -> None:
    container = ContainerObservation(state=ContainerState.RUNNING)
    pods = [pod(0, deleted=0), pod(1, container=container, phase="Failed", reason_="Evicted", message_="disk")]
    assert ruled(pods, child=child(failed=True)) == ("Charged", "Evicted")
    # Here the PyTorchJob has not failed. training-operator deletes pods only after it has failed the PyTorchJob, so a
    # person deleted pod 0.
    assert ruled(pods, child=child()) == ("Free", "PodDeleted")
