"""Renders a data row as examples, in the format that `dataset.format` names: prompt and completion, chat messages, or
plain text. `dataset.py` calls `renderer`.

Most rows become one example. A conversation becomes several where the chat template changes earlier messages. For a row
that can't be rendered, the result is a phrase with the reason instead of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from finetune_core.api.dataset import DatasetFormat, PromptCompletionFormat, TextFormat
from finetune_core.errors import UserError, valid_text
from finetune_trainer.data.chat.chat_template import ChatTemplate
from finetune_trainer.data.chat.conversations import conversation_renderer
from finetune_trainer.data.chat.messages import HALF_PAIR, optional_columns
from finetune_trainer.data.examples import Example


class TokenizeFunctions(NamedTuple):
    """The functions that turn text into token ids, and the id of the end token. `tokenizer.py` makes them from a
    tokenizer."""

    prompt: Callable[[str], Sequence[int]]
    """Tokenizes text that begins an example. Special tokens that the tokenizer puts in front, such as BOS, are
    included."""
    completion: Callable[[str], Sequence[int]]
    """Tokenizes text that follows other text in an example. No special tokens are added."""
    end: int
    """Id of the end token (EOS), with which every example ends."""
    chat: ChatTemplate | None = None
    """Renders conversations. None if the tokenizer has no chat template."""


Render = Callable[[Mapping[str, Any]], Sequence[Example] | str]
"""A function that turns the columns of a row into its examples, at least one. For a bad row it returns a phrase that
says what is wrong.
"""


def required_columns(form: DatasetFormat) -> Mapping[str, str]:
    """Return the names of the columns that a format reads. The keys are the fields of the spec that hold these names,
    for example `dataset.format.text.textField`."""
    if form.prompt_completion is not None:
        path = "dataset.format.promptCompletion"
        return {
            f"{path}.promptField": form.prompt_completion.prompt_field,
            f"{path}.completionField": form.prompt_completion.completion_field,
        }
    if form.messages is not None:
        return {"dataset.format.messages.messagesField": form.messages.messages_field}
    if form.text is not None:
        return {"dataset.format.text.textField": form.text.text_field}
    raise UserError("dataset.format", "must be one of promptCompletion, messages, text")


def columns_read(form: DatasetFormat) -> list[str]:
    """Return all columns that a format reads, also those that a data file need not have."""
    found = list(required_columns(form).values())
    return [*found, *optional_columns(form.messages)] if form.messages is not None else found


def renderer(form: DatasetFormat, tokenize: TokenizeFunctions) -> Render:
    """Return the function that renders rows in the format ``form``. Raises UserError if the format is chat messages and
    the tokenizer has no chat template."""
    if form.prompt_completion is not None:
        return _prompt_completion(form.prompt_completion, tokenize)
    if form.messages is not None:
        if tokenize.chat is None:
            raise UserError(
                "dataset.format.messages",
                "the model's tokenizer has no chat template; name one in chatTemplate, take a model that has one, or"
                " use promptCompletion",
            )
        return conversation_renderer(form.messages, tokenize.chat, tokenize.end)
    if form.text is not None:
        return _text(form.text, tokenize)
    raise UserError("dataset.format", "must be one of promptCompletion, messages, text")


def _field(fields: Mapping[str, Any], column: str) -> tuple[str, str | None]:
    """Return the text in a column of the row, and None. If the column is missing or no text, return an empty text and a
    phrase with the problem."""
    value = fields.get(column)
    if value is None:
        return "", f"has no {column!r}"
    if not isinstance(value, str):
        return "", f"has a {column!r} that is not text"
    if not _is_valid(value):
        return "", f"has a {column!r} that is not text ({HALF_PAIR})"
    return value, None


def _is_valid(text: str) -> bool:
    """Return whether ``text`` has no half of a surrogate pair."""
    return valid_text(text) == text


def _prompt_completion(form: PromptCompletionFormat, tokenize: TokenizeFunctions) -> Render:
    """Return the function that renders rows with a prompt and a completion. Prompt and completion are tokenized
    separately, because at inference the model receives the tokens of the prompt alone."""

    def render(fields: Mapping[str, Any]) -> Sequence[Example] | str:
        prompt, problem = _field(fields, form.prompt_field)
        completion, other = _field(fields, form.completion_field)
        if problem or other:
            return problem or other or ""
        if not completion.strip():
            return f"has an empty {form.completion_field!r}"
        before = tokenize.prompt(form.template.replace("{prompt}", prompt))
        answer = tokenize.completion(completion + form.completion_suffix)
        ids = (*before, *answer, tokenize.end)
        return [Example(ids, ((len(before), len(ids)),))]

    return render


def _text(form: TextFormat, tokenize: TokenizeFunctions) -> Render:
    def render(fields: Mapping[str, Any]) -> Sequence[Example] | str:
        text, problem = _field(fields, form.text_field)
        if problem:
            return problem
        if not text.strip():
            return f"has an empty {form.text_field!r}"
        ids = (*tokenize.prompt(text), tokenize.end)
        return [Example(ids, ((0, len(ids)),))]

    return render
