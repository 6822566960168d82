"""Functions for the common forms of rows: a charged or free attempt that is followed by a successful one, or a job that
ends with its first attempt. Further fields of the row are passed as keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.e2e.rows.milestones import RETRIED, end
from tests.e2e.rows.row import Row
from tests.e2e.rows.stage import Stage

Fault = Callable[[Stage], float]
DONE_THEN = ("Succeeded", "Completed")


def charged(name: str, reason: str, script: str, fault: Fault, **more: Any) -> Row:
    """Return the row of a job whose first attempt is charged and whose second attempt succeeds."""
    return _retried(name, ("Charged", reason), script, fault, more)


def free(name: str, reason: str, script: str, fault: Fault, **more: Any) -> Row:
    """Return the row of a job whose first attempt is free and whose second attempt succeeds."""
    return _retried(name, ("Free", reason), script, fault, more)


def permanent(name: str, reason: str, script: str, fault: Fault, **more: Any) -> Row:
    """Return the row of a job that ends for good with its first attempt, for ``reason``."""
    shape: dict[str, Any] = {
        "attempts": (("Permanent", reason),),
        "final": ("False", reason),
        "milestones": (end(),),
    }
    return Row(name=name, script=script, fault=fault, **shape | more)


def _retried(name: str, first: tuple[str, str], script: str, fault: Fault, more: dict[str, Any]) -> Row:
    shape: dict[str, Any] = {"attempts": (first, DONE_THEN), "milestones": RETRIED}
    return Row(name=name, script=script, fault=fault, **shape | more)
