"""Renders a data row as examples, in the format that `dataset.format` names: prompt and completion, chat messages, or
plain text. `dataset.py` calls `renderer`.

Most rows become one example. A conversation becomes several where the chat template changes earlier messages. For a row
that can't be rendered, the result is a phrase with the reason instead of examples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from finetune_core.api.dataset import DatasetFormat, MessagesFormat
from finetune_core.errors import UserError, valid_text
from finetune_core.row_templates import HALF_PAIR, RowError
from finetune_trainer.data.examples import Example
from finetune_trainer.data.piece_tokens import PieceTokenizer
from finetune_trainer.data.prompts import (
    NamedColumn,
    prompt_columns,
    render_prompt_completion,
    render_text,
)

Chat = Callable[[Sequence[Mapping[str, Any]], bool], Sequence[int]]
"""A function that renders a conversation with the chat template and returns its token ids. If the second argument is
True, the ids end with the generation prompt, which is the text that the template puts before an answer.
"""


class TokenizeFunctions(NamedTuple):
    """The functions that turn text into token ids, and the id of the end token. `tokenizer.py` makes them from a
    tokenizer."""

    pieces: PieceTokenizer
    """Tokenizes the pieces of rendered templates."""
    end: int
    """Id of the end token (EOS), with which every example ends."""
    chat: Chat | None = None
    """Tokenizes conversations. None if the tokenizer has no chat template."""


Render = Callable[[Mapping[str, Any]], Sequence[Example] | str]
"""A function that turns the columns of a row into its examples, at least one. For a bad row it returns a phrase that
says what is wrong.
"""


def required_columns(form: DatasetFormat) -> Sequence[NamedColumn]:
    """Return the columns that a format reads. No other columns of a data file are needed to make examples. Raises
    UserError if a template of the format is none."""
    if form.prompt_completion is not None:
        return prompt_columns(form.prompt_completion)
    if form.messages is not None:
        return [NamedColumn("dataset.format.messages.messagesField", form.messages.messages_field)]
    if form.text is not None:
        return [NamedColumn("dataset.format.text.textField", form.text.text_field)]
    raise UserError("dataset.format", "must be one of promptCompletion, messages, text")


def renderer(form: DatasetFormat, tokenize: TokenizeFunctions) -> Render:
    """Return the function that renders rows in the format ``form``. Raises UserError if the format is chat messages and
    the tokenizer has no chat template."""
    if form.prompt_completion is not None:
        return _one_example(render_prompt_completion(form.prompt_completion, tokenize.pieces))
    if form.messages is not None:
        if tokenize.chat is None:
            raise UserError(
                "dataset.format.messages",
                "the model's tokenizer has no chat template; take a model that has one, or use promptCompletion",
            )
        return _messages(form.messages, tokenize, tokenize.chat)
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


def _messages(form: MessagesFormat, tokenize: TokenizeFunctions, chat: Chat) -> Render:
    def render(fields: Mapping[str, Any]) -> Sequence[Example] | str:
        found = fields.get(form.messages_field)
        if isinstance(found, str):
            # Csv files hold the list of messages as JSON text, because csv has no lists.
            try:
                found = json.loads(found)
            except (ValueError, RecursionError):
                return f"has a {form.messages_field!r} that is not a list of messages"
        if found is None:
            return f"has no {form.messages_field!r}"
        if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
            return f"has a {form.messages_field!r} that is not a list of messages"
        # Fields that are null are left out. Parquet adds such fields to a message if other messages of the file have
        # them.
        messages = [{key: value for key, value in message.items() if value is not None} for message in found]
        problem = _conversation_problem(messages)
        if problem:
            return problem
        try:
            return _conversation(messages, chat, tokenize.end)
        except ValueError as error:
            return f"can't be rendered by the model's chat template: {error}"

    return render


def _conversation_problem(messages: Sequence[Mapping[str, Any]]) -> str | None:
    for number, message in enumerate(messages, start=1):
        if not isinstance(message.get("role"), str):
            return f"has no role in message {number}"
        if not isinstance(message.get("content"), str):
            return f"has no text as content of message {number}"
        if valid_text(message["content"]) != message["content"]:
            return f"has no text as content of message {number} ({HALF_PAIR})"
        if message["role"] == "assistant" and not message["content"].strip():
            return f"has an empty answer in message {number}"
    if not any(message["role"] == "assistant" for message in messages):
        return "has no message of the assistant, so there is nothing to learn"
    return None


def _conversation(messages: Sequence[Mapping[str, Any]], chat: Chat, end: int) -> Sequence[Example] | str:
    """Return the conversation up to the last assistant message, as an example in which all assistant messages are
    supervised. Return a phrase with the problem if the tokens of an answer can't be told.

    The tokens of an assistant message are those that the template adds to the conversation before it. So the template
    must not change earlier messages when a message follows, which is checked by comparing token ids. Such a change
    would train the model on text that it never sees at inference.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    whole = list(chat(messages[: turns[-1] + 1], False))
    spans = []
    for turn in turns:
        before, after = list(chat(messages[:turn], True)), list(chat(messages[: turn + 1], False))
        if whole[: len(after)] != after or after[: len(before)] != before:
            return (
                f"has a message {turn + 1} that the model's chat template does not put unchanged behind the messages"
                " before it, so it can't be told which tokens are the answer"
            )
        last = len(after)
        answer = after[len(before) :]
        if end in answer:
            # What a template puts after the end token, such as a line break, is not supervised, because generation
            # stops at the end token.
            last = len(before) + len(answer) - answer[::-1].index(end)
        elif turn == turns[-1]:
            whole.append(end)
            last = len(whole)
        spans.append((len(before), last))
    return [Example(whole[: spans[-1][1]], spans)]
