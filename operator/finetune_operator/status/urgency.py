"""Decides how soon a new status is written, from what differs and from whether a report alone made the difference.

Pure functions, called by `writer.py`. What the operator itself recorded or saw is written at once. A change that comes
from a report needs a token of the job's token bucket, whatever the report contains. Otherwise a pod with a valid token
could choose how often the operator writes. Every field of the status is in exactly one list below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Final

from finetune_core.api.conditions import ConditionType
from finetune_core.api.status import FineTuneJobStatus

OWN_FIELDS: Final = (
    "observed_generation",
    "attempts",
    "preflight",
    "image",
    "plan",
    "child",
    "start_time",
    "completion_time",
)
"""Fields that the operator computes itself, except `attention` and `adaptedShare` in `plan`, which the trainer reports.
`decide/bookkeeping.py` takes its values from two of these fields."""
REPORTED_NEWS: Final = ("checkpoints", "evaluation", "incidents", "artifact")
"""Fields from reports and results that people wait for."""
REPORTED_NUMBERS: Final = ("progress", "metrics", "history", "notices", "adapter")
"""Fields from reports that need not be fresh: a value that is ten seconds old is good enough. What the operator itself
records in `adapter` is written before anything else (`Decision.must_be_written_first`)."""
SPECIAL_FIELDS: Final = ("conditions", "usage")
"""Fields of which only parts decide. A change of a condition counts as more than numbers where its type, status or
reason changes. A change of the usage counts only where `holders` or `running` changes, and then as a change of
numbers."""
REPORTED_CONDITIONS: Final = (ConditionType.CHECKPOINT_AVAILABLE,)
"""Conditions that are computed from reports. `Running` is not among them: a report can make it True, but no report
makes it False again."""


class Urgency(Enum):
    """How soon a new status is written."""

    UNCHANGED = auto()
    """The status is not written, because nothing differs but usage that grew with time."""
    NUMBERS = auto()
    """Only numbers and messages differ, or which pods hold GPUs. The status is written ten seconds after the last write
    or later, as the limits of the job and of all jobs allow."""
    REPORTED = auto()
    """More than numbers differ, because of a report. The status is written once the job's token bucket has a token."""
    OWN = auto()
    """The operator's own records or observations differ. The status is written at once."""


def urgency(
    old: FineTuneJobStatus | None, new: FineTuneJobStatus, without_report: Callable[[], FineTuneJobStatus]
) -> Urgency:
    """Return how soon ``new`` is written. ``old`` is the stored status; None where the job has no status yet.

    ``without_report`` computes the new status without the newest report. Where the status computed in this way differs
    from ``old`` in what the operator computes itself (`_is_own`), the operator's own records or observations have
    changed.
    """
    if not is_news(old, new):
        return Urgency.UNCHANGED
    if not is_transition(old, new):
        return Urgency.NUMBERS
    return Urgency.OWN if _is_own(old, without_report()) else Urgency.REPORTED


def is_news(old: FineTuneJobStatus | None, new: FineTuneJobStatus) -> bool:
    """Return whether ``new`` differs from ``old`` in more than usage that grew with time.

    Growth of the usage alone causes no write, but the next write includes it.
    """
    if old is None or old.usage is None or new.usage is None:
        return old != new
    passed = new.usage.model_copy(update={"holders": old.usage.holders, "running": old.usage.running})
    return old.model_copy(update={"usage": passed}) != new


def is_transition(old: FineTuneJobStatus | None, new: FineTuneJobStatus) -> bool:
    """Return whether more than numbers, messages and usage differ between ``old`` and ``new``."""
    return old is None or _differ(old, new, (*OWN_FIELDS, *REPORTED_NEWS)) or _states(old) != _states(new)


def _is_own(old: FineTuneJobStatus | None, new: FineTuneJobStatus) -> bool:
    """Return whether fields or conditions that the operator computes itself differ between ``old`` and ``new``."""
    if old is None or _differ(old, new, OWN_FIELDS):
        return True
    return _states(old, REPORTED_CONDITIONS) != _states(new, REPORTED_CONDITIONS)


def _differ(old: FineTuneJobStatus, new: FineTuneJobStatus, fields: Sequence[str]) -> bool:
    return any(getattr(old, name) != getattr(new, name) for name in fields)


def _states(status: FineTuneJobStatus, left_out: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """Return type, status and reason of the conditions in ``status`` whose type is not in ``left_out``."""
    return [(item.type, item.status, item.reason) for item in status.conditions if item.type not in left_out]
