"""`dataset`: the sources of the rows, how a row becomes an example, and the task that grades generated answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ENTRIES, ApiModel, cel, exactly_one_of
from finetune_core.api.sources import DataSource
from finetune_core.tasks import NO_TASK, TaskName, task_field_text

FieldName = Annotated[str, Field(min_length=1, max_length=128)]
"""Name of a column in the data files."""


class PromptCompletionFormat(ApiModel):
    """Rows with a prompt and its completion. Only the completion (and the end token) is learned."""

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
    """Text before the completion, in which `{prompt}` stands for the row's prompt, for example `"Question: {prompt}
    Answer: "`. The completion follows without a space in between."""
    completion_suffix: Annotated[str, Field(max_length=256)] = ""
    """Text after the completion, for example `<END_A>`. The model learns the suffix like the completion, and generated
    answers end at the suffix."""


class ChatTemplate(ApiModel):
    """A chat template in Jinja that replaces the one of the model. Exactly one of the fields must be set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("file", "text"))

    file: (
        Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_][-A-Za-z0-9_.]*\.jinja$")] | None
    ) = None
    """Name of a file in the model's folder, for example `chat_template_tools.jinja`."""
    text: Annotated[str, Field(min_length=1, max_length=65536)] | None = None
    """The template itself."""


class MessagesFormat(ApiModel):
    """Rows with a conversation, rendered with a chat template. Each answer of the assistant is learned behind exactly
    the tokens that the model gets before such an answer at inference. A conversation becomes one example where the
    template only appends messages, and one for each answer where the template changes earlier messages, for example by
    removing their thoughts. docs/data.md lists the fields of rows and messages."""

    messages_field: FieldName = "messages"
    """Column that holds the list of messages, each with `role` and `content`, or with `from` and `value`."""
    tools_field: FieldName = "tools"
    """Column that holds the list of tools that the assistant may call, as JSON Schema. Rows without it have none."""
    chat_template: ChatTemplate | None = None
    """Replaces the chat template of the model, and becomes the template of the artifact. Without it the model's own
    template is used."""
    template_arguments: Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=16), ENTRIES] = {}
    """Variables that the chat template reads, for example `enable_thinking: "false"`. A value that is JSON is passed as
    that JSON value, and any other value as text. Pass the same arguments at inference. A name that the template does
    not read is refused."""
    learn: Literal["AllAssistant", "LastAssistant", "Everything"] = "AllAssistant"
    """What is learned of a conversation. AllAssistant: every message of the assistant. LastAssistant: only the last
    one. Everything: all tokens of the conversation. Messages with `weight: 0` are never learned."""
    roles: Annotated[dict[str, Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=16), ENTRIES] = {
        "human": "user",
        "gpt": "assistant",
    }
    """For names of roles in the rows, the role of the chat template that they stand for. A name that is not listed is
    passed to the template as it is. The default is for the rows of ShareGPT."""


class TextFormat(ApiModel):
    """Rows of plain text. Every token is learned."""

    text_field: FieldName = "text"
    """Column that holds the text."""


class DatasetFormat(ApiModel):
    """How a row becomes a training example. Exactly one of the fields must be set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("promptCompletion", "messages", "text"))

    prompt_completion: PromptCompletionFormat | None = None
    """Rows with a prompt and its completion."""
    messages: MessagesFormat | None = None
    """Rows with a conversation."""
    text: TextFormat | None = None
    """Rows of plain text."""


class DatasetSpec(ApiModel):
    """The training, validation and test rows, and how a row becomes an example."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.task == 'None' || has(self.format.promptCompletion)",
                "`task` must be None unless `format.promptCompletion` is set",
            ),
        )
    )

    train: DataSource
    """Rows that the model is trained on."""
    validation: DataSource | None = None
    """Rows whose perplexity is measured during training. The scores on these rows choose the best checkpoint."""
    test: DataSource | None = None
    """Rows that the base model is scored on before training, and the tuned model at the end. These rows never influence
    which checkpoint is chosen."""
    format: DatasetFormat
    """How a row becomes a training example."""
    task: Annotated[TaskName, Field(description=task_field_text())] = NO_TASK
    max_length: Annotated[int, Field(ge=8, le=131072)] = 512
    """Longest example in tokens, prompt and completion together."""
    packing: bool = False
    """true puts several short examples of a global batch into one sequence of at most `maxLength` tokens, which saves
    padding. The computed gradient stays the same. Before the first step the trainer checks that the model's attention
    keeps the examples of one sequence apart, and the job fails where it does not."""
    long_rows: Literal["Fail", "Skip"] = "Fail"
    """What happens to rows with more tokens than `maxLength`, or more than the model can read. Fail: the job fails
    before training. Skip: the rows are left out, and `status.notices` has their number."""
    bad_rows: Literal["Fail", "Skip"] = "Fail"
    """What happens to rows that can't be read, lack a field, hold something else than the format asks for, or have
    nothing to learn, such as an empty completion. Fail: the job fails before training. Skip: the rows are left out, and
    `status.notices` has their number."""
