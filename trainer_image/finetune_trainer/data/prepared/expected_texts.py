"""Says which texts the chat template will be asked for in a row, and renders several texts with one call of the
template's process. `conversation_batches.py` uses this module.

Nothing depends on a right guess: a text that nobody asks for costs time, and a text that was not expected is rendered
when it is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from finetune_core.api.dataset import KNOWN_ROLES, MessagesFormat
from finetune_core.errors import valid_text
from finetune_trainer.data.chat.messages import ARGUMENTS_COLUMN, SYSTEM_COLUMN, Message
from finetune_trainer.data.chat.template_process import TemplateProcess
from finetune_trainer.pod.errors import first_line, library_boundary

ANSWERS = 4
"""For how many answers of a row texts are rendered with one call at most. A row may have thousands of answers, and most
of them are left out where the row is too long."""
ORDINARY, SHAREGPT = frozenset({"role", "content"}), frozenset({"from", "value"})
"""The fields of a message of a simple conversation."""
TOOL_ROLES = ("observation", "function_call")
"""Roles of ShareGPT whose messages are changed when they are read."""

Render = Callable[[list[dict[str, Any]], list[Any] | None, dict[str, Any], bool], str]
"""A function that renders a conversation, from its messages, tools, arguments, and whether an answer comes next."""


class Wanted(NamedTuple):
    """A text that the template renders of a conversation."""

    messages: int
    """How many messages of the conversation the text has."""
    answer_next: bool
    """Whether the text ends with the generation prompt."""


class Asked(NamedTuple):
    """A conversation, and the texts that are wanted of it."""

    messages: Sequence[Message]
    wanted: Sequence[Wanted]


class Made(NamedTuple):
    """Texts that the template has rendered."""

    texts: Sequence[Mapping[Wanted, str]]
    """The texts of each conversation. A text that can't be rendered is left out."""
    seconds: float
    """The processor time that all texts have taken."""


def simple_messages(fields: Mapping[str, Any], form: MessagesFormat) -> Sequence[Message] | None:
    """Return the messages that `read_conversation` returns for a row with the columns ``fields``, where all of them are
    a role and a text and the row has neither tools nor arguments. None for any other row."""
    found = fields.get(form.messages_field)
    if not isinstance(found, list) or fields.get(form.tools_field) or fields.get(ARGUMENTS_COLUMN):
        return None
    roles = {**KNOWN_ROLES, **form.roles}
    messages: list[Message] = []
    system = fields.get(SYSTEM_COLUMN) if form.messages_field != SYSTEM_COLUMN else None
    if system:
        if not isinstance(system, str):
            return None
        messages.append({"role": "system", "content": system})
    for message in found:
        if not isinstance(message, dict) or not all(isinstance(value, str) for value in message.values()):
            return None
        if message.keys() == SHAREGPT:
            if message["from"] in TOOL_ROLES:
                return None
            message = {"role": message["from"], "content": message["value"]}
        elif message.keys() != ORDINARY:
            return None
        role = roles.get(message["role"])
        messages.append(message if role is None else {**message, "role": role})
    return messages


def first_texts(messages: Sequence[Message], learn: str) -> list[Wanted]:
    """Return the texts that are probably asked for first in the conversation ``messages``. ``learn`` is the field of
    this name of `MessagesFormat`."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if learn == "Everything":
        return next_texts(messages, Wanted(len(messages), answer_next=False)) if messages else []
    if not answers:
        return []
    first = answers[-1] if learn == "LastAssistant" else answers[0]
    return next_texts(messages, Wanted(first + 1, answer_next=False))


def next_texts(messages: Sequence[Message], wanted: Wanted) -> list[Wanted]:
    """Return ``wanted``, and the texts of the conversation ``messages`` that are probably asked for soon: those with
    and without each of the first answers from the last message of ``wanted`` on."""
    places = range(max(wanted.messages - 1, 1), len(messages))
    answers = [index for index in places if messages[index]["role"] == "assistant"][:ANSWERS]
    found = [wanted]
    for index in answers:
        found += [Wanted(index + 1, answer_next=False), Wanted(index, answer_next=True)]
    return list(dict.fromkeys(found))


class BatchProcess(TemplateProcess):
    """A process that renders one text with a call, as ``single`` does, or several texts."""

    def __init__(self, single: TemplateProcess) -> None:
        """Call the function of ``single``. The limits of ``single`` for one text hold for several texts together."""
        super().__init__(partial(_one_or_several, single._function), seconds=single._seconds)

    def several(self, asked: Sequence[Asked], tools: list[Any] | None, arguments: Mapping[str, Any]) -> Made:
        """Return the texts that are asked for. All conversations have the same ``tools`` and ``arguments``. Raises the
        errors of `TemplateProcess.call` about the process, and none about a text."""
        plain = [
            ([dict(message) for message in messages[: max(each.messages for each in wanted)]], wanted)
            for messages, wanted in asked
        ]
        found, seconds = self.call(plain, tools, dict(arguments), None)
        texts = [
            {each: text for each, text in zip(wanted, made, strict=True) if _is_text(text)}
            for (_, wanted), made in zip(asked, found, strict=True)
        ]
        return Made(texts, seconds)


def _one_or_several(
    render: Render, asked: list[Any], tools: list[Any] | None, arguments: dict[str, Any], answer_next: bool | None
) -> str | tuple[list[list[str | None]], float]:
    """Return what ``render`` returns for the messages ``asked``. If ``answer_next`` is None, ``asked`` are messages and
    wanted texts instead. Return the texts then, with None for a text that can't be rendered, and their processor
    time."""
    if answer_next is not None:
        return render(asked, tools, arguments, answer_next)
    began = time.process_time()
    texts = [[_rendered(render, messages, tools, arguments, each) for each in wanted] for messages, wanted in asked]
    return texts, time.process_time() - began


def _rendered(
    render: Render, messages: list[dict[str, Any]], tools: list[Any] | None, arguments: dict[str, Any], wanted: Wanted
) -> str | None:
    try:
        with library_boundary(lambda error: ValueError(first_line(error))):
            return render(messages[: wanted.messages], tools, arguments, wanted.answer_next)
    except ValueError:
        return None


def _is_text(made: str | None) -> bool:
    return made is not None and valid_text(made) == made
