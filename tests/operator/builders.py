"""Builds jobs, pods, child objects and attempts for the operator's tests. Times are seconds after `NOW`."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune_core.api import FineTuneJob, FineTuneJobStatus
from finetune_core.api.status import AttemptsStatus, CheckpointStatus, CurrentAttempt, PodRecord
from finetune_core.contract import ArtifactRecord, Outcome, Result
from finetune_core.contract.preflight_result import FoundArtifact, FoundRun, PreflightResult
from finetune_operator.decide.decision import Decision
from finetune_operator.decide.state_machine import decide
from finetune_operator.objects.observations import (
    ChildObservation,
    ContainerObservation,
    ContainerState,
    PodObservation,
)
from finetune_operator.observe.observation import JobObservation

REPOSITORY = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
UID = "11111111-2222-3333-4444-555555555555"
CHILD_UID = "child-uid"


def at(seconds: float) -> datetime:
    """Return the time ``seconds`` after `NOW`."""
    return NOW + timedelta(seconds=seconds)


def job_manifest(**spec: Any) -> dict[str, Any]:
    """Return the manifest of examples/quickstart.yaml with a namespace, uid, generation and resourceVersion.

    Other values that the API server adds to a stored object, such as the defaults of the CRD, are missing. ``spec``
    replaces whole sections of the manifest's spec.
    """
    manifest: dict[str, Any] = yaml.safe_load((REPOSITORY / "examples/quickstart.yaml").read_text())
    manifest["metadata"] |= {"namespace": "team", "uid": UID, "generation": 1, "resourceVersion": "1"}
    manifest["spec"] |= spec
    return manifest


def is_observed(manifest: dict[str, Any]) -> bool:
    """Return whether the operator has written the job's status. The status that the API server gives every new job has
    no conditions."""
    return bool(manifest.get("status", {}).get("conditions"))


def job(**spec: Any) -> FineTuneJob:
    """Return the job of examples/quickstart.yaml. ``spec`` replaces sections of the job's spec."""
    return FineTuneJob.model_validate(job_manifest(**spec))


def artifact() -> ArtifactRecord:
    """Return the record of a committed artifact of step 100."""
    return ArtifactRecord(uri="s3://bucket/artifacts/000001", step=100, bytes=12, manifest_sha256="ab")


def result(outcome: Outcome, message: str = "", *, with_artifact: bool = False) -> str:
    """Return the termination message of a trainer that ended with ``outcome``."""
    record = artifact() if with_artifact else None
    return Result(outcome=outcome, message=message, step=100, artifact=record).to_termination_message()


FORMER_UID = "99999999-8888-7777-6666-555555555555"


def former_run(
    *,
    done: bool,
    uid: str = FORMER_UID,
    run_id: str = FORMER_UID,
    outcome: Literal[Outcome.COMPLETED, Outcome.GATE_FAILED] = Outcome.COMPLETED,
    template_date: date | None = None,
) -> str:
    """Return the termination message of a preflight check that found a run in the bucket.

    With ``done`` the run's artifact is committed, with ``outcome``; else the run has checkpoints only. ``run_id`` names
    the folder of the run, and ``uid`` is the uid of the job that wrote into it. ``template_date`` is the day that the
    run's chat template got as today's date.
    """
    committed = FoundArtifact(run=2, bytes=12, manifest_sha256="a" * 64, outcome=outcome)
    found = FoundRun(
        run_id=run_id,
        uid=uid,
        time=at(-86400),
        step=70,
        artifact=committed if done else None,
        template_date=template_date,
    )
    return PreflightResult(findings=[], found=found).to_termination_message()


def pod(
    index: int = 0,
    *,
    exit_code: int | None = None,
    finished: float = 0,
    deleted: float | None = None,
    grace: float = 90,
    message: str = "",
    reason: str = "",
    attempt: int = 1,
    **changes: Any,
) -> PodObservation:
    """Return a pod that runs if ``exit_code`` is None, and that has ended with ``exit_code`` otherwise.

    All times are seconds after `NOW`. ``finished`` is the end of the container, ``deleted`` the time at which the
    deletion was requested. ``grace`` is the pod's grace period in seconds.
    """
    ended = exit_code is not None
    container = ContainerObservation(
        state=ContainerState.TERMINATED if ended else ContainerState.RUNNING,
        exit_code=exit_code,
        finished_at=at(finished) if ended else None,
        message=message,
        reason=reason,
    )
    phase = "Running" if not ended else "Succeeded" if exit_code == 0 else "Failed"
    values: dict[str, Any] = {
        "name": f"job-1-worker-{index}",
        "uid": f"pod-{index}",
        "attempt": attempt,
        "index": index,
        "phase": phase,
        "node": f"node-{index}",
        "created_at": at(-100),
        "delete_requested_at": None if deleted is None else at(deleted),
        "delete_deadline": None if deleted is None else at(deleted + grace),
        "container": container,
    }
    # In ``changes``, the names `reason_` and `message_` set the pod's own fields `reason` and `message`, because the
    # parameters `reason` and `message` set the fields of the container.
    return PodObservation(**(values | {name.rstrip("_"): value for name, value in changes.items()}))


def child(**changes: Any) -> ChildObservation:
    """Return the child of attempt 1, a PyTorchJob with two workers."""
    values: dict[str, Any] = {"name": "job-1", "uid": CHILD_UID, "owner_uid": UID, "replicas": 2}
    return ChildObservation(**(values | changes))


def current(number: int = 1, *, started: float = -100, indexes: tuple[int, ...] = (0, 1)) -> CurrentAttempt:
    """Return `status.attempts.current` for attempt ``number``, with one recorded pod for each of ``indexes``."""
    pods = [PodRecord(index=i, name=f"job-1-worker-{i}", uid=f"pod-{i}", node=f"node-{i}") for i in indexes]
    return CurrentAttempt(number=number, start_time=at(started), pods=pods)


def advance(attempts: AttemptsStatus, seen: JobObservation) -> Decision:
    """Return the operator's decision on the observation ``seen`` of a job whose status holds only ``attempts``, and so
    no preflight check."""
    return decide(FineTuneJobStatus(attempts=attempts), seen)


def checkpoint(time: float, step: int = 20) -> CheckpointStatus:
    """Return a checkpoint of ``step`` that was committed ``time`` seconds after `NOW`."""
    return CheckpointStatus(run=1, step=step, uri="s3://b/c", bytes=1, manifest_sha256="a", time=at(time), last=True)
