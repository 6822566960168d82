"""An eviction by the kubelet is charged as Evicted, whichever states of the pods and of the PyTorchJob (the child of
the job) a reconcile sees.

The states are those of Kubernetes 1.34 and training-operator 1.9, as watches on a real cluster have shown them. The
kubelet first ends the container and then reports the end and its reason, mostly in one write. training-operator marks
the child as failed, and then deletes the other pod. The kubelet ends that pod too, and removes it in two writes, of
which the first one hides when the deletion was requested.

An eviction leaves no trace where the pod is removed before a reconcile has seen the eviction. Only a person or the
collector of ended pods removes a pod that early. The attempt is then free, because nothing shows that the job is at
fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import Any

import pytest

from finetune_core.api.status import AttemptsStatus
from finetune_operator.decide.verdict import Verdict
from finetune_operator.objects.labels import ATTEMPT, REPLICA_INDEX, TRAINING_CONTAINER
from finetune_operator.objects.observations import PodObservation, parse_pod
from finetune_operator.observe.observation import JobObservation
from tests.operator.builders import NOW, advance, at, child, current
from tests.operator.test_attempts import seen

GRACE = 90


@dataclass(frozen=True)
class State:
    """What the API server has at one moment."""

    pods: tuple[PodObservation, ...]
    child_failed: bool = False


@dataclass(frozen=True)
class Course:
    """The course of an attempt in which the kubelet evicts a pod. All times are in seconds after `NOW`, the time at
    which the container of the evicted pod ends."""

    evicted: int
    """Index of the evicted pod."""
    code: int
    """Exit code of the evicted pod's container."""
    known_end: bool
    """Whether the kubelet says when that container ended. It does not where it has lost the container."""
    reported_late: bool
    """Whether the kubelet reports the end of that container before it reports the reason."""
    deleted: int
    """When training-operator deletes the other pod."""
    peer_code: int
    """Exit code of the other pod's container, after its deletion."""
    peer_ended: int
    """When that container ended."""
    removed: int
    """When the kubelet removed the other pod."""


def pod(
    index: int, phase: str = "Running", *, reason: str = "", ended: Any = None, deletion: Any = None
) -> PodObservation:
    """Return the pod of worker ``index`` as the operator reads its manifest.

    ``ended`` is the state `terminated` of its container; None while the container runs. ``deletion`` holds the fields
    of `metadata` about its deletion; None where nobody has requested it.
    """
    state = {"running": {"startedAt": text(-60)}} if ended is None else {"terminated": ended}
    manifest = {
        "metadata": {
            "name": f"job-1-worker-{index}",
            "uid": f"pod-{index}",
            "resourceVersion": "17",
            "creationTimestamp": text(-100),
            "labels": {ATTEMPT: "1", REPLICA_INDEX: str(index)},
            **(deletion or {}),
        },
        "spec": {"nodeName": "node-a", "containers": [{"name": TRAINING_CONTAINER}]},
        "status": {"phase": phase, "containerStatuses": [{"name": TRAINING_CONTAINER, "state": state}]},
    }
    if reason:
        manifest["status"] |= {"reason": reason, "message": "Usage of EmptyDir volume exceeds the limit"}
    observed = parse_pod(manifest)
    assert observed is not None
    return observed


def text(seconds: float) -> str:
    """Return the time ``seconds`` after `NOW` as the API server writes it."""
    return (NOW + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def terminated(code: int, finished: float | None) -> dict[str, Any]:
    times = {} if finished is None else {"startedAt": text(-60), "finishedAt": text(finished)}
    return {"exitCode": code, "reason": "Error" if times else "ContainerStatusUnknown", **times}


def deleting(requested: float) -> dict[str, Any]:
    return {"deletionTimestamp": text(requested + GRACE), "deletionGracePeriodSeconds": GRACE}


def removing(now: float) -> dict[str, Any]:
    return {"deletionTimestamp": text(now), "deletionGracePeriodSeconds": 0}


def states(course: Course) -> Iterator[State]:
    """Yield the states of the attempt, oldest first."""
    mine, other = course.evicted, 1 - course.evicted
    end = terminated(course.code, 0 if course.known_end else None)
    evicted = pod(mine, "Failed", reason="Evicted", ended=end)
    asked, last = deleting(course.deleted), removing(course.removed)
    peer_end = terminated(course.peer_code, course.peer_ended)
    yield State((pod(0), pod(1)))
    if course.reported_late:
        yield State((pod(other), pod(mine, ended=end)))
    yield State((pod(other), evicted))
    yield State((pod(other), evicted), child_failed=True)
    yield State((pod(other, deletion=asked), evicted), child_failed=True)
    yield State((pod(other, ended=peer_end, deletion=asked), evicted), child_failed=True)
    yield State((pod(other, "Failed", ended=peer_end, deletion=asked), evicted), child_failed=True)
    yield State((pod(other, "Failed", ended=peer_end, deletion=last), evicted), child_failed=True)
    yield State((evicted,), child_failed=True)


def courses() -> Iterator[Course]:
    """Yield the courses in which each write comes in the same second as the write before, or in the next second. Two
    kinds of such courses are left out."""
    waits = (0, 1)
    for mine, code, known, late, to_delete, peer_code, to_end, to_remove in product(
        (0, 1), (143, 137), (True, False), (True, False), waits, (143, 137, 75), waits, waits
    ):
        # The first kind that is left out can't happen: a container that the kubelet has lost always has the exit code
        # 137, and its end and the reason are reported together. In the second kind, an end by SIGKILL (137) is reported
        # before the reason, and looks like a crash until the attempt ends.
        if (not known and (code != 137 or late)) or (late and code == 137):
            continue
        ended = to_delete + to_end
        yield Course(mine, code, known, late, to_delete, peer_code, ended, ended + to_remove)


def observed(pods: State, of_child: State, now: float) -> JobObservation:
    """Return what a reconcile sees that reads the pods in the state ``pods``, and the child in the state ``of_child``,
    which is the same or a later one.

    Where the child has ended and no pod has, the pods are those of the later state, because `observe/observer.py` then
    reads the pods again.
    """
    if of_child.child_failed and not any(each.ended for each in pods.pods):
        pods = of_child
    failed_at = at(1) if of_child.child_failed else None
    return seen(list(pods.pods), now=now, child=child(failed=of_child.child_failed, failed_at=failed_at))


def end_of(looks: list[tuple[State, State]]) -> tuple[str, str] | None:
    """Return verdict and reason of the attempt after ``looks``, each a pair of the states in which a reconcile reads
    the pods and the child. If the attempt still goes on, they are those of its cause; None where it has no cause
    yet."""
    attempts = AttemptsStatus(started=1, current=current())
    for second, (pods, of_child) in enumerate(looks):
        attempts = advance(attempts, observed(pods, of_child, 2 + second / 10)).attempts
        if attempts.current is None:
            return attempts.recent[-1].verdict, attempts.recent[-1].reason
    assert attempts.current is not None
    cause = attempts.current.cause
    return (cause.verdict, cause.reason) if cause is not None else None


@pytest.mark.parametrize("course", list(courses()), ids=str)
def test_an_eviction_is_charged_as_such_in_whichever_state_it_is_seen_first(course: Course) -> None:
    course_of_states = list(states(course))
    told = next(number for number, state in enumerate(course_of_states) if any(each.reason for each in state.pods))
    before, after = course_of_states[:told], course_of_states[told:]
    for number, pods in enumerate(after):
        for of_child in after[number:]:
            assert end_of([(pods, of_child)]) == (Verdict.CHARGED, "Evicted"), (pods, of_child)
            for earlier in before:
                looks = [(earlier, earlier), (pods, of_child)]
                assert end_of(looks) == (Verdict.CHARGED, "Evicted"), looks


def test_a_pod_that_a_person_deletes_is_no_eviction_in_the_moment_of_its_removal() -> None:
    """The kubelet's last write hides when the deletion was requested, and no look came before."""
    for code in (143, 137):
        removed = pod(1, "Failed", ended=terminated(code, 4), deletion=removing(6))
        look = State((pod(0), removed))
        assert end_of([(look, look)]) == (Verdict.FREE, "PodDeleted")


def test_an_evicted_pod_that_a_person_then_deletes_stays_evicted() -> None:
    evicted = pod(1, "Failed", reason="Evicted", ended=terminated(143, 4), deletion=removing(6))
    for failed in (False, True):
        look = State((pod(0), evicted), child_failed=failed)
        assert end_of([(look, look)]) == (Verdict.CHARGED, "Evicted")


def test_an_eviction_after_a_deletion_is_no_cause() -> None:
    """A pod that is already being deleted fills its disk with its last checkpoint."""
    evicted = pod(1, "Failed", reason="Evicted", ended=terminated(143, 4), deletion=deleting(0))
    look = State((pod(0), evicted))
    assert end_of([(look, look)]) == (Verdict.FREE, "PodDeleted")
