"""The models that reports and results are made of: checkpoints, the artifact, scores, incidents and points of the
curves."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_core.api.evaluation import ScoredRows
from finetune_core.api.sources import AdapterUse
from finetune_core.api.training import StabilityAction
from finetune_core.contract.contract_model import ContractModel, Count, PositiveCount, Time
from finetune_core.task_declaration import (
    ALL_TOKEN_PERPLEXITY,
    PERPLEXITY,
    SCORE_LIMIT,
    UNGRADED_LIMIT,
    UNGRADED_REASON_LENGTH,
    ScoreName,
)


class CheckpointRecord(ContractModel):
    """A committed checkpoint."""

    run: PositiveCount
    step: Count
    uri: Annotated[str, Field(max_length=1024)]
    bytes: Count
    manifest_sha256: Annotated[str, Field(max_length=64)]
    perplexity: float | None = None
    task_score: float | None = None
    time: Time
    damaged: Annotated[str, Field(max_length=256)] = ""
    """What is wrong with the checkpoint, for example that an object is missing or differs from the manifest. At the
    start of a run the trainer checks all files of the checkpoint that it wants to resume from. Of the other checkpoints
    it checks only the manifest, the sizes of the files, and trainer.json. Empty where no damage is known."""


class CheckpointName(ContractModel):
    """The name of a checkpoint: the number of the run that wrote it, and its optimizer step."""

    run: PositiveCount
    step: Count


class AdapterOrigin(ContractModel):
    """The adapter that a run started from (`model.adapter`)."""

    use: AdapterUse
    """Whether the run continued the adapter, or merged it into the base model first."""
    source: Annotated[str, Field(max_length=1024)]
    """Where the adapter comes from: the `s3://` address of its folder, the name of its repository on the Hugging Face
    Hub, or `<claim>/<path>` on a volume."""
    revision: Annotated[str, Field(max_length=200)] | None = None
    """Commit, tag or branch on the Hugging Face Hub. None where the adapter lies elsewhere."""
    job_uid: Annotated[str, Field(max_length=64)] | None = None
    """`metadata.uid` of the FineTuneJob whose artifact the adapter is. None where the job names another source."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """sha256 over the names and contents of `adapter_config.json` and `adapter_model.safetensors`."""


class ArtifactRecord(ContractModel):
    """The committed artifact of a job."""

    uri: Annotated[str, Field(max_length=512)]
    step: Count
    bytes: Count
    manifest_sha256: Annotated[str, Field(max_length=64)]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


class ScoreRecord(ContractModel):
    """Scores of the base model or of the tuned model on the rows of an evaluation set."""

    perplexity: Annotated[float, Field(ge=0)]
    """Perplexity: exp of the mean loss (in nats) over all supervised tokens, which are the tokens whose loss training
    minimises, such as the tokens of the answers."""
    all_token_perplexity: Annotated[float, Field(ge=0)] | None = None
    """Perplexity over all tokens of prompts and answers, as Anyscale's study of LoRA (September 2023) reports it."""
    task_score: float | None = None
    """The task's main score over all graded answers: the mean of their values, unless the task declares another
    aggregation. Where an answer is either right or wrong for this score, the mean is the share of right answers. None
    where no answers were graded."""
    scores: Annotated[dict[ScoreName, float], Field(max_length=SCORE_LIMIT)] = {}
    """For each score of the task, by name, its value over the graded answers, for example ``{"exact": 0.9}``."""
    graded: Count = 0
    """Number of graded answers. An answer can't be graded, for example, where its row has no reference answer that can
    be used."""
    not_graded: Count = 0
    """Number of answers that could not be graded."""
    ungraded: Annotated[
        dict[Annotated[str, Field(max_length=UNGRADED_REASON_LENGTH)], Count], Field(max_length=UNGRADED_LIMIT)
    ] = {}
    """For each reason why answers could not be graded, the number of these answers. The most frequent reasons come
    first."""

    def value_of(self, score: str) -> float | None:
        """Return the value of the score named ``score``, which is a name that `evaluation.require` accepts. Return None
        where the score was not measured."""
        measured = {PERPLEXITY: self.perplexity, ALL_TOKEN_PERPLEXITY: self.all_token_perplexity}
        return measured[score] if score in measured else self.scores.get(score)

    def rounded(self) -> ScoreRecord:
        """Return the record with all scores rounded to six significant digits, and without the reasons why answers
        could not be graded, for which a termination message has no room."""
        values = self.model_dump(exclude={"ungraded"})
        scores = {name: _rounded(value) for name, value in self.scores.items()}
        return ScoreRecord.model_validate(
            {name: _rounded(value) if isinstance(value, float) else value for name, value in values.items()}
            | {"scores": scores}
        )


class EvaluationRecord(ContractModel):
    """Scores of the base model and of the tuned model on the same rows."""

    rows: ScoredRows
    examples: Count
    """Number of examples in the evaluation set. A row may be several examples. `base.graded` and `tuned.graded` are the
    numbers of graded answers, which may be smaller."""
    base: ScoreRecord | None = None
    tuned: ScoreRecord | None = None
    tuned_step: Count | None = None
    """Optimizer step of the exported checkpoint, whose scores `tuned` holds."""

    def rounded(self) -> EvaluationRecord:
        """Return the record with the scores of both models as `ScoreRecord.rounded` returns them."""
        base, tuned = (record.rounded() if record is not None else None for record in (self.base, self.tuned))
        return self.model_copy(update={"base": base, "tuned": tuned})


class Incident(ContractModel):
    """A step whose loss or gradient norm was not finite or far too high, and what the trainer did."""

    step: Count
    """Optimizer step at which the stability monitor noticed the incident."""
    kind: Annotated[str, Field(max_length=32)]
    """Kind of the incident, for example NonFiniteLoss, NonFiniteGradient or LossSpike."""
    value: Annotated[str, Field(max_length=32)]
    """Measured value as text, because it may be infinite."""
    threshold: Annotated[str, Field(max_length=32)]
    """Largest value that would not have been an incident, as text because it may be infinite."""
    action: StabilityAction
    message: Annotated[str, Field(max_length=512)]


class CurvePoint(ContractModel):
    """Training loss and validation perplexity at one optimizer step, for the curves in the status."""

    step: Count
    loss: float | None = None
    perplexity: float | None = None
