"""When validation rows are scored, how answers are generated, and which checkpoint becomes the artifact:
`evaluation`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ApiModel, DecimalString, cel

BestBy = Literal["Perplexity", "TaskScore"]
ArtifactFrom = Literal["Best", "Last"]
ScoredRows = Literal["Validation", "Test"]
"""SHORT"""


class GenerationSpec(ApiModel):
    """Limits of the answers that are generated for `dataset.task`."""

    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 256
    """Longest answer in tokens."""
    max_examples: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Rows that are answered; absent: all."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    """Answers that one process generates at once."""


class EvaluationSpec(ApiModel):
    """When the validation rows are scored, and which checkpoint becomes the artifact."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "!has(self.minDelta) || has(self.patience)",
                "`minDelta` must be absent unless `patience` is set",
            ),
            (
                "!has(self.basePrompt) || self.basePrompt.contains('{prompt}')",
                "`basePrompt` must contain `{prompt}`, the place of the prompt",
            ),
        )
    )

    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Steps between evaluations; default: at the end of each epoch, and at the end."""
    generation: GenerationSpec | None = None
    """Limits of generated answers; only with a `dataset.task`."""
    base_prompt: Annotated[str, Field(max_length=8192)] | None = None
    """Template that the base model is asked with for its score; `{prompt}` stands for the prompt. Default:
    `dataset.format`'s."""
    best_by: BestBy = "Perplexity"
    """What makes a checkpoint the best: least validation perplexity, or the highest score of `dataset.task`."""
    patience: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Stop after this many evaluations without an improvement; absent: train to the end."""
    min_delta: DecimalString | None = None
    """Smallest change that counts as an improvement; default 0."""
    artifact_from: ArtifactFrom | None = None
    """The checkpoint to export: the best, or the last; default Best with `dataset.validation`, else Last."""
