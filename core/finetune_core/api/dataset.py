"""`dataset`: the sources of the rows, how a row becomes an example, and the task that grades generated answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ENTRIES, ApiModel, cel, exactly_one_of
from finetune_core.api.sources import DataSource, TrainingSource
from finetune_core.api.task import TaskSpec
from finetune_core.row_templates import SHOWS_A_COLUMN_PATTERN, WELL_FORMED_PATTERN

FieldName = Annotated[str, Field(min_length=1, max_length=128)]
"""Name of a column in the data files."""
TemplateText = Annotated[str, Field(max_length=8192)]
"""A template, in the language of `finetune_core.row_templates`."""


def template_rules(field: str, example: str, *, optional: bool = False) -> tuple[tuple[str, str], ...]:
    """Return the CEL rules about the field ``field``, which holds a template, each with its message. ``example`` is the
    name of a column that the messages show. ``optional`` says that the field may be absent."""
    absent = f"!has(self.{field}) || " if optional else ""
    return (
        (
            f"{absent}self.{field}.matches('{WELL_FORMED_PATTERN}')",
            f"`{field}` must name a column in each pair of braces, as in `{{{example}}}`, and hold a brace of the text"
            " twice (`{{` or `}}`)",
        ),
        (
            f"{absent}self.{field}.matches('{SHOWS_A_COLUMN_PATTERN}')",
            f"`{field}` must hold a column of the row, such as `{{{example}}}`; with doubled braces,"
            f" `{{{{{example}}}}}` is the text `{{{example}}}` and no column",
        ),
    )


class PromptCompletionFormat(ApiModel):
    """Rows with a prompt and its completion. Only the completion (and the end token) is learned."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            *template_rules("template", "prompt"),
            *template_rules("completion", "completion", optional=True),
            ("self.promptField != self.completionField", "`promptField` and `completionField` must differ"),
        )
    )

    prompt_field: FieldName = "prompt"
    """Column that `{prompt}` stands for."""
    completion_field: FieldName = "completion"
    """Column that `{completion}` stands for."""
    template: TemplateText = "{prompt}"
    """Text before the completion, in which `{name}` stands for the column `name` of the row: `"Question: {prompt}
    Answer:"` or `"{instruction}\\n{input}\\n"`. `{#name}...{/name}` is a part that is shown only where the column has
    a value, `{^name}...{/name}` is a part that is shown only where the column has none, and `{{` and `}}` are braces.
    No space is added between this text and the completion. A space belongs to the begin of the completion and not to
    the end of this text. docs/prompts.md has the rules."""
    completion: TemplateText | None = None
    """The completion, as a template like `template`, for example `"{reasoning}\\n#### {answer}"`. Absent: the value of
    the column `completionField`."""
    completion_suffix: Annotated[str, Field(max_length=256)] = ""
    """Text after the completion, for example `<END_A>`. The model learns the suffix like the completion, and generated
    answers end at the suffix."""
    allow_special_tokens: bool | None = None
    """How the text of a control token of the model, such as `</s>`, is read in a column. false or absent: as ordinary
    text, and `status.notices` has the number of rows with such a text. true: as the control token. In the templates and
    in `completionSuffix` such a text is always the control token. `model.addedTokens` are tokens everywhere."""

    @property
    def aliases(self) -> dict[str, str]:
        """For each of the names `prompt` and `completion`, the column that the name stands for in templates."""
        return {"prompt": self.prompt_field, "completion": self.completion_field}


class ChatTemplate(ApiModel):
    """A chat template in Jinja that replaces the one of the model. Exactly one of the fields must be set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("file", "text"))

    file: (
        Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_][-A-Za-z0-9_.]*\.jinja$")] | None
    ) = None
    """Name of a file in the model's folder, for example `chat_template_tools.jinja`."""
    text: Annotated[str, Field(min_length=1, max_length=65536)] | None = None
    """The template itself."""


KNOWN_ROLES = {"human": "user", "gpt": "assistant", "function": "tool"}
"""Names of roles in published rows, each with the role of the chat template that the name stands for, unless the job
lists the name in `roles`. Two more names, `observation` and `function_call`, are not listed here, because they are read
only in messages with `from`."""


class MessagesFormat(ApiModel):
    """Rows with a conversation, rendered with a chat template. An answer of the assistant is learned behind exactly the
    tokens that the model gets before such an answer at inference. A conversation becomes one example where the template
    only appends messages, and several examples where the template changes earlier messages, for example by removing
    their thoughts. With `learn: Everything` a conversation is always one example. docs/data.md lists the fields of rows
    and messages."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self.messagesField != self.toolsField", "`messagesField` and `toolsField` must differ"),
        )
    )

    messages_field: FieldName = "messages"
    """Column that holds the list of messages, each with `role` and `content`, or with `from` and `value`."""
    tools_field: FieldName = "tools"
    """Column that holds the list of tools that the assistant may call, as JSON Schema. A row without this column has no
    tools."""
    chat_template: ChatTemplate | None = None
    """Chat template that replaces the one of the model, and becomes the template of the artifact. Absent: the chat
    template of the model."""
    template_arguments: Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=16), ENTRIES] = {}
    """Variables that the chat template reads, for example `enable_thinking: "false"`. A text that is JSON is passed as
    the JSON value, and any other text as a string. Pass the same arguments at inference. A name that the template does
    not read is refused."""
    learn: Literal["AllAssistant", "LastAssistant", "Everything"] = "AllAssistant"
    """What is learned of a conversation. AllAssistant: every message of the assistant, except messages with
    `weight: 0`. LastAssistant: only the last message that AllAssistant would learn. Everything: all tokens of the
    conversation; a row that has a message with `weight: 0` is then a bad row."""
    roles: Annotated[dict[str, Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=16), ENTRIES] = {}
    """For each name of a role in the rows, the role of the chat template that the name stands for, for example `{bot:
    assistant}`. A name that is not listed is passed to the template as it is, except for the following names.
    `human` stands for `user`, `gpt` for `assistant`, and `function` for `tool`. In messages with `from` and `value`, as
    in rows of ShareGPT, `observation` stands for `tool`, and `function_call` for an answer that calls tools."""
    allow_special_tokens: bool | None = None
    """How the text of a control token of the model, such as `</s>`, is read in a message. false or absent: as ordinary
    text, and `status.notices` has the number of rows with such a text. true: as the control token. `model.addedTokens`
    are always tokens."""


class TextFormat(ApiModel):
    """Rows of plain text. Every token is learned."""

    text_field: FieldName = "text"
    """Column that holds the text."""
    allow_special_tokens: bool | None = None
    """How the text of a control token of the model, such as `</s>`, is read in a row. false or absent: as ordinary
    text, and `status.notices` has the number of rows with such a text. true: as the control token, which suits texts
    that a chat template has rendered already. `model.addedTokens` are always tokens."""


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
                "!has(self.task) || has(self.format.promptCompletion)",
                "`task` must be absent unless `format.promptCompletion` is set",
            ),
            (
                "!has(self.task) || has(self.validation) || has(self.test)",
                "`task` must be absent unless `validation` or `test` is set, because answers are graded on these rows",
            ),
            (
                "!(self.longRows in ['Split', 'Truncate']) || has(self.format.text)",
                "`longRows` must be Fail or Skip unless `format.text` is set, because only text has a meaning in part",
            ),
        )
    )

    train: TrainingSource
    """Rows that the model is trained on."""
    validation: DataSource | None = None
    """Rows whose perplexity is measured during training. The scores on these rows choose the best checkpoint."""
    test: DataSource | None = None
    """Rows that the base model is scored on before training, and the tuned model at the end. These rows never influence
    which checkpoint is chosen."""
    format: DatasetFormat
    """How a row becomes a training example."""
    task: TaskSpec | None = None
    """What grades generated answers, for example `{name: GSM8K}`. Base model and tuned model answer the rows of `test`,
    or of `validation` where there are no test rows. With `evaluation.bestBy: TaskScore` the checkpoints answer the rows
    of `validation` too. Absent: only perplexity is measured."""
    max_length: Annotated[int, Field(ge=8, le=131072)] = 512
    """Longest example in tokens, prompt and completion together."""
    packing: bool = False
    """true puts several short examples of a global batch into one sequence of at most `maxLength` tokens, which saves
    padding. The computed gradient stays the same. Before the first step the trainer checks that the model's attention
    keeps the examples of one sequence apart, and the job fails where the attention does not keep them apart."""
    long_rows: Literal["Fail", "Skip", "Split", "Truncate"] = "Fail"
    """What happens to rows with more tokens than `maxLength`, or more than the model can read. Fail: the job fails
    before training. Skip: the rows are left out. Split: a row becomes several examples, which together learn each of
    its tokens but the very first exactly once. Each further example begins with the last token of the example before,
    as context that is not learned again. Truncate: the tokens beyond the limit are left out, and so is the end token.
    Split and Truncate are for `format.text` only. `status.notices` has the number of rows, and of tokens that were left
    out."""
    bad_rows: Literal["Fail", "Skip"] = "Fail"
    """What happens to rows that can't be read, lack a field, hold something other than the format asks for, or have
    nothing to learn, such as an empty completion. Fail: the job fails before training. Skip: the rows are left out, and
    `status.notices` has their number."""

    @property
    def sources(self) -> dict[str, DataSource]:
        """Return the sources that hold files, by their paths in the spec, for example `dataset.test`. The path of the
        first source of a mix is `dataset.train.mix[0]`."""
        given = {"dataset.train": self.train, "dataset.validation": self.validation, "dataset.test": self.test}
        found: dict[str, DataSource] = {}
        for field, source in given.items():
            if isinstance(source, TrainingSource) and source.mix is not None:
                found |= {f"{field}.mix[{number}]": part for number, part in enumerate(source.mix)}
            elif source is not None:
                found[field] = source
        return found
