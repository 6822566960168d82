"""`evaluation`: when validation rows are scored, how answers are generated, which checkpoint becomes the artifact, and
which scores the tuned model must reach."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ATOMIC, ApiModel, DecimalString, cel
from finetune_core.api.dataset import TemplateText, template_rules
from finetune_core.task_declaration import MEASURED, SCORE_NAME_LENGTH

BestBy = Literal["Perplexity", "TaskScore"]
"""The score by which checkpoints are compared: the validation perplexity, or the main score of `dataset.task`."""
ArtifactFrom = Literal["Best", "Last"]
"""The checkpoint that is exported as the artifact: the best one or the last one."""
ScoredRows = Literal["Validation", "Test"]
"""Which rows the base model and the tuned model are scored on: those of `dataset.validation` or those of
`dataset.test`."""

LOWER_IS_BETTER = MEASURED
"""Names of the two perplexities, which base model and tuned model are scored with even where the job has no task. For a
perplexity a lower value is better. For a score of a task a higher value is better."""
REQUIREMENT_LIMIT = 8
"""Largest number of requirements of `evaluation.require`."""
SignedDecimalString = Annotated[str, Field(max_length=32, pattern=r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$")]
"""A decimal number, for example `"0.8"` or `"-1.5"`, as a string."""


class GenerationSpec(ApiModel):
    """Limits of the answers that are generated for `dataset.task`."""

    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 256
    """Longest generated answer in tokens."""
    max_examples: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Largest number of rows of `dataset.validation`, and of `dataset.test`, for which answers are generated. The first
    rows are taken. Absent: all rows."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    """Number of answers that one process generates at once."""


class RequirementSpec(ApiModel):
    """A score that the tuned model must reach. All bounds that are set must hold."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "has(self.atLeast) || has(self.atMost) || has(self.betterThanBase) && self.betterThanBase",
                "`atLeast`, `atMost` or `betterThanBase: true` must be set",
            ),
        )
    )

    score: Annotated[str, Field(min_length=1, max_length=SCORE_NAME_LENGTH)]
    """Name of the score: perplexity, allTokenPerplexity, or a score of `dataset.task`, such as exact."""
    at_least: SignedDecimalString | None = None
    """Lowest value that passes, for example `"0.8"`."""
    at_most: SignedDecimalString | None = None
    """Highest value that passes."""
    better_than_base: bool | None = None
    """true: the tuned model must be better than the base model. For a perplexity, better means lower. For a score of
    the task, better means higher. An equal score is not better."""

    def out_of_reach(self, *, is_share: bool) -> tuple[str, str] | None:
        """Return the name of a field whose bound no model can reach, and a phrase that says what the field must be.
        Where `atLeast` is greater than `atMost`, no model can reach both bounds, and the field is `atLeast`. Return
        None where no such field is found. ``is_share`` says whether the score is a share, from 0 to 1."""
        least = None if self.at_least is None else Decimal(self.at_least)
        most = None if self.at_most is None else Decimal(self.at_most)
        if least is not None and most is not None and least > most:
            return "atLeast", f"must be at most `atMost`, which is {self.at_most}"
        if is_share and least is not None and least > 1:
            return "atLeast", f"must be at most 1: {self.score} is a share, of which 1 means all answers"
        if is_share and most is not None and most < 0:
            return "atMost", f"must be at least 0: {self.score} is a share"
        if self.score in LOWER_IS_BETTER and most is not None and most < 1:
            return "atMost", "must be at least 1, the least perplexity that a model can have"
        return None


class EvaluationSpec(ApiModel):
    """When the validation rows are scored, how answers are generated, which checkpoint becomes the artifact, and which
    scores the tuned model must reach."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "!has(self.minDelta) || has(self.patience)",
                "`minDelta` must be absent unless `patience` is set",
            ),
            *template_rules("basePrompt", "prompt", optional=True),
        )
    )

    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Optimizer steps between two evaluations. Absent: the number of steps in one epoch. The last step of the training
    is always evaluated too."""
    generation: GenerationSpec | None = None
    """Limits of generated answers. Only with a `dataset.task`."""
    base_prompt: TemplateText | None = None
    """Template of the prompts for the base model, written like `dataset.format.promptCompletion.template`. Useful where
    the base model needs an instruction that the tuned model has learned. Absent: base model and tuned model get the
    same prompts."""
    best_by: BestBy = "Perplexity"
    """Score that makes a checkpoint the best: the lowest validation perplexity, or the highest main score of
    `dataset.task`."""
    patience: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Training stops after this many evaluations in a row without an improvement. Absent: training runs to its last
    step."""
    min_delta: DecimalString | None = None
    """An evaluation counts as an improvement only where its score is better than the best score so far by more than
    this value. Absent: 0, so every better score counts."""
    artifact_from: ArtifactFrom | None = None
    """Checkpoint that is exported: the best by `bestBy`, or the last. Absent: Best with `dataset.validation`, Last
    without."""
    require: Annotated[list[RequirementSpec], Field(max_length=REQUIREMENT_LIMIT, json_schema_extra=ATOMIC)] | None = (
        None
    )
    """Scores that the tuned model must reach on the test rows, or on the validation rows where there are no test rows.
    Where the tuned model does not reach one of these scores, the job ends with `Succeeded=False` and the reason
    GateFailed. The artifact is committed all the same."""
