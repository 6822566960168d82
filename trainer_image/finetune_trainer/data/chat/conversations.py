"""Turns the conversation of a data row into examples. `formats.py` calls `conversation_renderer`.

An example has the same tokens as the conversation at inference. Before each answer are exactly the tokens from which
the model generates it: the chat template's rendering of the messages before the answer, with the generation prompt.
Then come the answer and the token that ends it. If all tokens up to the end of one answer are also the beginning of
what the model gets before the next answer, both answers share one example. Where the template changes earlier messages,
for example by removing their thoughts, each answer has an example of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from finetune_core.api.dataset import MessagesFormat
from finetune_core.row_templates import RowError
from finetune_core.template_arguments import template_arguments
from finetune_trainer.data.chat.answers import PROBE, Dialogue, ProblemError, turn_of
from finetune_trainer.data.chat.chat_template import ChatTemplate
from finetune_trainer.data.chat.messages import CLOSED, THOUGHTS, Conversation, Message, content_text, read_conversation
from finetune_trainer.data.examples import Example

NOT_TEXT = ("role", "content", "tool_call_id")
"""Fields of a message that `_changes` does not compare like the other fields. A template may leave out `role` and
`tool_call_id`, because they add nothing to the text of the conversation. `content` has comparisons of its own."""


MOST_CALLS = 3
"""How many tool calls of a message are checked: the first calls, and the first calls that have arguments, up to this
number of each. The rendering must contain every checked call and its arguments."""
MOST_ROLES = 5
"""How many roles the sentence about a row without a message of the assistant names at most."""
CALL_ID = "a1b2c3d4e"
"""An id of a tool call in the form that the strictest templates ask for (Mistral's)."""
LACKS = "has no attribute"
"""Part of Jinja's error message where a template reads a field that the message lacks."""
CONTENT_BEGINNING = "the beginning of content"
THOUGHTS_IN_CONTENT = "content before </think>"
"""Name, in messages to people, of thoughts that are part of the content of a message. Templates leave them out as they
leave out a field with thoughts."""


class _LeftOutError(ProblemError):
    """The template leaves out a field that has a meaning. The template may render the field if the conversation is
    given in another form (see `_forms`)."""

    def __init__(self, problem: str, *, of_content: bool = False) -> None:
        """``problem`` is a phrase that says what is wrong. ``of_content`` says whether the field is the content of a
        message."""
        super().__init__(problem)
        self.of_content = of_content


class ShownKinds(Protocol):
    """A set of kinds of fields that the template was seen to render. A kind is a value that can be hashed and pickled.
    A renderer asks for each kind before it checks the kind, and adds the kind right after the check if the template
    renders it."""

    def __contains__(self, kind: object, /) -> bool:
        """Return whether the template was seen to render ``kind``."""

    def add(self, kind: tuple[object, ...], /) -> None:
        """Note that the template renders ``kind``."""


def conversation_renderer(
    form: MessagesFormat,
    template: ChatTemplate,
    end: int,
    most_tokens: int | None = None,
    shown: ShownKinds | None = None,
) -> Callable[[Mapping[str, Any]], Sequence[Example] | str]:
    """Return the function that turns the columns of a row into its examples, or into a phrase with what is wrong.
    ``end`` is the id of the tokenizer's end token. The caller refuses a row with an example of more than
    ``most_tokens`` tokens. So only some examples of such a row are made, among them one that is too long. ``shown`` are
    the kinds of fields that the template is known to render. None means that none is known yet."""
    return _Renderer(form, template, end, most_tokens, set() if shown is None else shown).render


def answer_ends(form: MessagesFormat, template: ChatTemplate, end: int) -> list[int]:
    """Return the ids of the tokens with which ``template`` ends an answer that is a text, and an answer that calls a
    tool. The token of an answer is left out if the template can't render a short conversation with this answer."""
    plain = form.model_copy(update={"learn": "AllAssistant", "roles": {}})
    call = {"name": PROBE, "arguments": {PROBE: PROBE}}
    tool = {"type": "function", "function": {"name": PROBE, "description": PROBE, "parameters": {"type": "object"}}}
    rows = (
        ({"content": PROBE}, None),
        # Some models end a call of a tool with another token than a text.
        ({"tool_calls": [{"id": CALL_ID, **call}]}, [tool]),
    )
    found: set[int] = set()
    for answer, tools in rows:
        asked = [{"role": "user", "content": PROBE}, {"role": "assistant", **answer}]
        row = {form.messages_field: asked, form.tools_field: tools}
        examples = conversation_renderer(plain, template, end)(row)
        found.update([] if isinstance(examples, str) else [int(examples[-1].ids[-1])])
    return sorted(found)


class _Renderer:
    """Renders rows, and remembers which kinds of fields the chat template was seen to render."""

    def __init__(
        self, form: MessagesFormat, template: ChatTemplate, end: int, most_tokens: int | None, shown: ShownKinds
    ) -> None:
        self._form = form
        self._most_tokens = most_tokens
        self._template = template
        self._end = end
        self._arguments = template_arguments(form.template_arguments)
        self._shown = shown

    def render(self, fields: Mapping[str, Any]) -> Sequence[Example] | str:
        """Return the examples of a row, or what is wrong with the row."""
        try:
            conversation = read_conversation(fields, self._form)
            if isinstance(conversation, str):
                return conversation
            self._check_roles(conversation)
            self._check_role_names(conversation)
            self._check_arguments(conversation)
            return self._in_the_right_form(conversation)
        except (ProblemError, RowError) as problem:
            return str(problem)
        except RecursionError:
            return "holds values that are nested too deeply"
        except ValueError as error:
            return f"can't be rendered by the model's chat template: {error}"

    def _check_roles(self, conversation: Conversation) -> None:
        if self._form.learn == "Everything" and conversation.messages:
            return
        if not any(message["role"] == "assistant" for message in conversation.messages):
            found = ", ".join(sorted({repr(message["role"]) for message in conversation.messages})[:MOST_ROLES])
            hint = f" (roles here: {found}; dataset.format.messages.roles gives other names of roles)" if found else ""
            raise ProblemError(f"has no message of the assistant, so there is nothing to learn{hint}")
        if not any(conversation.weights):
            raise ProblemError("has no message of the assistant to learn, because all have weight 0")

    def _check_role_names(self, conversation: Conversation) -> None:
        """Raise ProblemError for a role that holds a control token. A row must not make a control token, but the job
        may, in `roles` or with `allowSpecialTokens`."""
        named = self._form.roles.values()
        for index, message in enumerate(conversation.messages):
            found = self._template.row_texts.first_token(message["role"])
            if found is not None and message["role"] not in named and not self._form.allow_special_tokens:
                place = index + conversation.first_number
                raise ProblemError(f"has {found!r}, a control token of the model, in the role of message {place}")

    def _check_arguments(self, conversation: Conversation) -> None:
        for name in conversation.arguments:
            if problem := self._template.argument_problem(name, conversation.tools):
                raise ProblemError(f"has an argument {name!r} for the chat template that {problem}")

    def _in_the_right_form(self, conversation: Conversation) -> Sequence[Example]:
        """Return the examples, with the messages in the first form that the template can render. If it can render none,
        raise the most useful of the errors."""
        failure: ValueError | _LeftOutError | None = None
        texts = self._template.row_texts
        read_as_text: Sequence[str] = ()
        if not self._form.allow_special_tokens:
            conversation = replace(
                conversation,
                messages=texts.marked_messages(conversation.messages),
                tools=texts.marked(conversation.tools),
                arguments=texts.marked(conversation.arguments),
            )
            read_as_text = texts.tokens([conversation.messages, conversation.tools, conversation.arguments])
        arguments = {**self._arguments, **conversation.arguments}
        for messages in _forms(conversation.messages):
            row = Dialogue(self._template, conversation, messages, arguments=arguments, end=self._end)
            try:
                return [example._replace(read_as_text=read_as_text) for example in self._examples(row)]
            except RowError:
                raise
            except _LeftOutError as error:
                # Content that is left out may just have the wrong form, so an error about something else says more.
                says_more = not isinstance(failure, _LeftOutError) or (failure.of_content and not error.of_content)
                failure = error if says_more else failure
            except ValueError as error:
                # An error about a field that the message lacks says least.
                failure = error if failure is None or LACKS in str(failure) else failure
        assert failure is not None
        raise failure

    def _examples(self, row: Dialogue) -> Sequence[Example]:
        learned = [index for index, weight in enumerate(row.conversation.weights) if weight]
        if self._form.learn == "Everything":
            return [self._everything(row)]
        if self._form.learn == "LastAssistant":
            learned = learned[-1:]
        found: list[Example] = []
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        thoughts: set[int] = set()
        turns: list[int] = []
        for index in learned:
            # For each answer, all messages before it are rendered, which would take hours for a row with thousands of
            # answers. So in a row that is too long already, all further answers but the last one are left out. The last
            # one shows the length of the row.
            if self._most_tokens is not None and len(ids) > self._most_tokens and index != learned[-1]:
                continue
            turns.append(index)
            turn = turn_of(row, index)
            thoughts.update([index] if turn.has_thoughts else [])
            if spans and turn.prompt[: len(ids)] != ids:
                found.append(Example(ids, spans))
                spans = []
            ids = turn.prompt + turn.answer
            spans.append((len(turn.prompt), len(ids)))
        self._check_fields(row, turns, set(turns) - thoughts)
        return [*found, Example(ids, spans)]

    def _everything(self, row: Dialogue) -> Example:
        """Return the whole conversation as an example in which all tokens are learned."""
        last = len(row.messages) - 1
        ids = self._template.ids(row.text(row.messages, answer_next=False))
        if row.messages[last]["role"] == "assistant":
            turn = turn_of(row, last)
            if ids[: len(turn.prompt)] == turn.prompt:
                ids = turn.prompt + turn.answer
        self._check_fields(row, [last], set(range(last + 1)))
        return Example(ids, ((0, len(ids)),))

    def _check_fields(self, row: Dialogue, turns: Sequence[int], with_thoughts: set[int]) -> None:
        """Raise _LeftOutError if the template leaves out a field that has a meaning: a text that a person wrote must
        not vanish without a word. ``turns`` are the indexes of the messages with which the learned renderings end, and
        ``with_thoughts`` the indexes of the messages whose thoughts must be rendered."""
        last = turns[-1]
        kind: tuple[object, ...] = ("tools", *(message["role"] for message in row.messages[: last + 1]))
        if row.conversation.tools and kind not in self._shown:
            if self._rendering(row, row.messages, 0, last) == self._rendering(row, row.messages, 0, last, tools=False):
                raise _LeftOutError(
                    f"has {self._form.tools_field!r}, which the model's chat template leaves out"
                    " (format.messages.chatTemplate can name one that shows them)"
                )
            self._shown.add(kind)
        for index, message in enumerate(row.messages[: last + 1]):
            turn = next(at for at in turns if at >= index)
            # What templates do with a message can depend on the messages beside it.
            beside = [row.messages[at]["role"] if 0 <= at <= turn else None for at in (index - 1, index + 1)]
            for name, changed in _changes(message, with_thoughts=index in with_thoughts):
                kind = (name, message["role"], index == 0, index == turn, *beside, _shape(message, self._template.tags))
                if kind in self._shown:
                    continue
                if not self._is_shown(row, index, changed, turn):
                    raise _LeftOutError(
                        f"has {name!r} in {row.place(index)} of role {message['role']!r}, which the model's chat"
                        " template leaves out",
                        of_content=name in ("content", CONTENT_BEGINNING, THOUGHTS_IN_CONTENT),
                    )
                self._shown.add(kind)

    def _is_shown(self, row: Dialogue, index: int, changed: Message, turn: int) -> bool:
        """Return whether the example of message ``turn`` changes if ``changed`` replaces message ``index``."""
        whole = self._rendering(row, row.messages, index, turn)
        messages = [*row.messages[:index], changed, *row.messages[index + 1 :]]
        try:
            return self._rendering(row, messages, index, turn) != whole
        except ValueError:
            return True  # a template that fails without the field has read it

    def _rendering(
        self, row: Dialogue, messages: Sequence[Message], index: int, turn: int, *, tools: bool = True
    ) -> str:
        """Return the text from which the tokens of message ``index`` come in the example of message ``turn``: for an
        earlier message what the model gets before message ``turn``, and for message ``turn`` itself the conversation up
        to it. If everything is learned, the text is always the conversation up to message ``turn``."""
        if index < turn and self._form.learn != "Everything":
            return row.text(messages[:turn], answer_next=True, with_tools=tools)
        return row.text(messages[: turn + 1], answer_next=False, with_tools=tools)


def _shape(message: Message, tags: re.Pattern[str]) -> tuple[object, ...]:
    """Return the properties of a message by which a template may treat messages of one role differently: which fields
    the message has and of which type, and for each text which ``tags`` it has, in order, and where it has other text
    beside them. Contents of tool calls are no such property."""
    return tuple(
        (name, type(value).__name__ if name == "tool_calls" else _form_of(value, tags))
        for name, value in sorted(message.items())
    )


def _form_of(value: object, tags: re.Pattern[str]) -> tuple[object, ...]:
    """Return the type of ``value`` and of the values in it. For a text, also return its tags, and which stretches
    before, between and behind the tags are blank."""
    if isinstance(value, str):
        # The odd stretches are tags, because the pattern has one group.
        return tuple(
            stretch if number % 2 else bool(stretch.strip()) for number, stretch in enumerate(tags.split(value))
        )
    if isinstance(value, list):
        # Two parts stand for more of them, because a row may have any number of parts.
        forms = [_form_of(part, tags) for part in value]
        return ("list", min(len(value), 2), frozenset(forms))
    if isinstance(value, dict):
        return ("object", *((name, _form_of(part, tags)) for name, part in sorted(value.items())))
    return (type(value).__name__, bool(value))


def _changes(message: Message, *, with_thoughts: bool) -> Iterator[tuple[str, Message]]:
    """Yield the name of each field of a message that must be part of the message's rendering. With each name, yield the
    message with another text in the field, or without the field. Without ``with_thoughts``, the template may leave out
    the thoughts of an answer, as templates do at inference. The template may also leave out the name of a tool in the
    tool's answer, because the call has the name."""
    left_out: set[str] = set(THOUGHTS) if message["role"] == "assistant" and not with_thoughts else set()
    if message["role"] == "tool":
        left_out.add("name")
    content, probe = message.get("content", ""), {"type": "text", "text": PROBE}
    parts = content if isinstance(content, list) else []
    has_thoughts = CLOSED in content_text(message)
    may_be_cut = has_thoughts and message["role"] == "assistant" and not with_thoughts
    if content_text(message).strip():
        yield "content", {**message, "content": [*parts, probe] if parts else f"{content}{PROBE}"}
    if has_thoughts and not may_be_cut:
        probed = [{**part, "text": part["text"].replace(CLOSED, PROBE + CLOSED, 1)} for part in parts]
        yield THOUGHTS_IN_CONTENT, {**message, "content": probed or content.replace(CLOSED, PROBE + CLOSED, 1)}
    if content_text(message).strip() and not may_be_cut:
        begun = [{**parts[0], "text": _other_beginning(parts[0]["text"])}, *parts[1:]] if parts else []
        yield CONTENT_BEGINNING, {**message, "content": begun or _other_beginning(content)}
    for name, value in message.items():
        if name in NOT_TEXT or name in left_out or _is_empty(value):
            continue
        if value:
            yield name, {key: other for key, other in message.items() if key != name}
        else:
            # False and 0 are values, such as `training: false`. A template that reads the field reads them like a
            # field that is absent, so the field is tried with the opposite.
            yield name, {**message, name: True if value is False else 1}
    calls = message.get("tool_calls", ())
    with_arguments = [number for number, call in enumerate(calls) if call["function"]["arguments"] not in ({}, "{}")]
    # A template that renders three calls goes through all of them. A row may have thousands.
    for number in sorted({*range(min(len(calls), MOST_CALLS)), *with_arguments[:MOST_CALLS]}):
        call, others = calls[number], [*calls[:number], *calls[number + 1 :]]
        function = call["function"]
        if others:
            yield f"tool_calls[{number}]", {**message, "tool_calls": others}
        if number in with_arguments[:MOST_CALLS]:
            none = {} if isinstance(function["arguments"], dict) else "{}"
            without = {**call, "function": {**function, "arguments": none}}
            changed = [*calls[:number], without, *calls[number + 1 :]]
            yield f"tool_calls[{number}].function.arguments", {**message, "tool_calls": changed}


def _is_empty(value: object) -> bool:
    """Return whether a field with ``value`` says nothing, so that it may be left out like a field that is absent."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _other_beginning(text: str) -> str:
    """Return ``text`` with another character in the place of the first one that is no white space."""
    found = text.lstrip()
    return f"{text[: len(text) - len(found)]}{'Y' if found[:1] == 'X' else 'X'}{found[1:]}"


def _forms(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Yield the conversation in all forms that templates read. Three properties of a form are combined. Contents are as
    in the row, or all one text, or all a list of parts. The arguments of tool calls are objects, or JSON text. Messages
    that only call tools have no content, or an empty one. A form that equals an earlier form is left out."""
    shapes, arguments, contents = (None, _joined, _in_parts), (None, _arguments_as_text), (None, _with_content)
    forms = ((content, argument, shape) for shape in shapes for argument in arguments for content in contents)
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
