"""What reports and results tell about a run: checkpoints, artifact, scores, incidents, curves."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from finetune_core.api.evaluation import ScoredRows
from finetune_core.contract.wire import ContractModel, Remedy
from finetune_core.tasks import SCORE_LIMIT, ScoreName


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
    """Scores of one model on the rows of an evaluation set."""

    perplexity: Annotated[float, Field(ge=0)]
    """exp of the mean negative log-likelihood (nats) over all supervised tokens, which are those of the answers."""
    all_token_perplexity: Annotated[float, Field(ge=0)] | None = None
    """Perplexity over the tokens of prompts and answers, as Anyscale's study of LoRA (September 2023) reports it."""
    task_score: Annotated[float, Field(ge=0, le=1)] | None = None
    """Mean of the task's main score over the graded answers; for True and False the share of right answers."""
    scores: Annotated[dict[ScoreName, float], Field(max_length=SCORE_LIMIT)] = {}
    """Mean of every score of the task over the graded answers, by the score's name, for example ``{"exact": 0.9}``."""
    graded: Annotated[int, Field(ge=0)] = 0
    """Number of graded answers; an answer is not graded where the row's own reference answer can't be used."""

    def rounded(self) -> ScoreRecord:
        """Return the record with all scores rounded to six significant digits."""
        values = self.model_dump()
        scores = {name: _rounded(value) for name, value in self.scores.items()}
        return ScoreRecord.model_validate(
            {name: _rounded(value) if isinstance(value, float) else value for name, value in values.items()}
            | {"scores": scores}
        )


class EvaluationRecord(ContractModel):
    """Scores of base model and tuned model on the same rows."""

    rows: ScoredRows
    examples: Annotated[int, Field(ge=0)]
    """Number of rows of the evaluation set; `graded` of a score says how many rows have a graded answer."""
    base: ScoreRecord | None = None
    tuned: ScoreRecord | None = None
    tuned_step: Annotated[int, Field(ge=0)] | None = None
    """Step of the exported checkpoint, whose scores are `tuned`."""

    def rounded(self) -> EvaluationRecord:
        """Return the record with six significant digits, because a termination message has no room for more."""
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
    action: Remedy
    message: Annotated[str, Field(max_length=512)]


class CurvePoint(ContractModel):
    """A point of the curves that the status keeps."""

    step: Annotated[int, Field(ge=0)]
    loss: float | None = None
    perplexity: float | None = None
