"""The evaluation sets: the rows of `dataset.test`, or of `dataset.validation` if there is no test file. Base model and
tuned model may read these rows in different forms.

The base model reads them with its own tokenizer, without the job's added tokens, and in the template of
`evaluation.basePrompt` if the job has one. On each node the first rank writes the rows in this form to the disk
(`train.py` calls `prepare_base_model_set`). Then every rank loads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_core.api.dataset import DatasetFormat, DatasetSpec
from finetune_core.api.evaluation import ScoredRows
from finetune_core.contract import RunConfig
from finetune_core.tasks import NO_TASK
from finetune_trainer.data.dataset import LengthLimit, make_examples
from finetune_trainer.data.examples import ExampleSet
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import load_tokenizer, stop_ids, tokenize_functions
from finetune_trainer.model.structure import read_structure
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.preparation import TrainingData
from finetune_trainer.sources.inputs import source_name

BASE_MODEL_SET_FOLDER = "base-model-set"
UNLIMITED = 1 << 30


@dataclass(frozen=True)
class EvaluationSet:
    """An evaluation set, in the form that the base model or the tuned model reads."""

    rows: ScoredRows
    examples: ExampleSet
    tokenizer: Any
    stop_ids: Sequence[int]
    """Ids of the tokens that end an answer."""
    suffix: str
    """Text at which an answer ends. It does not belong to the answer, and may be empty."""
    added_ids: Sequence[int] = ()
    """Ids of `model.addedTokens` in the base model's set, because the base model is scored without these tokens. Empty
    in the tuned model's set."""
    one_line: bool = False
    """Whether only the first line of an answer counts. A base model often goes on with another example behind its
    answer."""


def _scored_rows(config: RunConfig) -> ScoredRows | None:
    """Return which rows base model and tuned model are scored on: test rows, else validation rows, else None."""
    if config.dataset.test is not None:
        return "Test"
    return "Validation" if config.dataset.validation is not None else None


def base_format(dataset: DatasetSpec, base_prompt: str | None) -> DatasetFormat:
    """Return the format in which the base model reads rows.

    With `evaluation.basePrompt` an answer has no suffix, because the base model never learned `completionSuffix`.
    """
    form = dataset.format.prompt_completion
    if base_prompt is None or form is None:
        return dataset.format
    asked = form.model_copy(update={"template": base_prompt, "completion_suffix": ""})
    return dataset.format.model_copy(update={"prompt_completion": asked})


def _base_differs(config: RunConfig) -> bool:
    """Return whether the base model reads the rows in another form than the tuned model."""
    return bool(config.model.added_tokens) or config.evaluation.base_prompt is not None


def prepare_base_model_set(plan: WorkerPlan) -> list[str]:
    """Save the rows in the form that the base model reads. Nothing is saved if the tuned model reads them in the same
    form.

    Return a notice for each kind of row that was left out (bad rows and long rows).
    """
    config, rows = plan.config, _scored_rows(plan.config)
    source = config.dataset.test if rows == "Test" else config.dataset.validation
    path = plan.inputs.test if rows == "Test" else plan.inputs.validation
    if rows is None or source is None or path is None or not _base_differs(config):
        return []
    context = read_structure(plan.inputs.model).context
    # `dataset.maxLength` does not apply, because `evaluation.basePrompt` may be long. For example, it may hold solved
    # examples.
    limit = LengthLimit(context, f"the model's context of {context}") if context else LengthLimit(UNLIMITED, "anything")
    form = base_format(config.dataset, config.evaluation.base_prompt)
    examples, notices = make_examples(
        read_rows(path, "evaluation.basePrompt"),
        source_name(source),
        "evaluation.basePrompt",
        config.dataset.model_copy(update={"format": form, "long_rows": "Skip", "bad_rows": "Skip"}),
        tokenize_functions(load_tokenizer(plan.inputs.model)),
        limit=limit,
        keep_rows=config.dataset.task != NO_TASK,
    )
    examples.save(plan.folder / "tokens" / BASE_MODEL_SET_FOLDER)
    return notices


def _suffix(form: DatasetFormat) -> str:
    return form.prompt_completion.completion_suffix if form.prompt_completion is not None else ""


def _has_one_line_references(config: RunConfig, examples: ExampleSet) -> bool:
    """Return whether every completion of the evaluation set is a single line; False without
    `format.promptCompletion`."""
    form = config.dataset.format.prompt_completion
    return form is not None and not any("\n" in str(row.fields.get(form.completion_field)) for row in examples.rows)


def tuned_model_set(plan: WorkerPlan, data: TrainingData) -> EvaluationSet | None:
    """Return the evaluation set as the tuned model reads it, or None if the job has neither test nor validation
    rows."""
    rows = _scored_rows(plan.config)
    return _trained_form(plan, data, rows) if rows is not None else None


def validation_set(plan: WorkerPlan, data: TrainingData) -> EvaluationSet | None:
    """Return the validation rows as the tuned model reads them, or None if the job has none.

    The best checkpoint is chosen by the scores on these rows.
    """
    return _trained_form(plan, data, "Validation") if plan.config.dataset.validation is not None else None


def _trained_form(plan: WorkerPlan, data: TrainingData, rows: ScoredRows) -> EvaluationSet:
    examples = data.test if rows == "Test" else data.validation
    return EvaluationSet(rows, examples, data.tokenizer, data.stop_ids, _suffix(plan.config.dataset.format))


def base_model_set(plan: WorkerPlan, data: TrainingData) -> EvaluationSet | None:
    """Return the evaluation set as the base model reads it, or None if the job has neither test nor validation rows."""
    tuned, config = tuned_model_set(plan, data), plan.config
    if tuned is None:
        return None
    one_line = _has_one_line_references(config, tuned.examples)
    if not _base_differs(config):
        return replace(tuned, one_line=one_line)
    tokenizer = load_tokenizer(plan.inputs.model)
    form = base_format(config.dataset, config.evaluation.base_prompt)
    return EvaluationSet(
        tuned.rows,
        ExampleSet.load(plan.folder / "tokens" / BASE_MODEL_SET_FOLDER),
        tokenizer,
        stop_ids(tokenizer, form),
        _suffix(form),
        added_ids=[data.tokenizer.convert_tokens_to_ids(token) for token in config.model.added_tokens],
        one_line=one_line,
    )
