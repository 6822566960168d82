"""The preflight check: a small pod checks a job before attempt 1, which is opened only after the verdict Passed.

Pure functions on `status.preflight`. `state_machine.py` calls `before_first_attempt`, and `reconcile.py` calls
`waits_for_turn`. A try is one run of the pod. First the verdict of a try is recorded, then the objects of the try are
removed. Only then does the verdict take effect: attempt 1 is opened, the job ends, or another try follows. There is one
exception: if the check finds the job's artifact committed already, the job ends when the verdict is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from finetune_core.api.conditions import Reason
from finetune_core.api.status import AttemptsStatus, FineTuneJobStatus, PreflightStatus
from finetune_core.contract import ExitCode
from finetune_core.contract.preflight_result import (
    PREFLIGHT_COMMAND,
    PREFLIGHT_SECONDS,
    FoundRun,
    InputSizes,
    PlannedNeeds,
    PreflightResult,
)
from finetune_operator import messages
from finetune_operator.decide.deadlines import seconds_left, seconds_of_pause
from finetune_operator.decide.decision import Action, Decision, JobEnd
from finetune_operator.decide.former_run import end_with_artifact, taken_over
from finetune_operator.decide.states import JobState
from finetune_operator.decide.verdict import TEXT_LIMIT, PreflightVerdict
from finetune_operator.objects.disk_space import ModelRoom, quantity
from finetune_operator.objects.observations import POD_DEADLINE, ContainerState, PodObservation
from finetune_operator.observe.observation import JobObservation
from finetune_operator.observe.waiting import why_pod_waits
from finetune_operator.queue.retryable import EVENTS_AFTER_SECONDS, EVENTS_EVERY_SECONDS, FIRST_RETRY_SECONDS
from finetune_operator.queue.work_queue import MAX_DELAY_SECONDS, backoff_seconds

RUN_SECONDS = PREFLIGHT_SECONDS + 120
"""Seconds for which the container of a try may run. The program of the trainer image ends by itself after
PREFLIGHT_SECONDS. The other 120 s are for the start of the program and for clocks that differ."""
TURN_SECONDS = 60.0
"""Seconds after which a job that waits for the turn of its check is reconciled again, even if nothing wakes the job."""
GIVE_UP_TRIES = 3
"""The job ends after this many tries that could not be carried out because of the job itself (`_Outcome.aborted`). A
try with a result sets the count back to 0."""


def before_first_attempt(stored: FineTuneJobStatus, seen: JobObservation, unchecked: Decision) -> Decision:
    """Return the decision for a job that has had no attempt; ``unchecked`` is the decision without a preflight check.

    The check runs where it is enabled and where ``unchecked`` would open attempt 1.
    """
    record = stored.preflight
    alive = [pod for pod in seen.preflight.pods if pod.delete_deadline is None]
    if not (seen.preflight.enabled and unchecked.action is Action.OPEN_ATTEMPT):
        # No check is wanted, for example because the job was suspended or cancelled, or because `runPolicy.preflight`
        # is Skip. A check that is not finished is dropped, and a later check begins anew.
        if alive:
            return _removing(stored.attempts, record, alive, state=JobState.CLEANING_UP)
        return replace(unchecked, preflight=record if _passed(record) else None)
    if record is None:
        return _checking(stored.attempts, PreflightStatus(start_time=seen.now), wait_seconds=None)
    if leftovers := [pod for pod in alive if pod.index <= record.tries]:
        return _removing(stored.attempts, record, leftovers, missing=_missing(record))
    if _passed(record):
        return replace(unchecked, preflight=record)
    if record.verdict == PreflightVerdict.IMPOSSIBLE:
        return _failed(stored.attempts, record, Reason.BAD_INPUT, record.message)
    return _during_try(stored.attempts, record, seen, alive)


def waits_for_turn(decision: Decision, stored: FineTuneJobStatus, limit: int) -> Decision:
    """Return ``decision``, which would start a check, changed so that nothing is done while the job waits for its turn.

    ``limit`` is how many checks may run at the same time. ``stored`` is the job's stored status, whose record of the
    check is kept as it is. A job that waits for its first turn has no record yet.
    """
    return replace(
        decision,
        preflight=stored.preflight,
        action=Action.NONE,
        wait_seconds=_least(decision.wait_seconds or None, TURN_SECONDS),
        turn=messages.preflight_turn(limit),
    )


def _during_try(
    attempts: AttemptsStatus, record: PreflightStatus, seen: JobObservation, alive: Sequence[PodObservation]
) -> Decision:
    """Return the decision while no verdict is recorded for the current try.

    The try's pod is created or waited for, and the verdict is recorded once the pod has ended or must end. After the
    pending deadline the pods are removed, and then the job fails. ``alive`` are the preflight pods that are not being
    deleted.
    """
    pod = next((pod for pod in seen.preflight.pods if pod.index == record.tries + 1), None)
    outcome = _outcome(pod, seen.now) if pod is not None else None
    if outcome is not None:
        outcome = _with_room(outcome, seen.preflight.model_room)
        recorded = _with_verdict(record, outcome, seen.now)
        if outcome.sizes is not None:
            recorded = recorded.model_copy(update=outcome.sizes.model_dump())
        if outcome.found is not None:
            former = taken_over(outcome.found, seen.preflight)
            day = outcome.found.template_date
            recorded = recorded.model_copy(
                update={"taken_over": former, "template_date": day.isoformat() if day is not None else ""}
            )
            if end := end_with_artifact(outcome.found, former, seen.preflight):
                # The pod is left to `settled.py`, because nothing has to wait for its removal.
                state = JobState.SUCCEEDED if end.succeeded else JobState.FAILED
                return Decision(state=state, attempts=attempts, preflight=recorded, end=end)
        decision = _checking(attempts, recorded, missing=_missing(recorded), wait_seconds=None)
        return replace(decision, planned=outcome.planned)
    missing = seen.preflight.problem or (_why_stuck(pod, seen) if pod else "") or _missing(record)
    left = seconds_left(seen.policy, since=record.start_time, now=seen.now)
    if left is not None and left <= 0:
        if alive:
            return _removing(attempts, record, alive, missing=missing)
        message = messages.preflight_deadline(seen.policy.pending_deadline_seconds or 0, missing)
        return _failed(attempts, record, Reason.DEADLINE_EXCEEDED, message)
    if pod is not None:
        wait = EVENTS_EVERY_SECONDS if _had_time_to_start(pod, seen.now) else EVENTS_AFTER_SECONDS
        return _checking(attempts, record, missing=missing, wait_seconds=_least(left, wait))
    if (pause := seconds_of_pause(record.next_try_time, seen.now, MAX_DELAY_SECONDS)) > 0:
        return _checking(attempts, record, missing=missing, wait_seconds=_least(left, pause))
    return _checking(attempts, record, action=Action.CREATE_PREFLIGHT_POD, missing=missing, wait_seconds=left)


def _checking(
    attempts: AttemptsStatus,
    record: PreflightStatus,
    *,
    wait_seconds: float | None,
    missing: str = "",
    action: Action = Action.NONE,
) -> Decision:
    return Decision(
        state=JobState.CHECKING,
        attempts=attempts,
        preflight=record,
        action=action,
        wait_seconds=wait_seconds,
        is_checked=True,
        missing=missing,
    )


def _removing(
    attempts: AttemptsStatus,
    record: PreflightStatus | None,
    pods: Sequence[PodObservation],
    *,
    state: JobState = JobState.CHECKING,
    missing: str = "",
) -> Decision:
    return Decision(
        state=state,
        attempts=attempts,
        preflight=record,
        action=Action.REMOVE_PREFLIGHT_PODS,
        is_checked=state is JobState.CHECKING,
        missing=missing,
        preflight_pods=pods,
    )


def _failed(attempts: AttemptsStatus, record: PreflightStatus, reason: str, message: str) -> Decision:
    end = JobEnd(succeeded=False, reason=reason, message=message)
    return Decision(state=JobState.FAILED, attempts=attempts, preflight=record, end=end, is_checked=True)


def _passed(record: PreflightStatus | None) -> bool:
    return record is not None and record.verdict == PreflightVerdict.PASSED


def _missing(record: PreflightStatus) -> str:
    """Return the message of the last try, which says why another try is needed; empty unless its verdict is Waiting."""
    return record.message if record.verdict == PreflightVerdict.WAITING else ""


def _with_verdict(record: PreflightStatus, outcome: _Outcome, now: datetime) -> PreflightStatus:
    """Return ``record`` with one more try, which had ``outcome``. The pod of that try is then to be removed.

    The verdict is Impossible once GIVE_UP_TRIES tries were aborted, because the cause of such tries is the job itself.
    """
    verdict, message = outcome.verdict, outcome.message
    aborted = record.aborted + 1 if outcome.aborted else 0 if outcome.has_result else record.aborted
    if outcome.aborted and aborted >= GIVE_UP_TRIES:
        verdict, message = PreflightVerdict.IMPOSSIBLE, messages.preflight_gives_up(aborted, message)
    pause = backoff_seconds(record.tries + 1, jitter=0, base=FIRST_RETRY_SECONDS)
    return record.model_copy(
        update={
            "tries": record.tries + 1,
            "aborted": aborted,
            "verdict": str(verdict),
            "message": message[:TEXT_LIMIT],
            "next_try_time": now + timedelta(seconds=pause) if verdict is PreflightVerdict.WAITING else None,
        }
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """How a try of the check ended."""

    verdict: PreflightVerdict
    message: str
    has_result: bool = False
    """Whether the check was carried out, so that `message` holds its findings or notices."""
    found: FoundRun | None = None
    """The run that the check found in the bucket, of the job itself or of a former job. None if it found no run."""
    sizes: InputSizes | None = None
    """Sizes of model and data. None where the check did not determine these sizes."""
    planned: PlannedNeeds | None = None
    """What the training needs by its plan. None where the check did not plan it."""
    aborted: bool = False
    """Whether the check could not be carried out because of the job: the check needs more memory than it may take,
    or its container ran far too long, for example because the job's own image does not know the check."""


def _outcome(pod: PodObservation, now: datetime) -> _Outcome | None:
    """Return the outcome of a try whose pod has ended or must end; None while the pod may go on.

    Final findings end the job. A pod that failed without findings does not end the job at once, because the next try
    may succeed; `_with_verdict` counts aborted tries.
    """
    container = pod.container
    if container is not None and container.state is ContainerState.TERMINATED and not container.never_ran:
        result = PreflightResult.from_termination_message(container.message)
        if container.exit_code == ExitCode.DONE:
            passed = result or PreflightResult(findings=[])
            return _Outcome(
                verdict=PreflightVerdict.PASSED,
                message="; ".join(passed.notices),
                has_result=True,
                found=passed.found,
                sizes=passed.sizes,
                planned=passed.planned,
            )
        if result is not None and result.findings:
            verdict = PreflightVerdict.IMPOSSIBLE if result.is_final else PreflightVerdict.WAITING
            return _Outcome(verdict=verdict, message=result.sentence, has_result=True)
    if pod.delete_deadline is not None:
        return _waiting(messages.pod_deleted(pod.name))
    if container is not None and container.reason == "OOMKilled":
        return _aborted(messages.preflight_out_of_memory(pod.memory_limit))
    if _ran_on(pod, now):
        return _aborted(messages.preflight_ran_on(RUN_SECONDS, PREFLIGHT_COMMAND))
    if container is not None and container.state is ContainerState.TERMINATED:
        # Where the program left no termination message, the kubelet has filled it with the end of the log.
        last_line = (container.message.strip().splitlines() or [""])[-1]
        return _waiting(messages.preflight_broke(container.exit_code, container.reason, last_line))
    if pod.ended:
        return _waiting(messages.pod_failed(pod.name, pod.reason, pod.message))
    return None


def _with_room(outcome: _Outcome, room: ModelRoom | None) -> _Outcome:
    """Return ``outcome``, with the verdict Impossible where the volume ``room`` is too small for the files of the base
    model, and an attempt would have to fetch them. The kubelet would evict its pods, or the volume would be full."""
    fetches = outcome.verdict is PreflightVerdict.PASSED and (outcome.found is None or outcome.found.artifact is None)
    if room is None or outcome.sizes is None or not fetches or outcome.sizes.model_bytes <= room.bytes:
        return outcome
    needed = quantity(outcome.sizes.model_bytes)
    return replace(
        outcome, verdict=PreflightVerdict.IMPOSSIBLE, message=messages.too_small_for_model(room.field, needed)
    )


def _ran_on(pod: PodObservation, now: datetime) -> bool:
    """Return whether the container ran far longer than the check takes: RUN_SECONDS, or until the pod's deadline.

    A container can seem to start before its pod was bound to the node, because the clock of the node is behind. The
    time of the binding then counts as the start.
    """
    container = pod.container
    if container is None or container.started_at is None or container.never_ran:
        return False
    if pod.reason == POD_DEADLINE:
        return True
    started = max(container.started_at, pod.scheduled_at or pod.created_at)
    return pod.running and (now - started).total_seconds() >= RUN_SECONDS


def _waiting(message: str) -> _Outcome:
    return _Outcome(verdict=PreflightVerdict.WAITING, message=message)


def _aborted(message: str) -> _Outcome:
    return _Outcome(verdict=PreflightVerdict.WAITING, message=message, aborted=True)


def _why_stuck(pod: PodObservation, seen: JobObservation) -> str:
    """Return why the pod does not run yet. Empty where it runs, is only a few seconds old, or no reason is known."""
    if pod.running or not _had_time_to_start(pod, seen.now):
        return ""
    detail = why_pod_waits(pod, seen.warning)
    return messages.waiting_pod(pod.name, detail) if detail else ""


def _had_time_to_start(pod: PodObservation, now: datetime) -> bool:
    return (now - pod.created_at).total_seconds() >= EVENTS_AFTER_SECONDS


def _least(limit: float | None, seconds: float) -> float:
    return seconds if limit is None else min(limit, seconds)
