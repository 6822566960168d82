"""The evaluation sets. Base model and tuned model are scored on the rows of `dataset.test`, or of `dataset.validation`
if there are no test rows. During the training, checkpoints are scored on the validation rows, to choose the best one.

The base model reads the rows with its own tokenizer, without the job's added tokens, and in the template of
`evaluation.basePrompt` if the job has one. If this form differs from that of the tuned model, the first rank of each
node writes the rows in this form to the disk (`train.py` calls `prepare_base_model_set`), and every rank loads them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_core.api.dataset import DatasetFormat, DatasetSpec
from finetune_core.api.evaluation import ScoredRows
from finetune_core.contract import RunConfig
from finetune_trainer.data.chat.chat_template import use_chat_template
from finetune_trainer.data.dataset import LengthLimit, columns_read, length_limit, make_examples, used_rows
from finetune_trainer.data.examples import ExampleSet
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import (
    generation_stop_ids,
    load_tokenizer,
    model_stop_ids,
    stop_ids,
    tokenize_functions,
)
from finetune_trainer.evaluation.gradable import asked_rows
from finetune_trainer.model.base_check import JobBase
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.preparation import TrainingData, job_tokenize_functions
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
    answered: int
    """If the job has a task, answers to this many of the first examples are generated. The base model answers the rows
    that the tuned model answers, so that the scores of both models can be compared."""
    added_ids: Sequence[int] = ()
    """Ids of `model.addedTokens` in the base model's set, because the base model is scored without these tokens. Empty
    in the tuned model's set."""
    one_line: bool = False
    """Whether only the first line of an answer counts, because the task says that right answers are one line. A base
    model often goes on with another example behind its answer. False in the tuned model's set."""


def _scored_rows(config: RunConfig) -> ScoredRows | None:
    """Return which rows base model and tuned model are scored on: test rows, else validation rows, else None."""
    if config.dataset.test is not None:
        return "Test"
    return "Validation" if config.dataset.validation is not None else None


def base_format(dataset: DatasetSpec, base_prompt: str | None) -> DatasetFormat:
    """Return the format in which the base model reads rows.

    Without ``base_prompt`` (`evaluation.basePrompt`), this is the format of the tuned model. Otherwise ``base_prompt``
    is the template of the prompts, and an answer has no suffix, because the base model never learned
    `completionSuffix`.
    """
    form = dataset.format.prompt_completion
    if base_prompt is None or form is None:
        return dataset.format
    asked = form.model_copy(update={"template": base_prompt, "completion_suffix": ""})
    return dataset.format.model_copy(update={"prompt_completion": asked})


def _base_differs(config: RunConfig) -> bool:
    """Return whether the base model reads the rows in another form than the tuned model."""
    return bool(config.model.added_tokens) or config.evaluation.base_prompt is not None


def prepare_base_model_set(plan: WorkerPlan, graded: Collection[str]) -> list[str]:
    """Save the rows in the form that the base model reads. Nothing is saved if the tuned model reads them in the same
    form. ``graded`` are all columns that the job's grader reads.

    Only rows on which the tuned model is scored are saved, because the scores of both models are compared. Return
    notices about the rows, for example about rows that are too long for the base model and were left out.
    """
    config, rows = plan.config, _scored_rows(plan.config)
    source = config.dataset.test if rows == "Test" else config.dataset.validation
    path = plan.inputs.test if rows == "Test" else plan.inputs.validation
    if rows is None or source is None or path is None or not _base_differs(config):
        return []
    base = JobBase(plan.inputs.model, config)
    context, base_rows = base.structure.context, base.structure.rows
    scored, trained_limit = f"dataset.{rows.lower()}", length_limit(config.dataset, context, base.rows)
    field = scored if config.evaluation.base_prompt is None else "evaluation.basePrompt"
    form = base_format(config.dataset, config.evaluation.base_prompt)
    tokenizer = load_tokenizer(plan.inputs.model)
    use_chat_template(tokenizer, form, plan.inputs.model)
    ends = stop_ids(tokenizer, form, model_stop_ids(plan.inputs.model))
    dataset = config.dataset.model_copy(update={"format": form, "bad_rows": "Skip"})
    limit = trained_limit
    if dataset.long_rows in ("Fail", "Skip"):
        # `dataset.maxLength` does not limit these rows. `evaluation.basePrompt` may make them longer, for example
        # because it has solved examples, and the base model reads an added token as several tokens.
        limit = (
            LengthLimit(context, f"the model's context of {context}", base_rows)
            if context
            else LengthLimit(UNLIMITED, "anything", base_rows)
        )
        dataset = dataset.model_copy(update={"long_rows": "Skip"})
    columns = columns_read(config.dataset, scored, config.evaluation.base_prompt, graded)
    examples, notices = make_examples(
        used_rows(
            read_rows(path, field, columns=columns), config.dataset, job_tokenize_functions(plan), limit=trained_limit
        ),
        source_name(source),
        field,
        dataset,
        tokenize_functions(tokenizer, ends=ends, today=config.template_date),
        limit=limit,
        keep_rows=config.dataset.task is not None,
    )
    examples.save(plan.folder / "tokens" / BASE_MODEL_SET_FOLDER)
    # There are other notices about the same rows in the form that the tuned model reads. So the notices here say that
    # they are about the form that the base model reads.
    return [notice.replace(f"{scored}: ", f"{scored}, as the base model reads it: ", 1) for notice in notices]


def _suffix(form: DatasetFormat) -> str:
    return form.prompt_completion.completion_suffix if form.prompt_completion is not None else ""


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
    return EvaluationSet(
        rows,
        examples,
        data.tokenizer,
        data.stop_ids,
        _suffix(plan.config.dataset.format),
        answered=len(asked_rows(plan.config.evaluation, range(len(examples)))),
    )


def base_model_set(plan: WorkerPlan, data: TrainingData, *, one_line: bool) -> EvaluationSet | None:
    """Return the evaluation set as the base model reads it, or None if the job has neither test nor validation rows.

    ``one_line`` says whether right answers of the job's task are one line.
    """
    tuned, config = tuned_model_set(plan, data), plan.config
    if tuned is None:
        return None
    if not _base_differs(config):
        return replace(tuned, one_line=one_line)
    tokenizer = load_tokenizer(plan.inputs.model)
    form = base_format(config.dataset, config.evaluation.base_prompt)
    use_chat_template(tokenizer, form, plan.inputs.model)
    examples = ExampleSet.load(plan.folder / "tokens" / BASE_MODEL_SET_FOLDER)
    places = {(row.file, row.number) for row in tuned.examples.rows[: tuned.answered]}
    return EvaluationSet(
        tuned.rows,
        examples,
        tokenizer,
        generation_stop_ids(tokenizer, form, model_stop_ids(plan.inputs.model)),
        _suffix(form),
        answered=sum((row.file, row.number) in places for row in examples.rows),
        added_ids=[data.tokenizer.convert_tokens_to_ids(token) for token in config.model.added_tokens],
        one_line=one_line,
    )
