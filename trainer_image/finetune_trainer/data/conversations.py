"""Turns the conversation of a data row into examples. `formats.py` calls `conversation_renderer`.

What is trained is what is seen at inference. Before each answer stand exactly the tokens that the model gets there: the
chat template's rendering of the messages before the answer, with the generation prompt. Behind them stand the answer
and the token that ends it. Where the tokens of one answer are the beginning of what the model gets before the next
answer, both answers share one example. Where the template changes earlier messages, for example by removing their
thoughts, each answer has an example of its own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from finetune_core.api.dataset import MessagesFormat
from finetune_trainer.data.chat_template import ChatTemplate, argument_problem, template_arguments
from finetune_trainer.data.examples import Example
from finetune_trainer.data.messages import (
    SYSTEM_COLUMN,
    THOUGHTS,
    Conversation,
    Message,
    content_text,
    read_conversation,
)

NOT_TEXT = ("role", "content", "tool_call_id")
"""Fields of a message that a template may leave out, because they add nothing to the text of the conversation, or that
are compared in another way."""
OPENED = "<think>"
"""With this tag some generation prompts open the thoughts of the answer."""
PROBE = "probe-7d1f"
"""A text that no row has."""


class _Turn(NamedTuple):
    """An answer of the assistant: the tokens before it, and its own."""

    prompt: list[int]
    answer: list[int]
    """The tokens that are learned, up to the one that ends the answer."""


class _ProblemError(Exception):
    """What is wrong with a row, as a phrase that follows the place of the row."""


class _LeftOutError(_ProblemError):
    """The template leaves out a field that has a meaning. It may render the field in another form."""


def conversation_renderer(
    form: MessagesFormat, template: ChatTemplate, end: int
) -> Callable[[Mapping[str, Any]], Sequence[Example] | str]:
    """Return the function that turns the columns of a row into its examples, or into a phrase with what is wrong.
    ``end`` is the id of the tokenizer's end token."""
    return _Renderer(form, template, end).render


def answer_ends(form: MessagesFormat, template: ChatTemplate, end: int) -> list[int]:
    """Return the ids of the token that ends an answer of ``template``. Empty if the template can't render a short
    conversation."""
    asked = {form.messages_field: [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]}
    plain = form.model_copy(update={"learn": "AllAssistant", "roles": {}})
    examples = conversation_renderer(plain, template, end)(asked)
    return [] if isinstance(examples, str) else [int(examples[-1].ids[-1])]


class _Renderer:
    """Renders rows, and remembers what it has learned of the chat template."""

    def __init__(self, form: MessagesFormat, template: ChatTemplate, end: int) -> None:
        self._form = form
        self._template = template
        self._end = end
        self._arguments = template_arguments(form.template_arguments)
        self._shown: set[tuple[object, ...]] = set()
        """Kinds of fields that the template was seen to render."""

    def render(self, fields: Mapping[str, Any]) -> Sequence[Example] | str:
        """Return the examples of a row, or what is wrong with the row."""
        conversation = read_conversation(fields, self._form)
        if isinstance(conversation, str):
            return conversation
        try:
            self._check_roles(conversation)
            self._check_arguments(conversation)
            return self._in_the_right_form(conversation)
        except _ProblemError as problem:
            return str(problem)
        except ValueError as error:
            return f"can't be rendered by the model's chat template: {error}"

    def _check_roles(self, conversation: Conversation) -> None:
        if self._form.learn == "Everything" and conversation.messages:
            return
        if not any(message["role"] == "assistant" for message in conversation.messages):
            raise _ProblemError("has no message of the assistant, so there is nothing to learn")
        if not any(conversation.weights):
            raise _ProblemError("has no message of the assistant to learn, because all have weight 0")

    def _check_arguments(self, conversation: Conversation) -> None:
        for name in conversation.arguments:
            if problem := argument_problem(name, self._template.variables(conversation.tools)):
                raise _ProblemError(f"has an argument {name!r} for the chat template that {problem}")

    def _in_the_right_form(self, conversation: Conversation) -> Sequence[Example]:
        """Return the examples, with the messages in the first form that the template can render. If it can render none,
        raise what is wrong with the first form."""
        first: ValueError | _LeftOutError | None = None
        for messages in _forms(conversation.messages):
            try:
                return self._examples(_Row(self, conversation, messages))
            except (ValueError, _LeftOutError) as error:
                first = first or error
        assert first is not None
        raise first

    def _examples(self, row: _Row) -> Sequence[Example]:
        learned = [index for index, weight in enumerate(row.conversation.weights) if weight]
        if self._form.learn == "Everything":
            return [self._everything(row)]
        if self._form.learn == "LastAssistant":
            learned = learned[-1:]
        found: list[Example] = []
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for index in learned:
            turn = self._turn(row, index)
            if spans and turn.prompt[: len(ids)] != ids:
                found.append(Example(ids, spans))
                spans = []
            ids = turn.prompt + turn.answer
            spans.append((len(turn.prompt), len(ids)))
        self._check_fields(row, learned, learned)
        return [*found, Example(ids, spans)]

    def _everything(self, row: _Row) -> Example:
        """Return the whole conversation as an example in which all tokens are learned."""
        last = len(row.messages) - 1
        ids = self._template.ids(row.text(row.messages, answer_next=False))
        if row.messages[last]["role"] == "assistant":
            turn = self._turn(row, last)
            if ids[: len(turn.prompt)] == turn.prompt:
                ids = turn.prompt + turn.answer
        self._check_fields(row, [last], range(last + 1))
        return Example(ids, ((0, len(ids)),))

    def _turn(self, row: _Row, index: int) -> _Turn:
        """Return the answer of message ``index`` (from 0). Raises _ProblemError if the template renders the answer in a
        way that does not continue what the model gets before it."""
        answered = row.text(row.messages[: index + 1], answer_next=False)
        if index == 0:
            raise _ProblemError(
                "begins with an answer of the assistant, which the model can never give (weight: 0 keeps it from being"
                " learned)"
            )
        before = row.text(row.messages[:index], answer_next=True)
        answer = self._answer_text(row, index, before, answered)
        prompt = self._template.ids(before)
        # The tokens are taken from the whole text where they can be, because some tokenizers put a space in front of
        # each text. They can't be where the last characters of the prompt and the first ones of the answer would become
        # one token, which the model can't generate.
        whole = self._template.ids(before + answer)
        ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._template.ids(answer)
        return _Turn(prompt, self._with_end(row, index, prompt, ids))

    def _answer_text(self, row: _Row, index: int, before: str, answered: str) -> str:
        """Return the text that the model must generate behind ``before`` for message ``index``. ``answered`` is the
        conversation up to the message."""
        if answered.startswith(before):
            return answered[len(before) :]
        opened, tag, _ = before.rpartition(OPENED)
        if tag and not before[len(opened) + len(tag) :].strip() and answered.startswith(opened):
            return self._thought_and_answer(row, index, before, answered[len(opened) :])
        raise _ProblemError(
            f"has a {row.place(index)} that the model's chat template does not put unchanged behind the messages"
            " before it, so it can't be told which tokens are the answer"
        )

    def _thought_and_answer(self, row: _Row, index: int, before: str, answer: str) -> str:
        """Return the answer of message ``index`` where the generation prompt has opened the thoughts, and ``answer``,
        what the template renders of the message, does not begin in the same way.

        At inference the model gets the open tag, thinks, closes the tag and answers. Templates of earlier messages
        leave the thoughts out. So the thoughts are taken from the row, and they are empty where it has none.
        """
        if answer.startswith(OPENED) and answer.partition("</think>")[0].strip() != OPENED:
            return answer.removeprefix(OPENED).lstrip("\n")
        message = row.messages[index]
        thoughts = next((str(message[name]) for name in THOUGHTS if name in message), "")
        content = content_text(message)
        if not thoughts and "</think>" in content:
            thoughts = content.rpartition("</think>")[0].strip().removeprefix(OPENED)
        if not thoughts:
            # A template that renders thoughts shows how it closes them.
            probed = [*row.messages[:index], {**message, THOUGHTS[0]: PROBE}]
            text = row.text(probed, answer_next=False)
            if text.startswith(before) and text[len(before) :].startswith(PROBE):
                return text[len(before) + len(PROBE) :]
        closed = answer.removeprefix(OPENED).lstrip().removeprefix("</think>") if answer.startswith(OPENED) else answer
        return f"{thoughts.strip()}\n</think>\n\n" + closed.lstrip("\n")

    def _with_end(self, row: _Row, index: int, prompt: list[int], answer: list[int]) -> list[int]:
        """Return ``answer`` up to the token that ends it, which is added where the template renders none.

        What the template puts behind that token, such as a line break, is not learned, because generation stops at the
        token.
        """
        template = self._template
        ends = [place for place, token in enumerate(answer) if token in template.ends]
        tail = ends[-1] + 1 if ends else len(answer)
        start = tail
        while start and (answer[start - 1] in template.special or template.is_blank(answer[start - 1])):
            start -= 1
        control = [place for place in range(start, tail) if answer[place] in template.special]
        if ends:
            # With two tokens that end generation, such as `<end_of_turn>` and EOS, generation stops at the first.
            place = next(place for place in ends if place >= start)
            if control[0] < place:
                kept = self._kept(row, index, prompt, answer)
                place = (
                    max((other for other in control if other < min(kept, place)), default=place)
                    if (place >= kept)
                    else place
                )
            return answer[: place + 1]
        if control:
            kept = self._kept(row, index, prompt, answer) if len(control) > 1 else len(answer)
            return answer[: max((other for other in control if other < kept), default=control[-1]) + 1]
        # Some templates have no end of a message. The model then stops with the first token of the next message, if the
        # base model knows that token as an end, and with the tokenizer's end token otherwise.
        following = self._following(row, index)
        whole = prompt + answer
        if following[: len(whole)] == whole and following[len(whole) : len(whole) + 1]:
            token = following[len(whole)]
            if token in template.ends:
                return [*answer, token]
        return [*answer, self._end]

    def _kept(self, row: _Row, index: int, prompt: list[int], answer: list[int]) -> int:
        """Return how many tokens of ``answer`` remain where another message follows. A template may put a token behind
        the whole conversation."""
        following, whole = self._following(row, index), prompt + answer
        same = next((at for at, pair in enumerate(zip(following, whole, strict=False)) if pair[0] != pair[1]), None)
        return (min(len(following), len(whole)) if same is None else same) - len(prompt)

    def _following(self, row: _Row, index: int) -> list[int]:
        """Return the token ids of the conversation up to message ``index`` and one more message. Empty if the template
        can't render it."""
        message = row.messages[index]
        following: Message = {"role": "user", "content": PROBE}
        if "tool_calls" in message:
            following = {"role": "tool", "content": PROBE, "name": message["tool_calls"][0]["function"]["name"]}
        try:
            return self._template.ids(row.text([*row.messages[: index + 1], following], answer_next=False))
        except ValueError:
            return []

    def _check_fields(self, row: _Row, turns: Sequence[int], learned: Sequence[int]) -> None:
        """Raise _LeftOutError if the template leaves out a field that has a meaning: a text that a person wrote must
        not vanish without a word. ``turns`` are the last messages of the renderings that are learned from, and
        ``learned`` the messages that are learned."""
        if row.conversation.tools and ("tools",) not in self._shown:
            shown = row.messages[: turns[-1] + 1]
            if row.text(shown, answer_next=False) == row.text(shown, answer_next=False, with_tools=False):
                raise _LeftOutError(f"has {self._form.tools_field!r}, which the model's chat template leaves out")
            self._shown.add(("tools",))
        for index, message in enumerate(row.messages[: turns[-1] + 1]):
            turn = next(at for at in turns if at >= index)
            for name in _fields_with_meaning(message, learned=index in learned):
                kind = (name, message["role"], index == 0, index == turn, frozenset(message))
                if kind in self._shown:
                    continue
                if not self._is_shown(row, index, name, turn):
                    raise _LeftOutError(
                        f"has {name!r} in {row.place(index)} of role {message['role']!r}, which the model's chat"
                        " template leaves out"
                    )
                self._shown.add(kind)

    def _is_shown(self, row: _Row, index: int, name: str, turn: int) -> bool:
        """Return whether the rendering up to message ``turn`` depends on field ``name`` of message ``index``."""
        messages = list(row.messages[: turn + 1])
        whole = row.text(messages, answer_next=False)
        messages[index] = changed = dict(messages[index])
        if name == "content":
            content = changed["content"]
            changed["content"] = (
                f"{content}{PROBE}" if isinstance(content, str) else [*content, {"type": "text", "text": PROBE}]
            )
        else:
            del changed[name]
        try:
            return row.text(messages, answer_next=False) != whole
        except ValueError:
            return True  # a template that fails without the field has read it


def _fields_with_meaning(message: Message, *, learned: bool) -> list[str]:
    """Return the fields of a message that must be part of its rendering. Thoughts of answers that are not learned may
    be left out, as templates do at inference. The name of a tool that answers is known from its call."""
    left_out: set[str] = set(THOUGHTS) if message["role"] == "assistant" and not learned else set()
    if message["role"] == "tool":
        left_out.add("name")
    found = [name for name in message if name not in NOT_TEXT and name not in left_out and message[name]]
    return ["content", *found] if content_text(message).strip() else found


def _forms(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Yield the conversation in the forms that templates read: as it is, then with each content as one text, or as a
    list of parts; with the arguments of tool calls as objects, then as JSON text; without a content of messages that
    only call tools, then with an empty one. A form that does not differ from an earlier one is left out."""
    forms = itertools.product((None, _joined, _in_parts), (None, _arguments_as_text), (None, _with_content))
    seen: list[Sequence[Message]] = []
    for changes in forms:
        changed = messages
        for change in changes:
            changed = [change(message) for message in changed] if change is not None else changed
        if changed not in seen:
            seen.append(changed)
            yield changed


def _joined(message: Message) -> Message:
    """Return ``message`` with its parts of text joined by line breaks, as vLLM joins them for templates that read one
    text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _arguments_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _with_content(message: Message) -> Message:
    return {"content": "", **message} if "tool_calls" in message else message


class _Row:
    """A conversation whose messages have one of the forms of `_forms`."""

    def __init__(self, renderer: _Renderer, conversation: Conversation, messages: Sequence[Message]) -> None:
        self._template = renderer._template
        self._arguments = {**renderer._arguments, **conversation.arguments}
        self._has_parts = any(isinstance(message.get("content"), list) for message in messages)
        self.conversation = conversation
        self.messages = messages

    def place(self, index: int) -> str:
        """Return how people find message ``index`` in the row, for example `message 3`."""
        number = index + self.conversation.first_number
        return f"message {number}" if number else f"column {SYSTEM_COLUMN!r}"

    def text(self, messages: Sequence[Message], *, answer_next: bool, with_tools: bool = True) -> str:
        """Return the rendering of ``messages``. Raises ValueError if the template fails."""
        tools = self.conversation.tools if with_tools else ()
        text = self._template.text(messages, tools, self._arguments, answer_next=answer_next)
        if self._has_parts and "{'type': 'text'" in text:
            raise ValueError("it reads no content that is a list of parts")
        return text
