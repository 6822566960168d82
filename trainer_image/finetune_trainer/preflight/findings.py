"""Collects what the checks find. A check raises, as the trainer itself does; here an error becomes a finding, so that
one look tells a person everything that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from finetune_core.contract.preflight_result import FINDING_LIMIT, Finding, FindingKind, PreflightResult, ordered
from finetune_core.errors import UserError
from finetune_trainer.pod.errors import OutsideFailure

T = TypeVar("T")


class Findings:
    """What was found so far, and what is being looked at."""

    def __init__(self) -> None:
        """Nothing is looked at yet."""
        self._found: list[Finding] = []
        self._notices: list[str] = []
        self.subject = "the run file"
        """What is being looked at."""

    def of(self, subject: str, check: Callable[[], T]) -> T | None:
        """Return what ``check`` returns; None where it found something wrong."""
        self.subject = subject
        try:
            return check()
        except UserError as error:
            self.add(FindingKind.FINAL, str(error))
        except OutsideFailure as error:
            self.add(FindingKind.OUTSIDE, str(error))
        return None

    def add(self, kind: FindingKind, sentence: str) -> None:
        """Add a finding."""
        self._found.append(Finding(kind=kind, message=sentence[:FINDING_LIMIT]))

    def notice(self, *sentences: str) -> None:
        """Add what a person may want to know though nothing is wrong."""
        self._notices += sentences

    @property
    def result(self) -> PreflightResult:
        """What is known now."""
        return PreflightResult(findings=ordered(self._found), notices=self._notices)
