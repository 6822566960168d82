"""How a job's status is computed (conditions with messages, image, plan and usage), and which changes are written at
once."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_core.api import FineTuneJobStatus
from finetune_core.api.conditions import Condition, ConditionType, Reason
from finetune_core.api.evaluation import RequirementSpec
from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import (
    AttemptCause,
    AttemptsStatus,
    PastAttempt,
    PlanStatus,
    ProgressStatus,
    UsageStatus,
)
from finetune_core.contract import ArtifactRecord, EvaluationRecord, Outcome, Phase, Report, Result, ScoreRecord
from finetune_core.contract.preflight_result import PlannedNeeds
from finetune_core.resolve import resolve
from finetune_operator.decide.decision import JobEnd
from finetune_operator.objects.observations import ContainerObservation, ContainerState
from finetune_operator.queue.key import Key
from finetune_operator.queue.retryable import RetryableError
from finetune_operator.status.compute import compute_status
from finetune_operator.status.events import event_manifest, events_between
from finetune_operator.status.inputs import StatusInput, plan_of
from finetune_operator.status.urgency import is_news, is_transition
from tests.operator.builders import UID, artifact, at, child, current, job, pod

WAITING = ContainerState.WAITING
GIB = 1 << 30


def status_input(**changes: Any) -> StatusInput:
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
    return StatusInput(**(values | changes))


def status(stored: FineTuneJobStatus | None = None, **changes: Any) -> FineTuneJobStatus:
    return compute_status(stored or FineTuneJobStatus(), status_input(**changes), child_kind="PyTorchJob")


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


REPORTED: dict[str, Any] = {"report": report(), "reported_at": at(0)}
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
        ({"problem": RetryableError(Reason.NAME_CONFLICT, "taken")}, Reason.NAME_CONFLICT),
        ({"end": JobEnd(succeeded=True, reason="Completed", message="done")}, Reason.COMPLETED),
        ({"end": JobEnd(succeeded=False, reason="Diverged", message="nan")}, Reason.DIVERGED),
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
    ("pods", "warning", "expected"),
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
def test_what_an_attempt_waits_for(pods: list[Any], warning: str, expected: str) -> None:
    assert condition(status(pods=pods, warning=warning), ConditionType.RUNNING).message == expected


def test_a_success_without_its_last_report_has_artifact_and_progress() -> None:
    record = ArtifactRecord(uri="s3://b/a", step=10, bytes=1, manifest_sha256="a")
    done = JobEnd(
        succeeded=True, reason="Completed", message="m",
        result=Result(outcome=Outcome.COMPLETED, step=10, artifact=record),
    )  # fmt: skip
    stored = status(**REPORTED)
    found = status(stored, end=done, attempts=AttemptsStatus(started=1))
    assert found.progress == ProgressStatus(
        step=10, total_steps=10, epoch="0.5", percentage=100, eta_seconds=0, last_update_time=at(0)
    )
    assert found.artifact is not None
    assert found.completion_time == at(0)
    assert found.child == stored.child
    assert condition(found, ConditionType.READY).status == "True"


@pytest.mark.parametrize("scored", [True, False], ids=["with scores", "without scores"])
@pytest.mark.parametrize(("outcome", "passed"), [(Outcome.COMPLETED, True), (Outcome.GATE_FAILED, False)])
def test_the_verdict_on_required_scores_agrees_with_the_end_also_where_the_result_has_no_room_for_scores(
    outcome: Outcome, passed: bool, scored: bool
) -> None:
    base = EvaluationRecord(rows="Validation", examples=9, base=ScoreRecord(perplexity=9))
    tuned = base.model_copy(update={"tuned": ScoreRecord(perplexity=2 if passed else 4)})
    ended = Result(outcome=outcome, step=10, artifact=artifact(), evaluation=tuned if scored else None)
    end = JobEnd(succeeded=passed, reason=outcome.value, message="m", result=ended)
    required = [RequirementSpec(score="perplexity", at_most="3")]
    stored = status(report=report(evaluation=tuned if scored else base), reported_at=at(0), requirements=required)
    assert stored.evaluation is not None
    assert [item.passed for item in stored.evaluation.requirements] == ([passed] if scored else [])
    assert stored.evaluation.passed is None, "nothing is committed yet"
    found = status(stored, end=end, attempts=AttemptsStatus(started=1), requirements=required).evaluation
    assert found is not None
    assert found.passed is passed
    late = {"report": report(evaluation=tuned), "reported_at": at(1), "requirements": required}
    again = status(
        status(stored, end=end, attempts=AttemptsStatus(started=1), requirements=required), **late
    ).evaluation
    assert again is not None
    assert again.passed is passed, "a late report changes no verdict"
    crashed = JobEnd(succeeded=False, reason="RetriesExhausted", message="m")
    failed = status(stored, end=crashed, attempts=AttemptsStatus(started=1), requirements=required).evaluation
    assert failed is not None
    assert failed.passed is None
    without = status(end=end, attempts=AttemptsStatus(started=1)).evaluation
    assert without is None or without.passed is None


def test_the_usage_of_a_job_that_ended_is_closed_while_its_last_pods_still_save() -> None:
    running = UsageStatus(gpu_seconds=80, active_seconds=10, last_update_time=at(0), holders=["pod-1"], running=True)
    failed = JobEnd(succeeded=False, reason="BadInput", message="no rows")
    found = status(usage=running, end=failed, attempts=AttemptsStatus(started=1)).usage
    assert found == UsageStatus(gpu_seconds=80, active_seconds=10, last_update_time=at(0))


def test_the_image_of_attempt_1_stays() -> None:
    assert status(status(), image="trainer:2").image == "trainer:1"


PULLED = "reg/trainer@sha256:0123abcd"


def _pulled(index: int, image_id: str) -> Any:
    return pod(index, container=ContainerObservation(state=ContainerState.RUNNING, image_id=image_id))


@pytest.mark.parametrize(
    ("image", "image_ids", "expected"),
    [
        ("reg/trainer:1", ["", ""], "reg/trainer:1"),
        ("reg/trainer:1", ["", PULLED], "reg/trainer:1@sha256:0123abcd"),
        ("reg:5000/trainer", ["reg:5000/trainer@sha256:0123abcd"], "reg:5000/trainer@sha256:0123abcd"),
        ("trainer:1", ["docker.io/library/trainer@sha256:0123abcd"], "trainer:1@sha256:0123abcd"),
        ("me/trainer:1", ["docker.io/me/trainer@sha256:0123abcd"], "me/trainer:1@sha256:0123abcd"),
        ("reg/trainer:1", ["sha256:feed", "sha256:feed"], "reg/trainer:1"),
        ("reg/trainer:1", ["mirror/trainer@sha256:0123abcd"] * 2, "reg/trainer:1"),
        ("trainer:1", ["reg/other-trainer@sha256:0123abcd"], "trainer:1"),
        ("reg/trainer@sha256:9999", [PULLED] * 2, "reg/trainer@sha256:9999"),
    ],
    ids=[
        "not pulled yet",
        "pulled",
        "registry with a port",
        "short name",
        "short name of a person",
        "put on the node by hand",
        "known to the node from elsewhere",
        "another image that ends alike",
        "named by digest",
    ],
)
def test_the_image_is_fixed_with_the_digest_that_a_node_pulled(image: str, image_ids: list[str], expected: str) -> None:
    pods = [_pulled(index, image_id) for index, image_id in enumerate(image_ids)]
    found = status(pods=pods, image=image)
    assert found.image == expected
    later = status(found, pods=[_pulled(0, f"{image.partition(':1')[0]}@sha256:another")], image="upgraded:2")
    assert later.image == (expected if "@" in expected else f"{image}@sha256:another")


def test_the_plan_is_what_the_newest_attempt_was_resolved_to() -> None:
    config = resolve(job(resources={"nodes": 2, "gpusPerNode": 2}, training={"maxSteps": 5, "globalBatchSize": 10,
                         "microBatchSize": 1}), report=None)  # fmt: skip
    found = status(plan=plan_of(config))
    assert found.plan == PlanStatus(zero_stage=2, processes=4, micro_batch_size=1, gradient_accumulation_steps=3)
    assert status(found).plan == found.plan


def test_what_the_check_planned_stays_as_long_as_it_holds() -> None:
    """The memory of a GPU depends on the micro-batch, and what a pod needs does not."""
    config = resolve(job(training={"maxSteps": 5, "globalBatchSize": 8, "microBatchSize": 4}), report=None)
    planned = PlannedNeeds(gpu_memory_bytes=7, memory_bytes=GIB, cpus=16)
    checked = status(plan=plan_of(config, planned))
    assert checked.plan is not None
    assert (checked.plan.gpu_memory_bytes, checked.plan.memory_bytes, checked.plan.cpus) == (7, GIB, 16)
    assert status(checked, plan=plan_of(config)).plan == checked.plan, "the first attempt is the one that was planned"
    halved = resolve(job(training={"maxSteps": 5, "globalBatchSize": 8, "microBatchSize": 4}), report=None, halvings=1)
    after = status(checked, plan=plan_of(halved)).plan
    assert after is not None
    assert (after.micro_batch_size, after.gpu_memory_bytes, after.memory_bytes, after.cpus) == (2, None, GIB, 16)


def test_the_share_of_the_weights_in_reach_of_the_adapters_is_that_of_the_last_report() -> None:
    plan = PlanStatus(zero_stage=2, processes=4, micro_batch_size=1, gradient_accumulation_steps=3)
    stored = status(plan=plan)
    assert stored.plan == plan
    found = report(adapted_share=0.9876543)
    told = status(stored, report=found, reported_at=at(1))
    assert told.plan == plan.model_copy(update={"adapted_share": "0.987654"})
    assert status(told, plan=plan).plan == told.plan, "the next attempt has the same adapters"


def test_time_that_passes_is_written_with_other_news_only() -> None:
    usage = UsageStatus(gpu_seconds=8, active_seconds=2, last_update_time=at(0), holders=["pod-0"])
    stored = status(usage=usage)
    later = usage.model_copy(update={"gpu_seconds": 16, "last_update_time": at(2)})
    assert not is_news(stored, status(stored, usage=later))
    assert is_news(stored, status(stored, usage=later.model_copy(update={"holders": []})))
    reported = status(stored, usage=later, **REPORTED)
    assert is_news(stored, reported)
    assert reported.usage == later


ENDED = PastAttempt(number=1, verdict="Permanent", reason="Cancelled", message="cancelled by `runPolicy.cancel`",
                    start_time=at(-50), end_time=at(-1))  # fmt: skip
SUSPENDED = AttemptsStatus(started=1, free=1, recent=[ENDED.model_copy(update={"verdict": "Free"})])


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        (
            {"attempts": AttemptsStatus(), "policy": {"suspend": True}},
            Reason.SUSPENDED,
            "suspended by `runPolicy.suspend`; set it to false to go on",
        ),
        (
            {"attempts": SUSPENDED, "policy": {"suspend": True}, "ending_pods": 2},
            Reason.SUSPENDED,
            "suspended by `runPolicy.suspend`; 2 pods still end",
        ),
        (
            {"attempts": AttemptsStatus(started=1, recent=[ENDED]), "ending_pods": 1, "policy": {"cancel": True}},
            Reason.CANCELLED,
            "cancelled by `runPolicy.cancel`; 1 pod still ends",
        ),
        (
            {"child": child(suspended=True), "policy": {"queueName": "gpu"}},
            Reason.QUEUED,
            "waits for admission by the queue gpu",
        ),
        (
            {"child": child(suspended=True)},
            Reason.SUSPENDED,
            "somebody suspended the PyTorchJob; set its `spec.runPolicy.suspend` to false to go on",
        ),
    ],
)
def test_who_holds_a_job_and_what_to_do(changes: dict[str, Any], reason: Reason, message: str) -> None:
    policy = RunPolicySpec(**changes.pop("policy", {}))
    found = status(**({"child": None, "pods": [], "policy": policy} | changes))
    summary = condition(found, ConditionType.SUCCEEDED)
    assert (summary.status, summary.reason, summary.message) == ("Unknown", reason, message)
    assert condition(found, ConditionType.RUNNING).status == "False"


def test_a_job_that_its_queue_took_away_runs_again_only_with_a_new_report() -> None:
    stored = status(**REPORTED)
    held = status(stored, now=at(60), child=child(suspended=True), policy=RunPolicySpec(queue_name="gpu"), pods=[])
    assert condition(held, ConditionType.RUNNING).status == "False"
    again = AttemptsStatus(started=1, current=current().model_copy(update={"admitted_time": at(90)}))
    assert condition(status(held, now=at(95), attempts=again), ConditionType.RUNNING).status == "False"
    new_pods = [record.model_copy(update={"uid": f"new-{record.index}"}) for record in current().pods]
    admitted = current().model_copy(update={"admitted_time": at(90), "pods": new_pods})
    again = AttemptsStatus(started=1, current=admitted)
    old_report = status(held, now=at(95), attempts=again, **REPORTED)
    assert condition(old_report, ConditionType.RUNNING).status == "False"
    new_report = {"report": report(pod_uid="new-0"), "reported_at": at(99)}
    assert condition(status(held, now=at(99), attempts=again, **new_report), ConditionType.RUNNING).status == "True"


def test_an_end_that_was_ordered_is_no_warning() -> None:
    ended = status(attempts=AttemptsStatus(started=1, recent=[ENDED]), child=None, pods=[])
    (event,) = events_between(status(), ended, at(0))
    assert (event.reason, event.warning) == ("AttemptEnded", False)


def test_new_numbers_are_no_transition_and_a_new_reason_is() -> None:
    stored = status(**REPORTED)
    numbers = status(stored, report=report(step=6), reported_at=at(3))
    assert numbers != stored
    assert not is_transition(stored, numbers)
    assert is_transition(stored, status(stored, attempts=BETWEEN, child=None, pods=[]))
    assert is_transition(None, stored)


def test_a_refused_spec_is_one_event() -> None:
    refused = JobEnd(succeeded=False, reason="BadInput", message="spec.x: must be y")
    found = status(attempts=AttemptsStatus(), child=None, pods=[], invalid="spec.x: must be y", end=refused)
    assert [event.reason for event in events_between(FineTuneJobStatus(), found, at(0))] == ["BadInput"]
    assert condition(found, ConditionType.ACCEPTED).status == "False"


def test_a_note_has_no_more_bytes_than_the_api_server_accepts() -> None:
    refused = JobEnd(succeeded=False, reason="BadInput", message="é" * 1000)
    found = status(attempts=AttemptsStatus(), child=None, pods=[], invalid=refused.message, end=refused)
    (event,) = events_between(FineTuneJobStatus(), found, at(0))
    assert event.note == "é" * 512


def test_events_tell_transitions_once() -> None:
    stored = status(**REPORTED)
    ended = status(stored, attempts=BETWEEN, child=None, pods=[])
    (event,) = events_between(stored, ended, at(0))
    assert (event.reason, event.warning) == ("AttemptEnded", True)
    assert "the store refused the credentials" in event.note
    assert events_between(ended, ended, at(0)) == []
    names = {event_manifest(event, Key("team", "q"), UID, at(n), "pod")["metadata"]["name"] for n in range(3)}
    assert len(names) == 1
