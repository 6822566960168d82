"""Decides from which artifact a job starts, if its `model.adapter.job` names another job. `state_machine.py` calls
`before_adapter`, whose decision comes before the preflight check and before each attempt.

The record in `status.adapter` holds the uid of the other job, and the address and the digest of its artifact. Once the
operator has written this record, it does not look up the name again. Every attempt verifies the recorded artifact, even
where the other job is deleted or a new job gets its name. Before the record is written, the name means the job that has
the name at that time.

The record may be lost after attempt 1, for example where an older version of the operator, which does not know
`status.adapter`, writes the status. The name is then looked up again, and the trainer refuses an adapter whose bytes
differ from those that the former attempts used.
"""

from __future__ import annotations

from dataclasses import replace

from finetune_core.api.conditions import Reason
from finetune_core.api.status import AdapterStatus, FineTuneJobStatus
from finetune_operator import messages
from finetune_operator.decide.decision import Action, Decision, JobEnd
from finetune_operator.decide.states import JobState
from finetune_operator.observe.named_job import NamedJob

LOOK_SECONDS = 15.0
"""Seconds until a job that waits for the job in `model.adapter.job` looks at that job again."""


def before_adapter(stored: FineTuneJobStatus, named: NamedJob | None, unchecked: Decision) -> Decision | None:
    """Return the decision for a job whose next attempt may not start before the artifact of ``named`` is recorded.

    ``unchecked`` is the decision that would be made without this record and without a preflight check. Return None
    where nothing has to be recorded (``named`` is None), or where ``unchecked`` opens no attempt.
    """
    if named is None or unchecked.action is not Action.OPEN_ATTEMPT:
        return None
    waiting = replace(
        unchecked,
        state=JobState.BACKING_OFF if stored.attempts.started else JobState.CHECKING,
        attempts=stored.attempts,
        preflight=stored.preflight,
        action=Action.NONE,
        is_checked=True,
    )
    if refusal := _refusal(named):
        end = JobEnd(succeeded=False, reason=Reason.BAD_INPUT, message=refusal)
        return replace(waiting, state=JobState.FAILED, end=end)
    if reason := _why_waiting(named):
        return replace(waiting, missing=reason, wait_seconds=LOOK_SECONDS)
    assert named.artifact is not None
    record = AdapterStatus(
        use=named.use,
        source=named.artifact.uri,
        job_uid=named.uid,
        manifest_sha256=named.artifact.manifest_sha256,
    )
    return replace(waiting, adapter=record)


def _refusal(named: NamedJob) -> str:
    """Return why the artifact of ``named`` can never be used; empty where it can, or where that is not known yet."""
    if named.is_itself:
        return messages.ADAPTER_OF_ITSELF
    if named.waits_for_it:
        return messages.adapter_job_in_a_circle(named.name)
    if not named.exists or not named.is_readable:
        return ""
    if not named.has_adapter:
        return messages.adapter_job_without_adapter(named.name)
    if not named.same_store:
        return messages.adapter_job_elsewhere(named.name)
    if named.succeeded == "False":
        return messages.adapter_job_failed(named.name, named.reason)
    if named.succeeded == "True" and (named.artifact is None or not named.artifact.manifest_sha256):
        return messages.adapter_job_without_artifact(named.name)
    return ""


def _why_waiting(named: NamedJob) -> str:
    if not named.exists:
        return messages.adapter_job_missing(named.name)
    if not named.is_readable:
        return messages.adapter_job_unreadable(named.name)
    if named.succeeded != "True":
        return messages.adapter_job_unfinished(named.name, named.reason)
    return ""
