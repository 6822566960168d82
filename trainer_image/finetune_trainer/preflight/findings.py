"""Collects the results of the preflight checks. A check raises the trainer's own exceptions; `Findings` turns the
exceptions into findings and goes on with the next check, so that one preflight run reports every problem of a job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from finetune_core.contract.preflight_result import FINDING_LIMIT, Finding, FindingKind, PreflightResult, ordered
from finetune_core.errors import UserError
from finetune_trainer.pod.errors import OutsideFailure

T = TypeVar("T")


class Findings:
    """The findings and notices so far, and the subject of the check that is running."""

    def __init__(self) -> None:
        """Create an empty collection."""
        self._found: list[Finding] = []
        self._notices: list[str] = []
        self.subject = "the run file"
        """What the running check examines, as a phrase for the time-out message: `dataset.train`."""

    def collect(self, subject: str, check: Callable[[], T]) -> T | None:
        """Run ``check`` and return its result, or None if it raised UserError or OutsideFailure, which becomes a
        finding.
        """
        self.subject = subject
        try:
            return check()
        except UserError as error:
            self.add(FindingKind.FINAL, str(error))
        except OutsideFailure as error:
            self.add(FindingKind.OUTSIDE, str(error))
        return None

    def add(self, kind: FindingKind, sentence: str) -> None:
        """Add a finding. The sentence is cut off after `FINDING_LIMIT` characters."""
        self._found.append(Finding(kind=kind, message=sentence[:FINDING_LIMIT]))

    def notice(self, *sentences: str) -> None:
        """Add notices: sentences that users should read although the job can run."""
        self._notices += sentences

    @property
    def result(self) -> PreflightResult:
        """The findings and notices so far, in the form of the termination message."""
        return PreflightResult(findings=ordered(self._found), notices=self._notices)
