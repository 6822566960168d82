"""Renders a data row as examples, in the format that `dataset.format` names: prompt and completion, chat messages, or
plain text. `dataset.py` calls `renderer`.

Most rows become one example. A conversation becomes several where the chat template changes earlier messages. For a row
that can't be rendered, the result is a phrase with the reason instead of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from finetune_core.api.dataset import DatasetFormat, MessagesFormat
from finetune_core.errors import UserError
from finetune_core.row_templates import RowError
from finetune_trainer.data.chat.chat_template import ChatTemplate
from finetune_trainer.data.chat.conversations import ShownKinds, conversation_renderer
from finetune_trainer.data.chat.messages import optional_columns
from finetune_trainer.data.examples import Example
from finetune_trainer.data.files.row import NamedColumn
from finetune_trainer.data.piece_tokens import PieceTokenizer
from finetune_trainer.data.prompts import prompt_columns, render_prompt_completion, render_text

TOOLS_FIELD = MessagesFormat.model_fields["tools_field"].default
"""The column with the tools in jobs that do not set `toolsField`."""


class TokenizeFunctions(NamedTuple):
    """The functions that turn text into token ids, and the id of the end token. `tokenizer.py` makes them from a
    tokenizer."""

    pieces: PieceTokenizer
    """Tokenizes the pieces of rendered templates."""
    end: int
    """Id of the end token (EOS). Every rendered completion and every rendered plain text ends with it. In a
    conversation it ends an answer only where the chat template writes it, or where the template ends the answer with no
    token."""
    chat: ChatTemplate | None = None
    """Renders conversations. None if the tokenizer has no chat template."""


Render = Callable[[Mapping[str, Any]], Sequence[Example] | str]
"""A function that turns the columns of a row into its examples, at least one. For a bad row it returns a phrase that
says what is wrong.
"""


def required_columns(form: DatasetFormat) -> Sequence[NamedColumn]:
    """Return the columns that a data file of the format must have. Raises UserError if a template of the format is
    malformed."""
    if form.prompt_completion is not None:
        return prompt_columns(form.prompt_completion)
    if form.messages is not None:
        return [NamedColumn("dataset.format.messages.messagesField", form.messages.messages_field)]
    if form.text is not None:
        return [NamedColumn("dataset.format.text.textField", form.text.text_field)]
    raise UserError("dataset.format", "must be one of promptCompletion, messages, text")


def tools_column(form: DatasetFormat, field: str) -> list[NamedColumn]:
    """Return the column that `toolsField` names, if at least one row of the source ``field`` must have it. Otherwise
    return no column. ``field`` is the path of the source in the spec.

    The column is needed only if the job names another column than the default, and only in `dataset.train`, because a
    misspelled name would make all tools vanish. Of the sources of a mix, one must have the column, which
    `check_tools_of_mix` checks. The validation rows and the test rows may be without tools.
    """
    if form.messages is None or form.messages.tools_field == TOOLS_FIELD or field != "dataset.train":
        return []
    return [NamedColumn("dataset.format.messages.toolsField", form.messages.tools_field)]


def format_columns(form: DatasetFormat) -> list[str]:
    """Return all columns that a format reads, including the columns that a data file need not have."""
    found = [column.name for column in required_columns(form)]
    return [*found, *optional_columns(form.messages)] if form.messages is not None else found


def renderer(
    form: DatasetFormat,
    tokenize: TokenizeFunctions,
    most_tokens: int | None = None,
    shown: ShownKinds | None = None,
) -> Render:
    """Return the function that renders rows in the format ``form``. Of a row with an example of more than
    ``most_tokens`` tokens, other examples may be left out. For ``shown`` see `conversation_renderer`. Raises UserError
    if a template of `promptCompletion` is malformed, or if the format is chat messages and the tokenizer has no chat
    template."""
    if form.prompt_completion is not None:
        return _one_example(render_prompt_completion(form.prompt_completion, tokenize.pieces))
    if form.messages is not None:
        if tokenize.chat is None:
            raise UserError(
                "dataset.format.messages",
                "the model's tokenizer has no chat template; name one in chatTemplate, take a model that has one, or"
                " use promptCompletion",
            )
        return conversation_renderer(form.messages, tokenize.chat, tokenize.end, most_tokens, shown)
    if form.text is not None:
        return _one_example(render_text(form.text, tokenize.pieces))
    raise UserError("dataset.format", "must be one of promptCompletion, messages, text")


def _one_example(make: Callable[[Mapping[str, Any]], Example]) -> Render:
    """Return the function that renders a row as the one example that ``make`` makes of it."""

    def render(fields: Mapping[str, Any]) -> Sequence[Example] | str:
        try:
            return [make(fields)]
        except RowError as error:
            return str(error)

    return render
