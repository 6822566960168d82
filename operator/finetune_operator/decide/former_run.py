"""Decides what a run that the preflight check found in the bucket means for the job: whether the job takes over the run
of a former job, and whether the job ends because the artifact is committed already. `preflight.py` calls these
functions.

The preflight check runs in the job's namespace, whose users could forge the result of the check. So the result has no
address of an artifact. The address is made of `<storage.uri>/<namespace>/<name>`, and of the folder name and the run
number in the result. So a forged result can't lead to a folder of jobs with another namespace or name.
"""

from __future__ import annotations

from pydantic import ValidationError

from finetune_core.api.status import TakenOverStatus
from finetune_core.contract import ArtifactRecord, Outcome, Result
from finetune_core.contract.preflight_result import FoundRun
from finetune_core.layout import artifact_folder
from finetune_operator import messages
from finetune_operator.decide.decision import JobEnd
from finetune_operator.decide.verdict import TEXT_LIMIT
from finetune_operator.observe.observation import PreflightObservation


def taken_over(found: FoundRun, seen: PreflightObservation) -> TakenOverStatus | None:
    """Return the record of the run that the job takes over; None if ``found`` is the job's own run in its own folder.

    ``found`` is the run that the preflight check found in the bucket. If this job took the run over earlier and then
    lost its status, ``found`` names the folder of the former job and the uid of this job. In that case the job gets the
    record again, because it would not use that folder without the record.
    """
    if found.run_id == seen.job_uid or (found.run_id == seen.chosen_run_id and found.uid == seen.job_uid):
        return None
    message = messages.taken_over(found.run_id, found.uid, found.time, found.step, done=found.artifact is not None)
    return TakenOverStatus(
        run_id=found.run_id, uid=found.uid, time=found.time, step=found.step, message=message[:TEXT_LIMIT]
    )


def end_with_artifact(found: FoundRun, former: TakenOverStatus | None, seen: PreflightObservation) -> JobEnd | None:
    """Return how the job ends where the artifact of ``found`` is committed; None where training is left to do.

    ``former`` is the record of the run that the job takes over; None for the job's own run. The result is None also
    where the address of the artifact can't be made. An attempt then finds the artifact by itself.
    """
    if found.artifact is None or not seen.runs_folder:
        return None
    uri = f"{seen.runs_folder}/{found.run_id}/{artifact_folder(found.artifact.run)}"
    try:
        artifact = ArtifactRecord(
            uri=uri, step=found.step, bytes=found.artifact.bytes, manifest_sha256=found.artifact.manifest_sha256
        )
    except ValidationError:
        return None
    outcome = found.artifact.outcome
    failed = outcome is Outcome.GATE_FAILED
    message = messages.gate_failed(found.step, uri) if failed else messages.completed(found.step, uri)
    if former is not None:
        message = f"{message}; it {former.message}"
    result = Result(outcome=outcome, message=message, step=found.step, artifact=artifact, evaluation=found.evaluation)
    return JobEnd(succeeded=not failed, reason=outcome.value, message=message, result=result)
