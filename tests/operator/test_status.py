"""The status as people read it: conditions, their messages, and which changes are written at once."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_core.api import FineTuneJobStatus
from finetune_core.api.conditions import Condition, ConditionType, Reason
from finetune_core.api.status import AttemptCause, AttemptsStatus, PastAttempt, ProgressStatus
from finetune_core.contract import ArtifactRecord, Outcome, Phase, Report, Result
from finetune_operator.attempts import Settlement
from finetune_operator.conditions import View
from finetune_operator.keyqueue import Key
from finetune_operator.observed import ContainerObservation, ContainerState
from finetune_operator.problems import OutsideError
from finetune_operator.status import compute_status, is_transition
from finetune_operator.transitions import event_manifest, notices
from tests.operator.worlds import UID, at, child, current, pod

WAITING = ContainerState.WAITING


def view(**changes: Any) -> View:
    values: dict[str, Any] = {
        "now": at(0),
        "generation": 1,
        "nodes": 2,
        "ranks": 2,
        "attempts": AttemptsStatus(started=1, current=current()),
        "child": child(),
        "pods": [pod(0), pod(1)],
        "image": "trainer:1",
    }
    return View(**(values | changes))


def status(stored: FineTuneJobStatus | None = None, **changes: Any) -> FineTuneJobStatus:
    return compute_status(stored or FineTuneJobStatus(), view(**changes), child_kind="PyTorchJob")


def condition(of: FineTuneJobStatus, kind: ConditionType) -> Condition:
    return next(item for item in of.conditions if item.type == kind)


def state(of: FineTuneJobStatus) -> str:
    return condition(of, ConditionType.SUCCEEDED).reason


def report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "run": 1,
        "pod_uid": "pod-0",
        "phase": Phase.TRAINING,
        "ranks": 2,
        "step": 5,
        "total_steps": 10,
        "epoch": 0.5,
        "metrics": {"loss": 1.0},
        "history": [],
        "checkpoints": [],
    }
    return Report.model_validate(values | changes)


REPORTED = {"report": report(), "reported_at": at(0)}
BETWEEN = AttemptsStatus(
    started=1,
    charged=1,
    recent=[PastAttempt(number=1, verdict="Charged", reason="OutsideFailure", message="the store refused the"
                        " credentials", start_time=at(-50), end_time=at(-1))],
    next_start_time=at(10),
)  # fmt: skip


def test_every_condition_is_there_from_the_first_write() -> None:
    first = status(attempts=AttemptsStatus(), child=None, pods=[])
    assert [item.type for item in first.conditions] == list(ConditionType)
    assert all(item.observed_generation == 1 and item.reason for item in first.conditions)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attempts": AttemptsStatus(), "child": None, "pods": []}, Reason.QUEUED),
        ({"pods": []}, Reason.QUEUED),
        ({}, Reason.STARTING),
        (REPORTED, Reason.RUNNING),
        ({"report": report(ranks=1), "reported_at": at(0)}, Reason.STARTING),
        ({"attempts": BETWEEN, "child": None, "pods": []}, Reason.RETRYING),
        ({"problem": OutsideError(Reason.NAME_CONFLICT, "taken")}, Reason.NAME_CONFLICT),
        ({"settled": Settlement(succeeded=True, reason="Completed", message="done")}, Reason.COMPLETED),
        ({"settled": Settlement(succeeded=False, reason="Diverged", message="nan")}, Reason.DIVERGED),
    ],
)
def test_the_state_column(changes: dict[str, Any], expected: Reason) -> None:
    assert state(status(**changes)) == expected


def test_a_retrying_job_tells_the_cause_and_when_it_goes_on() -> None:
    message = condition(status(attempts=BETWEEN, child=None, pods=[]), ConditionType.SUCCEEDED).message
    assert message == ("attempt 1 ended: the store refused the credentials; the next starts after 12:00:10 UTC")


def test_the_next_attempt_still_tells_the_last_cause() -> None:
    attempts = BETWEEN.model_copy(update={"started": 2, "current": current(2), "next_start_time": None})
    message = condition(status(attempts=attempts, pods=[]), ConditionType.SUCCEEDED).message
    assert message == "attempt 2, after: the store refused the credentials; no pod exists yet"


def test_an_attempt_with_a_cause_is_no_longer_running() -> None:
    cause = AttemptCause(verdict="Free", reason="PodDeleted", message="pod x was deleted", time=at(0))
    ending = AttemptsStatus(started=1, current=current().model_copy(update={"cause": cause}))
    found = status(status(**REPORTED), attempts=ending, **REPORTED)
    assert state(found) == Reason.RETRYING
    assert condition(found, ConditionType.RUNNING).status == "False"


def test_a_restarted_operator_without_reports_still_says_running() -> None:
    stored = status(**REPORTED)
    assert status(stored) == stored
    later = AttemptsStatus(started=2, current=current(2, started=1))
    assert state(status(stored, attempts=later)) == Reason.STARTING


def test_last_transition_time_changes_with_the_status_only() -> None:
    first = status()
    second = status(first, now=at(60), pods=[pod(0), pod(1, node="")])
    third = status(second, now=at(120), **REPORTED)
    assert condition(second, ConditionType.SUCCEEDED).last_transition_time == at(0)
    assert condition(third, ConditionType.SUCCEEDED).last_transition_time == at(0)
    assert condition(second, ConditionType.SCHEDULED).last_transition_time == at(60)


def _waiting(reason: str, message: str = "") -> list[Any]:
    return [pod(0, container=ContainerObservation(state=WAITING, reason=reason, message=message)), pod(1)]


@pytest.mark.parametrize(
    ("pods", "hint", "expected"),
    [
        ([], "", "no pod exists yet"),
        ([], "FailedCreate: quota", "FailedCreate: quota"),
        (
            _waiting("ImagePullBackOff", 'Back-off pulling image "x": ErrImagePull: not found'),
            "",
            "pod job-1-worker-0: the image can't be pulled: not found",
        ),
        (_waiting("ErrImagePull", "not found"), "", "pod job-1-worker-0: the image can't be pulled: not found"),
        (_waiting("ContainerCreating"), "FailedMount: no Secret", "pod job-1-worker-0: FailedMount: no Secret"),
        (_waiting("ContainerCreating"), "", "1 of 2 pods run"),
        ([pod(0), pod(1, unschedulable="0/1 nodes are available")], "", "pod job-1-worker-1: 0/1 nodes are available"),
        ([pod(0), pod(1)], "", "all pods run; no report has arrived yet"),
    ],
)
def test_what_an_attempt_waits_for(pods: list[Any], hint: str, expected: str) -> None:
    assert condition(status(pods=pods, hint=hint), ConditionType.RUNNING).message == expected


def test_a_success_without_its_last_report_has_artifact_and_progress() -> None:
    record = ArtifactRecord(uri="s3://b/a", step=10, bytes=1, manifest_sha256="a")
    done = Settlement(
        succeeded=True, reason="Completed", message="m",
        result=Result(outcome=Outcome.COMPLETED, step=10, artifact=record),
    )  # fmt: skip
    stored = status(**REPORTED)
    found = status(stored, settled=done, attempts=AttemptsStatus(started=1))
    assert found.progress == ProgressStatus(
        step=10, total_steps=10, epoch="0.5", percentage=100, eta_seconds=0, last_update_time=at(0)
    )
    assert found.artifact is not None
    assert found.completion_time == at(0)
    assert found.child == stored.child
    assert condition(found, ConditionType.READY).status == "True"


def test_the_image_of_attempt_1_stays() -> None:
    assert status(status(), image="trainer:2").image == "trainer:1"


def test_new_numbers_are_no_transition_and_a_new_reason_is() -> None:
    stored = status(**REPORTED)
    numbers = status(stored, report=report(step=6), reported_at=at(3))
    assert numbers != stored
    assert not is_transition(stored, numbers)
    assert is_transition(stored, status(stored, attempts=BETWEEN, child=None, pods=[]))
    assert is_transition(None, stored)


def test_a_refused_spec_is_one_event() -> None:
    refused = Settlement(succeeded=False, reason="BadInput", message="spec.x: must be y")
    found = status(attempts=AttemptsStatus(), child=None, pods=[], invalid="spec.x: must be y", settled=refused)
    assert [notice.reason for notice in notices(FineTuneJobStatus(), found, at(0))] == ["BadInput"]
    assert condition(found, ConditionType.ACCEPTED).status == "False"


def test_events_tell_transitions_once() -> None:
    stored = status(**REPORTED)
    ended = status(stored, attempts=BETWEEN, child=None, pods=[])
    (told,) = notices(stored, ended, at(0))
    assert (told.reason, told.warning) == ("AttemptEnded", True)
    assert "the store refused the credentials" in told.note
    assert notices(ended, ended, at(0)) == []
    names = {event_manifest(told, Key("team", "q"), UID, at(n), "pod")["metadata"]["name"] for n in range(3)}
    assert len(names) == 1
