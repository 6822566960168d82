"""The result of a preflight pod: its findings, as JSON in the container's termination message.

The trainer image's preflight program writes the result, and the operator's `decide/preflight.py` reads it. A finding is
final when the spec or the content of the data makes the job impossible. A finding is an outside problem when it can be
solved without a change of the job, for example a missing Secret, refused credentials, or an unreachable endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_core.api.storage import RunId
from finetune_core.contract.contract_model import CONTRACT_VERSION, ContractModel, Count, TerminationMessage, Time
from finetune_core.contract.records import EvaluationRecord
from finetune_core.contract.result import ExitCode, Outcome
from finetune_core.contract.training import Sha256

PREFLIGHT_COMMAND = "preflight"
"""Argument that makes the trainer image's entry point run the preflight checks."""
PREFLIGHT_SECONDS = 120
"""Most seconds that all checks may take together, measured from the start of the program."""

FINDING_LIMIT = 2048
"""Most characters of a finding's message."""


class FindingKind(StrEnum):
    """Whether another try of the check can succeed: never for `Final`, possibly for `Outside`."""

    FINAL = "Final"
    OUTSIDE = "Outside"


class Finding(ContractModel):
    """A problem that a preflight check has found."""

    kind: FindingKind
    message: Annotated[str, Field(max_length=FINDING_LIMIT)]
    """A sentence that begins with the field's path, for example `dataset.train: s3://bucket/key does not exist`."""


class FoundArtifact(ContractModel):
    """The committed artifact of a run that a preflight check has found. The operator makes the artifact's address from
    the spec, because the bucket is not trusted to name one."""

    run: Annotated[int, Field(ge=1, lt=1_000_000)]
    bytes: Count
    manifest_sha256: Sha256
    outcome: Literal[Outcome.COMPLETED, Outcome.EARLY_STOPPED]


class FoundRun(ContractModel):
    """What the job's folder in the bucket, or the folder of a former job with the same training, holds already."""

    run_id: RunId
    """Name of the folder of runs."""
    uid: Annotated[str, Field(max_length=64, pattern="^[-A-Za-z0-9]*$")] = ""
    """uid of the job that last wrote to the folder. Empty if the folder does not tell."""
    time: Time
    """When the first run in the folder was begun, by the clock of the object store."""
    step: Count
    """Optimizer step of the artifact or, without an artifact, of the newest checkpoint."""
    artifact: FoundArtifact | None = None
    """The committed artifact. None where the run is not finished, so that it can only be resumed."""
    evaluation: EvaluationRecord | None = None


class PreflightResult(TerminationMessage):
    """The result of all checks. Without a finding the job can start."""

    version: Literal[1] = CONTRACT_VERSION
    findings: list[Finding]
    """The problems, final ones first. No message occurs twice."""
    notices: list[str] = []
    """Remarks that a user may want to know although nothing is wrong."""
    found: FoundRun | None = None
    """A run that the job takes over instead of training anew. None where there is none."""

    @property
    def exit_code(self) -> int:
        """Exit code of the container: 0 without findings, 64 with a final finding, else 75."""
        if not self.findings:
            return int(ExitCode.DONE)
        return int(ExitCode.BAD_INPUT if self.is_final else ExitCode.OUTSIDE_FAILURE)

    @property
    def is_final(self) -> bool:
        """Whether a finding makes the job impossible."""
        return any(finding.kind is FindingKind.FINAL for finding in self.findings)

    @property
    def sentence(self) -> str:
        """The findings in one line. If there are final findings, the line contains only these, because they decide that
        the job fails."""
        decisive = [finding for finding in self.findings if finding.kind is FindingKind.FINAL] or self.findings
        return "; ".join(finding.message for finding in decisive)

    def to_termination_message(self) -> str:
        """Return the result as JSON of at most 1,024 bytes.

        Notices are dropped first, then the scores of the run that was found, then the last findings, then the end of
        the first finding's message.
        """
        result = self
        while result.excess_bytes > 0:
            result = _shorter(result)
        return result.to_json()


def _shorter(result: PreflightResult) -> PreflightResult:
    """Return ``result`` without its last notice, else without the scores of the run that was found, else without its
    last finding, else with a shorter message. Repeated calls end with an empty message, which always fits."""
    if result.notices:
        return result.model_copy(update={"notices": result.notices[:-1]})
    if result.found is not None and result.found.evaluation is not None:
        return result.model_copy(update={"found": result.found.model_copy(update={"evaluation": None})})
    *others, last = result.findings
    if others:
        return result.model_copy(update={"findings": others})
    # The cut assumes 6 bytes of JSON for each character, the most that one character takes (\u0000). So it may be too
    # small, and the next call then cuts more. The ellipsis takes three bytes.
    kept = last.message.removesuffix("…")[: -(result.excess_bytes // 6 + 4)]
    return result.model_copy(update={"findings": [last.model_copy(update={"message": f"{kept}…" if kept else ""})]})


def ordered(findings: Sequence[Finding]) -> list[Finding]:
    """Return ``findings`` as `PreflightResult.findings` lists them: final findings first, and no message twice."""
    first: dict[str, Finding] = {}
    for finding in sorted(findings, key=lambda finding: finding.kind is not FindingKind.FINAL):
        first.setdefault(finding.message, finding)
    return list(first.values())
