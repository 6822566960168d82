"""The examples: where their rows lie, how a row becomes an example, and what grades an answer: `dataset`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ApiModel, cel, exactly_one_of
from finetune_core.api.sources import DataSource
from finetune_core.tasks import NO_TASK, TaskName, task_field_text

FieldName = Annotated[str, Field(min_length=1, max_length=128)]


class PromptCompletionFormat(ApiModel):
    """Rows with a prompt and its completion; only the completion (and the end token) is learned."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self.template.contains('{prompt}')", "`template` must contain `{prompt}`, the place of the prompt"),
            ("self.promptField != self.completionField", "`promptField` and `completionField` must differ"),
        )
    )

    prompt_field: FieldName = "prompt"
    """Column that holds the prompt."""
    completion_field: FieldName = "completion"
    """Column that holds the completion."""
    template: Annotated[str, Field(max_length=8192)] = "{prompt}"
    """Text before the completion; `{prompt}` stands for the prompt. The completion follows at once."""
    completion_suffix: Annotated[str, Field(max_length=256)] = ""
    """Text after the completion, such as `<END_A>`: learned like the completion, and generation stops there."""


class MessagesFormat(ApiModel):
    """Rows with a conversation, rendered with the model's chat template; only the assistant's turns are learned."""

    messages_field: FieldName = "messages"
    """Column that holds the list of messages, each with `role` and `content`."""


class TextFormat(ApiModel):
    """Rows of plain text; every token is learned."""

    text_field: FieldName = "text"
    """Column that holds the text."""


class DatasetFormat(ApiModel):
    """How a row becomes an example: exactly one of the members is set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("promptCompletion", "messages", "text"))

    prompt_completion: PromptCompletionFormat | None = None
    """Rows with a prompt and its completion."""
    messages: MessagesFormat | None = None
    """Rows with a conversation."""
    text: TextFormat | None = None
    """Rows of plain text."""


class DatasetSpec(ApiModel):
    """The examples to learn from, those to validate with, and those to test with."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.task == 'None' || has(self.format.promptCompletion)",
                "`task` must be None unless `format.promptCompletion` is set",
            ),
        )
    )

    train: DataSource
    """Rows to train on."""
    validation: DataSource | None = None
    """Rows for validation perplexity; they choose the best checkpoint."""
    test: DataSource | None = None
    """Rows that base model and tuned model are scored with at the end; nothing is chosen by them."""
    format: DatasetFormat
    """How a row becomes an example."""
    task: Annotated[TaskName, Field(description=task_field_text())] = NO_TASK
    max_length: Annotated[int, Field(ge=8, le=131072)] = 512
    """Longest example in tokens, prompt and completion together."""
    packing: bool = False
    """Put several short examples of a global batch into one sequence of at most `maxLength` tokens. The optimisation
    stays the same, padding is saved. Refused at the start where the model's attention does not keep them apart."""
    long_rows: Literal["Fail", "Skip"] = "Fail"
    """What happens to rows longer than `maxLength`: the job fails before training, or they are counted and skipped."""
    bad_rows: Literal["Fail", "Skip"] = "Fail"
    """What happens to rows without a field or with an empty completion: the job fails, or they are counted and
    skipped."""
