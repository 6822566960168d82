"""What reports and results tell about a run: checkpoints, artifact, scores, incidents, curves."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from finetune_core.api.evaluation import ScoredRows
from finetune_core.api.training import StabilityAction
from finetune_core.contract.contract_model import ContractModel


class CheckpointRecord(ContractModel):
    """A committed checkpoint, as reports list it."""

    run: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=0)]
    uri: Annotated[str, Field(max_length=1024)]
    bytes: Annotated[int, Field(ge=0)]
    manifest_sha256: Annotated[str, Field(max_length=64)]
    perplexity: float | None = None
    task_score: float | None = None
    time: datetime
    damaged: Annotated[str, Field(max_length=256)] = ""
    """What is wrong with it, where resuming found something: the object's name and how it differs."""


class CheckpointName(ContractModel):
    """Which checkpoint: the run that wrote it and the step that it holds."""

    run: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=0)]


class ArtifactRecord(ContractModel):
    """The committed artifact."""

    uri: Annotated[str, Field(max_length=512)]
    step: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]
    manifest_sha256: Annotated[str, Field(max_length=64)]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


class ScoreRecord(ContractModel):
    """How well a model does on a set of rows."""

    perplexity: Annotated[float, Field(ge=0)]
    """exp of the mean negative log-likelihood over all supervised tokens: those of the answers."""
    all_token_perplexity: Annotated[float, Field(ge=0)] | None = None
    """The same over the tokens of prompts and answers, as in the study that the project repeats."""
    task_score: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of right answers by the task's main score."""
    scores: Annotated[dict[Annotated[str, Field(max_length=32)], float], Field(max_length=8)] = {}
    """Every score of the task, by name."""
    graded: Annotated[int, Field(ge=0)] = 0
    """Answers that were graded; rows whose gold answer can't be graded against are left out."""

    def rounded(self) -> ScoreRecord:
        """Return the record with six significant digits."""
        values = self.model_dump()
        scores = {name: _rounded(value) for name, value in self.scores.items()}
        return ScoreRecord.model_validate(
            {name: _rounded(value) if isinstance(value, float) else value for name, value in values.items()}
            | {"scores": scores}
        )


class EvaluationRecord(ContractModel):
    """Base model and tuned model on the same rows."""

    rows: ScoredRows
    examples: Annotated[int, Field(ge=0)]
    """Rows of the set; `graded` says how many of them were answered and graded."""
    base: ScoreRecord | None = None
    tuned: ScoreRecord | None = None
    tuned_step: Annotated[int, Field(ge=0)] | None = None
    """Step of the checkpoint that `tuned` speaks of: the one that was exported."""

    def rounded(self) -> EvaluationRecord:
        """Return the record with six significant digits: a termination message has room for no more."""
        base, tuned = (record.rounded() if record is not None else None for record in (self.base, self.tuned))
        return self.model_copy(update={"base": base, "tuned": tuned})


class Incident(ContractModel):
    """Something that went wrong with the numbers of the training, and what was done."""

    step: Annotated[int, Field(ge=0)]
    """Step at which it was noticed."""
    kind: Annotated[str, Field(max_length=32)]
    """Such as NonFiniteLoss, NonFiniteGradient, LossSpike."""
    value: Annotated[str, Field(max_length=32)]
    """What was measured; text, because it may be infinite."""
    threshold: Annotated[str, Field(max_length=32)]
    """What it had to stay below."""
    action: StabilityAction
    message: Annotated[str, Field(max_length=512)]


class CurvePoint(ContractModel):
    """A point of the curves that the status keeps."""

    step: Annotated[int, Field(ge=0)]
    loss: float | None = None
    perplexity: float | None = None
