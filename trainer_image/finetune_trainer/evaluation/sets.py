"""The rows that base and tuned model are scored with: those of `dataset.test`, else of `dataset.validation`.

The base model reads them with its own tokenizer, without the job's added tokens, and in `evaluation.basePrompt` where
there is one. Prepared on disk by the first rank of a node, like all rows.
"""

from __future__ import annotations

from typing import Literal

from finetune_core.api.dataset import DatasetFormat, DatasetSpec
from finetune_core.contract import RunConfig
from finetune_trainer.data.dataset import LengthLimit, make_examples
from finetune_trainer.data.examples import ExampleSet
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import load_tokenizer, stop_ids, tokenize_functions
from finetune_trainer.evaluation.scorer import Questions
from finetune_trainer.model.structure import read_structure
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.preparation import TrainingData
from finetune_trainer.sources.inputs import source_name

BASE_FOLDER = "base-questions"
UNLIMITED = 1 << 30


def _rows(config: RunConfig) -> Literal["Validation", "Test"] | None:
    if config.dataset.test is not None:
        return "Test"
    return "Validation" if config.dataset.validation is not None else None


def base_format(dataset: DatasetSpec, base_prompt: str | None) -> DatasetFormat:
    """Return the format that the base model is asked in: with a prompt of its own, nothing that it was never taught
    follows the answer, such as the suffix of a completion."""
    form = dataset.format.prompt_completion
    if base_prompt is None or form is None:
        return dataset.format
    asked = form.model_copy(update={"template": base_prompt, "completion_suffix": ""})
    return dataset.format.model_copy(update={"prompt_completion": asked})


def _base_differs(config: RunConfig) -> bool:
    return bool(config.model.added_tokens) or config.evaluation.base_prompt is not None


def prepare_questions(plan: WorkerPlan) -> list[str]:
    """Write the rows as the base model reads them, where that is another way than the tuned model's; return notices."""
    config, rows = plan.config, _rows(plan.config)
    source = config.dataset.test if rows == "Test" else config.dataset.validation
    path = plan.inputs.test if rows == "Test" else plan.inputs.validation
    if rows is None or source is None or path is None or not _base_differs(config):
        return []
    context = read_structure(plan.inputs.model).context
    # A prompt of its own may be longer than dataset.maxLength, for example with examples in it.
    limit = LengthLimit(context, f"the model's context of {context}") if context else LengthLimit(UNLIMITED, "anything")
    form = base_format(config.dataset, config.evaluation.base_prompt)
    examples, notices = make_examples(
        read_rows(path, "evaluation.basePrompt"),
        source_name(source),
        "evaluation.basePrompt",
        config.dataset.model_copy(update={"format": form, "long_rows": "Skip", "bad_rows": "Skip"}),
        tokenize_functions(load_tokenizer(plan.inputs.model)),
        limit=limit,
        keep_rows=config.dataset.task != "None",
    )
    examples.save(plan.folder / "tokens" / BASE_FOLDER)
    return notices


def _suffix(form: DatasetFormat) -> str:
    return form.prompt_completion.completion_suffix if form.prompt_completion is not None else ""


def _one_line(config: RunConfig, examples: ExampleSet) -> bool:
    """Return whether no right answer has more than one line."""
    form = config.dataset.format.prompt_completion
    return form is not None and not any("\n" in str(row.fields.get(form.completion_field)) for row in examples.rows)


def tuned_questions(plan: WorkerPlan, data: TrainingData) -> Questions | None:
    """Return the rows as the tuned model reads them, None where there are none."""
    rows = _rows(plan.config)
    return _asked(plan, data, rows) if rows is not None else None


def validation_questions(plan: WorkerPlan, data: TrainingData) -> Questions | None:
    """Return the validation rows as the tuned model reads them: what checkpoints are chosen by."""
    return _asked(plan, data, "Validation") if plan.config.dataset.validation is not None else None


def _asked(plan: WorkerPlan, data: TrainingData, rows: Literal["Validation", "Test"]) -> Questions:
    examples = data.test if rows == "Test" else data.validation
    return Questions(rows, examples, data.tokenizer, data.stop_ids, _suffix(plan.config.dataset.format))


def base_questions(plan: WorkerPlan, data: TrainingData) -> Questions | None:
    """Return the rows as the base model reads them, None where there are none."""
    tuned, config = tuned_questions(plan, data), plan.config
    if tuned is None:
        return None
    one_line = _one_line(config, tuned.examples)
    if not _base_differs(config):
        return Questions(tuned.rows, tuned.examples, tuned.tokenizer, tuned.stop_ids, tuned.suffix, one_line=one_line)
    tokenizer = load_tokenizer(plan.inputs.model)
    form = base_format(config.dataset, config.evaluation.base_prompt)
    return Questions(
        tuned.rows,
        ExampleSet.load(plan.folder / "tokens" / BASE_FOLDER),
        tokenizer,
        stop_ids(tokenizer, form),
        _suffix(form),
        unknown_ids=[data.tokenizer.convert_tokens_to_ids(token) for token in config.model.added_tokens],
        one_line=one_line,
    )
