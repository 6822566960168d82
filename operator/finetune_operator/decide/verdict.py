"""The vocabulary of verdicts: what the end of an attempt, or of a try of the preflight check, means for the job.

`rules.py` and `preflight.py` decide which verdict applies. `accounting.py` turns Free into Charged where too many free
attempts in a row made no progress. The values are stored in `status.attempts` and `status.preflight`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from finetune_core.api.attempt_causes import Cause
from finetune_core.api.conditions import Reason
from finetune_core.api.status import AttemptCause
from finetune_core.contract import Result

TEXT_LIMIT = 1024
"""Largest number of characters of a message in `status.attempts` and `status.preflight`. Longer messages are cut."""
CONSEQUENCES = (Cause.OUTSIDE_FAILURE, Cause.STOPPED)
"""Reasons that may be no more than a consequence of another pod's crash (exit codes 75 and 143)."""
_EXPLANATIONS = (Cause.CRASHED, Cause.EVICTED, Cause.NODE_REFUSED, Cause.NODE_LOST, Reason.OUT_OF_MEMORY)
"""Reasons that replace a recorded consequence."""


class Verdict(StrEnum):
    """What the end of an attempt means for the job."""

    SUCCEEDED = "Succeeded"
    """The artifact is committed; the job ends."""
    PERMANENT = "Permanent"
    """The job ends: another attempt would end in the same way, or `runPolicy` orders the end."""
    CHARGED = "Charged"
    """The ended attempt counts against `runPolicy.maxRetries`. Another attempt follows if that limit allows."""
    FREE = "Free"
    """The ended attempt does not count, because the job did not cause its end. Another attempt follows."""


class PreflightVerdict(StrEnum):
    """What a try of the preflight check means for the job."""

    PASSED = "Passed"
    """Attempt 1 may start."""
    IMPOSSIBLE = "Impossible"
    """The spec or the data can never work, or too many tries could not be carried out; the job ends."""
    WAITING = "Waiting"
    """Something outside the spec is missing, such as a bucket, or the pod left no result; another try follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling:
    """Why an attempt ends, and what its end means."""

    verdict: Verdict
    reason: str
    """CamelCase reason, for example "PodDeleted": a `Cause`, a `Reason`, or a reason that Kubernetes gives a pod."""
    message: str
    """Sentence for people, for example "pod a-worker-0 was deleted"."""
    node: str = ""
    """Name of the node of the pod that decided; empty where no pod decided or the pod had no node."""
    result: Result | None = None
    """The trainer's result that names the committed artifact; None where the attempt ends without an artifact."""
    ordered: bool = False
    """Whether `runPolicy` ended the attempt. Such an attempt is closed at once, because no later evidence matters."""


@dataclass(frozen=True, slots=True)
class GoesOn:
    """The answer of a rule that matches and lets the attempt go on. No later rule is asked."""


def replaces(recorded: AttemptCause | None, ruling: Ruling) -> bool:
    """Return whether ``ruling`` replaces ``recorded``, the attempt's recorded cause; True where no cause is recorded.

    The cause that was recorded first stays, because later evidence is often its consequence. There are two exceptions.
    A permanent ruling replaces every cause that is not permanent. A crash, an eviction, a node that refused a pod, a
    lost node and a lack of memory replace the exit codes 75 and 143, which may be their consequences.
    """
    if recorded is None:
        return True
    if ruling.verdict is Verdict.PERMANENT:
        return recorded.verdict != Verdict.PERMANENT
    return recorded.reason in CONSEQUENCES and ruling.reason in _EXPLANATIONS
