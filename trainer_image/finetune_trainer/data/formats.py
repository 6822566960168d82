"""Turns a row into an example in the way that `dataset.format` asks for: text around a prompt, a conversation, or
plain text. A row that can't become one comes back as the sentence that says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from finetune_core.api.dataset import DatasetFormat, MessagesFormat, PromptCompletionFormat, TextFormat
from finetune_core.errors import UserError
from finetune_trainer.data.examples import Example

Chat = Callable[[Sequence[Mapping[str, Any]], bool], Sequence[int]]
"""Token ids of a conversation, with True those that the template puts before an answer of the assistant too."""


class TokenizeFunctions(NamedTuple):
    """The ways that text becomes token ids."""

    prompt: Callable[[str], Sequence[int]]
    """With the tokens that the tokenizer puts in front of a text."""
    completion: Callable[[str], Sequence[int]]
    """Without any."""
    end: int
    """The end token, which every example ends with."""
    chat: Chat | None = None
    """Absent where the tokenizer has no chat template."""


Render = Callable[[Mapping[str, Any]], Example | str]
"""From a row's fields to its example, or to what is wrong with the row."""


def required_columns(form: DatasetFormat) -> Mapping[str, str]:
    """Return the columns that a format reads, by the path of the field that names each."""
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


def renderer(form: DatasetFormat, tokenize: TokenizeFunctions) -> Render:
    """Return the function that makes examples of rows; raises UserError where the tokenizer has no chat template."""
    if form.prompt_completion is not None:
        return _prompt_completion(form.prompt_completion, tokenize)
    if form.messages is not None:
        if tokenize.chat is None:
            raise UserError(
                "dataset.format.messages",
                "the model's tokenizer has no chat template; take a model that has one, or use promptCompletion",
            )
        return _messages(form.messages, tokenize, tokenize.chat)
    if form.text is not None:
        return _text(form.text, tokenize)
    raise UserError("dataset.format", "must be one of promptCompletion, messages, text")


def _field(fields: Mapping[str, Any], column: str) -> tuple[str, str | None]:
    """Return a column's text, and what is wrong with it."""
    value = fields.get(column)
    if value is None:
        return "", f"has no {column!r}"
    if not isinstance(value, str):
        return "", f"has a {column!r} that is not text"
    return value, None


def _prompt_completion(form: PromptCompletionFormat, tokenize: TokenizeFunctions) -> Render:
    """The prompt is tokenised alone and the completion after it, because that is what the model sees when it
    answers."""

    def render(fields: Mapping[str, Any]) -> Example | str:
        prompt, problem = _field(fields, form.prompt_field)
        completion, other = _field(fields, form.completion_field)
        if problem or other:
            return problem or other or ""
        if not completion.strip():
            return f"has an empty {form.completion_field!r}"
        before = tokenize.prompt(form.template.replace("{prompt}", prompt))
        answer = tokenize.completion(completion + form.completion_suffix)
        ids = (*before, *answer, tokenize.end)
        return Example(ids, ((len(before), len(ids)),))

    return render


def _text(form: TextFormat, tokenize: TokenizeFunctions) -> Render:
    def render(fields: Mapping[str, Any]) -> Example | str:
        text, problem = _field(fields, form.text_field)
        if problem:
            return problem
        if not text.strip():
            return f"has an empty {form.text_field!r}"
        ids = (*tokenize.prompt(text), tokenize.end)
        return Example(ids, ((0, len(ids)),))

    return render


def _messages(form: MessagesFormat, tokenize: TokenizeFunctions, chat: Chat) -> Render:
    def render(fields: Mapping[str, Any]) -> Example | str:
        found = fields.get(form.messages_field)
        if isinstance(found, str):
            # A csv file has no other way to hold a list.
            try:
                found = json.loads(found)
            except ValueError:
                return f"has a {form.messages_field!r} that is not a list of messages"
        if found is None:
            return f"has no {form.messages_field!r}"
        if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
            return f"has a {form.messages_field!r} that is not a list of messages"
        # Parquet fills in nulls where other rows have a field.
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
        if message["role"] == "assistant" and not message["content"].strip():
            return f"has an empty answer in message {number}"
    if not any(message["role"] == "assistant" for message in messages):
        return "has no message of the assistant, so there is nothing to learn"
    return None


def _conversation(messages: Sequence[Mapping[str, Any]], chat: Chat, end: int) -> Example | str:
    """Return the conversation up to the assistant's last turn, with the assistant's turns to learn.

    Each turn is what the template adds to the conversation so far. That the template only ever adds is checked by
    token ids: one that rewrites earlier turns would teach text that the model never sees when it answers.
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
            # What a template writes behind the end token (a line break) is never generated.
            last = len(before) + len(answer) - answer[::-1].index(end)
        elif turn == turns[-1]:
            whole.append(end)
            last = len(whole)
        spans.append((len(before), last))
    return Example(whole[: spans[-1][1]], spans)
