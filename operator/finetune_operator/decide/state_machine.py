"""Decides what happens next to a job that has not ended: one state machine for the preflight check and all attempts.

`reconcile.py` calls `decide` in each reconcile of such a job, unless this version can't read enough of its status.
`attempts.py` decides about attempts, `initial_adapter.py` about the job that `model.adapter.job` names, and
`preflight.py` about the check that comes before attempt 1. `states.py` has the table of all transitions.
"""

from __future__ import annotations

from dataclasses import replace

from finetune_core.api.status import FineTuneJobStatus
from finetune_operator.decide.attempts import between_attempts, during_attempt
from finetune_operator.decide.decision import Decision
from finetune_operator.decide.initial_adapter import before_adapter
from finetune_operator.decide.preflight import before_first_attempt
from finetune_operator.observe.observation import JobObservation


def decide(stored: FineTuneJobStatus, seen: JobObservation) -> Decision:
    """Return what to record and what to do next for a job.

    ``stored`` is the job's stored status, and ``seen`` is what this reconcile has read.
    """
    attempts = stored.attempts
    if attempts.current is not None:
        decision = during_attempt(attempts, attempts.current, seen)
    else:
        decision = between_attempts(attempts, seen)
    adapter = before_adapter(stored, seen.named_job, decision)
    if attempts.started:
        return replace(adapter or decision, preflight=stored.preflight)
    return adapter or before_first_attempt(stored, seen, decision)
