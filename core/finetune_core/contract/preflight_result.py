"""The result of a preflight check: its findings, as JSON in the termination message of the check's container.

The trainer image's preflight program writes the result, and the operator's `decide/preflight.py` reads it. A finding is
final when the spec or the content of the data makes the job impossible. A finding is an outside problem when it can be
solved without a change of the job, for example a missing Secret, refused credentials, or an unreachable endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_core.api.resources import LEAST_MEMORY, MOST_CPUS, MOST_MEMORY
from finetune_core.api.status import ADVICE_LENGTH
from finetune_core.api.storage import RunId
from finetune_core.contract.contract_model import CONTRACT_VERSION, ContractModel, Count, TerminationMessage, Time
from finetune_core.contract.records import EvaluationRecord
from finetune_core.contract.result import ExitCode, Outcome
from finetune_core.contract.same_training import Sha256

PREFLIGHT_COMMAND = "preflight"
"""Argument that makes the trainer image's entry point run the preflight checks."""
PREFLIGHT_SECONDS = 120
"""Largest number of seconds that all checks together may take. The start of the preflight program, before the first
check, does not count."""

FINDING_LIMIT = 2048
"""Largest number of characters of a finding's message."""


class FindingKind(StrEnum):
    """The kinds of findings. After a `Final` finding no further try of the check can succeed. After an `Outside`
    finding a further try may succeed."""

    FINAL = "Final"
    OUTSIDE = "Outside"


class Finding(ContractModel):
    """A problem that a preflight check has found."""

    kind: FindingKind
    message: Annotated[str, Field(max_length=FINDING_LIMIT)]
    """A sentence that begins with the field's path, for example `dataset.train: s3://bucket/key does not exist`."""


class FoundArtifact(ContractModel):
    """A committed artifact that a preflight check has found. This class has no field for the artifact's address,
    because the operator does not trust an address from the bucket. The operator makes the address from the spec."""

    run: Annotated[int, Field(ge=1, lt=1_000_000)]
    bytes: Count
    manifest_sha256: Sha256
    outcome: Literal[Outcome.COMPLETED, Outcome.EARLY_STOPPED, Outcome.GATE_FAILED]


class FoundRun(ContractModel):
    """The runs that are already in the job's folder in the bucket, or in the folder of a former job with the same
    training."""

    run_id: RunId
    """Name of the folder in the bucket that holds the runs: `storage.runId`, or the uid of a job."""
    uid: Annotated[str, Field(max_length=64, pattern="^[-A-Za-z0-9]*$")] = ""
    """uid of the job that began the newest run in the folder. Empty if the record of this run names no job or can't be
    read."""
    time: Time
    """Time at which the first run in the folder began, by the clock of the object store."""
    step: Count
    """Optimizer step of the artifact or, without an artifact, of the newest checkpoint."""
    artifact: FoundArtifact | None = None
    """The committed artifact. None where no run in the folder is finished. A job that takes over the folder then
    resumes from the checkpoint of step ``step``."""
    evaluation: EvaluationRecord | None = None
    template_date: date | None = None
    """The day that chat templates got as today's date in the runs of the folder."""


class InputSizes(ContractModel):
    """How large the inputs of a job are, in bytes."""

    model_bytes: Count
    """Size of the files of the base model that a pod reads."""
    data_bytes: Count
    """Size of all data files together, as they are stored."""


class PlannedChoices(ContractModel):
    """The settings of the training that its plan has, chosen where the job leaves them open."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """ZeRO stage of DeepSpeed. None: the only process trains without DeepSpeed."""
    offload_optimizer: bool
    gradient_checkpointing: bool
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)]


class PlannedNeeds(ContractModel):
    """What the training needs by its plan, where every row has `dataset.maxLength` tokens. The operator may ask for
    that much memory and that many CPUs, so the bounds are those of the fields of `resources`."""

    gpu_memory_bytes: Count
    """Peak memory of one GPU in bytes."""
    memory_bytes: Annotated[int, Field(ge=LEAST_MEMORY, le=MOST_MEMORY)]
    """Peak memory of one pod in bytes."""
    cpus: Annotated[int, Field(ge=1, le=MOST_CPUS)]
    """CPUs of one pod."""
    choices: PlannedChoices | None = None
    """None in results of older trainer images."""
    advice: Annotated[str, Field(max_length=ADVICE_LENGTH)] = ""
    """The lines of the spec that make the job take less memory where its smallest micro-batch takes too much."""


class PreflightResult(TerminationMessage):
    """The result of all checks. Without a finding the job can start."""

    version: Literal[1] = CONTRACT_VERSION
    findings: list[Finding]
    """The problems, final ones first. No message occurs twice."""
    notices: list[str] = []
    """Sentences about things that a user may want to know although nothing is wrong."""
    found: FoundRun | None = None
    """The runs that the job continues, or whose artifact becomes the job's own: the runs in the job's folder in the
    bucket, or those of a former job. None where the check found neither a checkpoint nor an artifact."""
    sizes: InputSizes | None = None
    """The sizes of model and data. None where the size of the model or of the data was not found, and in results of
    older trainer images."""
    planned: PlannedNeeds | None = None
    """The needs by the plan. None where the plan does not know the GPU or the model, and where there are findings."""

    @property
    def exit_code(self) -> int:
        """Exit code of the container: 0 without findings, 64 with a final finding, else 75."""
        if not self.findings:
            return int(ExitCode.DONE)
        return int(ExitCode.BAD_INPUT if self.is_final else ExitCode.OUTSIDE_FAILURE)

    @property
    def is_final(self) -> bool:
        """Whether at least one finding is final, which means that the job can't run."""
        return any(finding.kind is FindingKind.FINAL for finding in self.findings)

    @property
    def sentence(self) -> str:
        """The messages of the findings, joined to one line. Where there are final findings, the line contains only the
        messages of final findings, because these are the reasons why the job fails."""
        decisive = [finding for finding in self.findings if finding.kind is FindingKind.FINAL] or self.findings
        return "; ".join(finding.message for finding in decisive)

    def to_termination_message(self) -> str:
        """Return the result as JSON of at most 1,024 bytes.

        Notices are dropped first, then the scores of the run that was found, then the plan's advice, then the last
        findings, then the end of the first finding's message.
        """
        result = self
        while result.excess_bytes > 0:
            result = _shorter(result)
        return result.to_json()


def _shorter(result: PreflightResult) -> PreflightResult:
    """Return ``result`` without its last notice, else without the scores of the run that was found, else without the
    plan's advice, else without its last finding, else with a shorter message. Repeated calls end with an empty message
    or no finding, which always fits."""
    if result.notices:
        return result.model_copy(update={"notices": result.notices[:-1]})
    if result.found is not None and result.found.evaluation is not None:
        return result.model_copy(update={"found": result.found.model_copy(update={"evaluation": None})})
    if result.planned is not None and result.planned.advice:
        return result.model_copy(update={"planned": result.planned.model_copy(update={"advice": ""})})
    *others, last = result.findings
    if others:
        return result.model_copy(update={"findings": others})
    # The computation assumes that each character takes 6 bytes of JSON, which is the most that a character can take
    # (\u0000). Where the characters take less, the text is still too long, and the next call cuts further characters.
    # The 4 additional characters make room for the ellipsis, which takes 3 bytes, and for the rounding.
    kept = last.message.removesuffix("…")[: -(result.excess_bytes // 6 + 4)]
    return result.model_copy(update={"findings": [last.model_copy(update={"message": f"{kept}…" if kept else ""})]})


def ordered(findings: Sequence[Finding]) -> list[Finding]:
    """Return ``findings`` as `PreflightResult.findings` lists them: final findings first, and no message twice."""
    first: dict[str, Finding] = {}
    for finding in sorted(findings, key=lambda finding: finding.kind is not FindingKind.FINAL):
        first.setdefault(finding.message, finding)
    return list(first.values())
