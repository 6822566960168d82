"""Functions that make the common kinds of test cases: a job whose first attempt fails and whose second attempt
succeeds, or a job that fails with its first attempt. Keyword arguments (``more``) set other fields of `Row`, and also
replace fields that the function sets, such as `attempts` and `milestones`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.e2e.rows.milestones import RETRIED, end
from tests.e2e.rows.row import Row
from tests.e2e.rows.stage import Stage

Fault = Callable[[Stage], float]
DONE_THEN = ("Succeeded", "Completed")


def charged(name: str, reason: str, script: str, fault: Fault, **more: Any) -> Row:
    """Return a test case in which the first attempt ends with the verdict Charged and ``reason``, and the second
    attempt succeeds."""
    return _retried(name, ("Charged", reason), script, fault, more)


def free(name: str, reason: str, script: str, fault: Fault, **more: Any) -> Row:
    """Return a test case in which the first attempt ends with the verdict Free and ``reason``, and the second attempt
    succeeds."""
    return _retried(name, ("Free", reason), script, fault, more)


def permanent(name: str, reason: str, script: str, fault: Fault, **more: Any) -> Row:
    """Return a test case in which the job fails with its first attempt, which ends with the verdict Permanent and
    ``reason``."""
    shape: dict[str, Any] = {
        "attempts": (("Permanent", reason),),
        "final": ("False", reason),
        "milestones": (end(),),
    }
    return Row(name=name, script=script, fault=fault, **shape | more)


def _retried(name: str, first: tuple[str, str], script: str, fault: Fault, more: dict[str, Any]) -> Row:
    shape: dict[str, Any] = {"attempts": (first, DONE_THEN), "milestones": RETRIED}
    return Row(name=name, script=script, fault=fault, **shape | more)
