"""What the preflight pod says to the operator: its findings, as JSON in the termination message.

A finding is final where the spec or the data's content makes the job impossible, and outside where something may
still appear or be put right without touching the job: a Secret, credentials, a bucket, an endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_core.contract.contract_model import CONTRACT_VERSION, ContractModel, TerminationMessage
from finetune_core.contract.result import ExitCode

PREFLIGHT_COMMAND = "preflight"
"""Argument of the trainer image's entry point."""
PREFLIGHT_SECONDS = 120
"""How long the checks may take together, from the first line of the program on."""

FINDING_LIMIT = 2048


class FindingKind(StrEnum):
    """Whether trying again can help."""

    FINAL = "Final"
    OUTSIDE = "Outside"


class Finding(ContractModel):
    """One thing that is wrong."""

    kind: FindingKind
    message: Annotated[str, Field(max_length=FINDING_LIMIT)]
    """A sentence that begins with the field's path."""


class PreflightResult(TerminationMessage):
    """How the checks ended. No finding: the job can start."""

    version: Literal[1] = CONTRACT_VERSION
    findings: list[Finding]
    """What is wrong, each sentence once; final ones first."""
    notices: list[str] = []
    """What a person may want to know though nothing is wrong."""

    @property
    def exit_code(self) -> int:
        """The code that PID 1 exits with."""
        if not self.findings:
            return int(ExitCode.DONE)
        return int(ExitCode.BAD_INPUT if self.is_final else ExitCode.OUTSIDE_FAILURE)

    @property
    def is_final(self) -> bool:
        """Whether the job is impossible, whatever appears."""
        return any(finding.kind is FindingKind.FINAL for finding in self.findings)

    @property
    def sentence(self) -> str:
        """The findings in one line; where some are final, those alone: the others do not matter any more."""
        decisive = [finding for finding in self.findings if finding.kind is FindingKind.FINAL] or self.findings
        return "; ".join(finding.message for finding in decisive)

    def to_termination_message(self) -> str:
        """Return the result as JSON of at most 1,024 bytes.

        Notices go first, then the last findings, then the end of the first finding's sentence.
        """
        result = self
        while result.excess_bytes > 0:
            result = _shorter(result)
        return result.to_json()


def _shorter(result: PreflightResult) -> PreflightResult:
    """Return ``result`` with a little less in it; at the latest an empty sentence fits."""
    if result.notices:
        return result.model_copy(update={"notices": result.notices[:-1]})
    *others, last = result.findings
    if others:
        return result.model_copy(update={"findings": others})
    # A character takes at most 6 bytes in JSON (\u0000), and the ellipsis takes three.
    kept = last.message.removesuffix("…")[: -(result.excess_bytes // 6 + 4)]
    return result.model_copy(update={"findings": [last.model_copy(update={"message": f"{kept}…" if kept else ""})]})


def ordered(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings as a result lists them: each sentence once, final ones first."""
    first: dict[str, Finding] = {}
    for finding in sorted(findings, key=lambda finding: finding.kind is not FindingKind.FINAL):
        first.setdefault(finding.message, finding)
    return list(first.values())
