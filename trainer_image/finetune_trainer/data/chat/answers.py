"""Finds the tokens of one answer in a conversation: what the model gets before the answer at inference, and what it
must generate, up to the token that ends the answer. `conversations.py` calls `turn_of`.

A chat template is a program, which does not say where an answer begins and ends. So the conversation is rendered in
several ways, and the renderings are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finetune_core.row_templates import RowError
from finetune_trainer.data.chat.chat_template import ChatTemplate
from finetune_trainer.data.chat.messages import (
    CLOSED,
    OPENED,
    SYSTEM_COLUMN,
    THOUGHTS,
    Conversation,
    Message,
    content_text,
)

CLOSERS = (CLOSED, "<channel|>", "[/THINK]", "</thinking>", "</seed:think>")
"""Tags that close the thoughts of an answer, in templates of different models."""
PARTS = ("'type': 'text'", '"type": "text"')
"""A rendering contains one of these texts if the template has written a list of text parts as if the list were a
text."""
PROBE = "probe-7d1f"
"""A text that is put into a message to find out how the template renders the message. No row has this text."""


class ProblemError(Exception):
    """What is wrong with a row, as a phrase that follows the place of the row."""


class Turn(NamedTuple):
    """An answer of the assistant: the tokens before the answer, and the tokens of the answer."""

    prompt: list[int]
    answer: list[int]
    """The tokens that are learned. The last of them ends the answer."""
    has_thoughts: bool
    """Whether the thoughts of the message are part of ``answer`` even where the template leaves them out. True only
    where the prompt ends with an open tag of thoughts, and the rendered answer does not continue the prompt."""


class Dialogue:
    """The conversation of a row, in one of the forms that templates read, together with its template."""

    def __init__(
        self,
        template: ChatTemplate,
        conversation: Conversation,
        messages: Sequence[Message],
        *,
        arguments: Mapping[str, Any],
        end: int,
    ) -> None:
        """``messages`` are the messages of ``conversation``, perhaps in another form than in the row. ``arguments`` are
        the arguments of the template, and ``end`` is the id of the tokenizer's end token."""
        self.template = template
        self.conversation = conversation
        self.messages = messages
        self.end = end
        self._arguments = arguments
        self._has_parts = any(isinstance(message.get("content"), list) for message in messages)

    def place(self, index: int) -> str:
        """Return the name of message ``index`` (from 0) in texts for people: `message 3` for the third message of the
        list, or `column 'system'` for the message from this column."""
        number = index + self.conversation.first_number
        return f"message {number}" if number else f"column {SYSTEM_COLUMN!r}"

    def text(self, messages: Sequence[Message], *, answer_next: bool, with_tools: bool = True) -> str:
        """Return the rendering of ``messages``. With ``answer_next`` the rendering ends with the generation prompt.
        Raises ValueError if the template fails. Raises RowError if the marks of `row_texts` change what the template
        renders.
        """
        tools = self.conversation.tools if with_tools else ()
        text = self.template.text(messages, tools, self._arguments, answer_next=answer_next)
        if self._has_parts and any(part in text for part in PARTS):
            raise ValueError("it reads no content that is a list of parts")
        texts = self.template.row_texts
        if texts.is_marked([messages, tools, self._arguments]):
            messages, tools, arguments = map(texts.without_marks, (messages, tools, self._arguments))
            if texts.without_marks(text) != self.template.text(messages, tools, arguments, answer_next=answer_next):
                raise RowError(
                    "has a control token in a message that the model's chat template cuts apart or looks for (remove"
                    " it, or set allowSpecialTokens)"
                )
        return text


def turn_of(row: Dialogue, index: int) -> Turn:
    """Return the answer of message ``index`` (from 0). Raises ProblemError if there is no message before it, or if the
    renderings do not show where the answer begins. Raises ValueError if the template fails."""
    answered = row.text(row.messages[: index + 1], answer_next=False)
    if index == 0:
        raise ProblemError(
            "begins with an answer of the assistant, which the model can never give (weight: 0 keeps it from being"
            " learned)"
        )
    before = row.text(row.messages[:index], answer_next=True)
    has_thoughts = False
    if answered.startswith(before):
        answer = answered[len(before) :]
    elif _opens_thoughts(before, answered):
        answer, has_thoughts = _behind_opened_thoughts(row, index, before, answered), True
    else:
        answer = _behind_other_text(row, index, before, answered)
    prompt = row.template.ids(before)
    # Prompt and answer are tokenised as one text, because some tokenizers put a space in front of each text. The answer
    # is tokenised alone where its first characters and the last characters of the prompt would become one token, which
    # the model can't generate.
    whole = row.template.ids(before + answer)
    ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else row.template.ids(answer)
    lead = row.template.ids(answered.removesuffix(answer)) if not answered.startswith(before) else prompt
    return Turn(prompt, _up_to_the_end(row, index, lead, ids), has_thoughts)


def _opens_thoughts(before: str, answered: str) -> bool:
    """Return whether ``before`` ends with the open tag `<think>`, perhaps with white space behind it, and ``answered``
    begins with the text before this tag."""
    opened, tag, rest = before.rpartition(OPENED)
    return bool(tag) and not rest.strip() and answered.startswith(opened)


def _behind_other_text(row: Dialogue, index: int, before: str, answered: str) -> str:
    """Return the text that the model must generate behind ``before`` for message ``index``. ``answered`` is the
    rendered conversation up to and including this message, and does not begin with ``before``.

    There are two cases, and ProblemError is raised in all others. In the first case, the generation prompt ends with
    thoughts that are closed already, and the rendered message has no thoughts (Gemma 4). In the second case, the
    template leaves out an earlier part of the conversation as soon as an answer follows: Mistral's template then leaves
    out the system message, and the template of gpt-oss the text beside a tool call. ``answered`` then still has the end
    of ``before``, from the content of the message before the answer on, and the answer follows this end.
    """
    message, last = row.messages[index], row.messages[index - 1]
    probe = [{"type": "text", "text": PROBE}] if isinstance(message.get("content"), list) else PROBE
    try:
        probed = row.text([*row.messages[:index], {"role": "assistant", "content": probe}], answer_next=False)
    except ValueError:
        probed = ""
    header, found, _ = probed.rpartition(PROBE)
    is_header = bool(found) and before.startswith(header) and answered.startswith(header)
    answer = answered[len(header) :]
    # An answer with thoughts behind thoughts that are closed already would teach the model to think although the prompt
    # tells it not to.
    thinks = any(closer in answer for closer in CLOSERS)
    if is_header and before[len(header) :].rstrip().endswith(CLOSERS) and not thinks:
        return answer
    shared = _length_in_common(probed, answered)
    content = content_text(last).strip()
    ending = before[before.rfind(content) :] if content and content in before else ""
    place = answered.rfind(ending, 0, shared) if ending else -1
    if place < 0 or not _is_shortened(before.removesuffix(ending), answered[:place]):
        raise ProblemError(
            f"has a {row.place(index)} that the model's chat template does not put unchanged behind the messages before"
            " it, so it can't be told which tokens are the answer"
        )
    return answered[place + len(ending) :]


def _is_shortened(whole: str, text: str) -> bool:
    """Return whether ``text`` is ``whole`` without one part of it."""
    return _length_in_common(whole, text) + _length_in_common(whole[::-1], text[::-1]) >= len(text)


def _behind_opened_thoughts(row: Dialogue, index: int, before: str, answered: str) -> str:
    """Return the text that the model must generate behind ``before`` for message ``index``. ``before`` ends with an
    open tag of thoughts. ``answered`` is the rendered conversation up to and including this message, and does not begin
    with ``before``.

    At inference the model gets the open tag, thinks, closes the tag and answers. If the template renders the thoughts
    of the message, the text behind the tag comes from the rendering. If it leaves them out, the thoughts are taken from
    the row, and they are empty if the row has none.
    """
    answer = answered[len(before.rpartition(OPENED)[0]) :]
    if answer.startswith(OPENED):
        answer = answer.removeprefix(OPENED).lstrip("\n")
        if not answer.startswith(CLOSED):
            return answer
        answer = answer.removeprefix(CLOSED)
    message = row.messages[index]
    thoughts, content = next((str(message[name]) for name in THOUGHTS if name in message), ""), content_text(message)
    if not thoughts and CLOSED in content:
        thoughts = content.rpartition(CLOSED)[0].strip().removeprefix(OPENED)
    if not thoughts:
        # The conversation is rendered with a probe as its thoughts. If the template renders the probe, the text behind
        # the probe shows how the template closes thoughts.
        probed = [*row.messages[:index], {**message, THOUGHTS[0]: PROBE}]
        text = row.text(probed, answer_next=False)
        if text.startswith(before + PROBE):
            return text[len(before + PROBE) :]
    return f"{thoughts.strip()}\n{CLOSED}\n\n" + answer.lstrip("\n")


def _up_to_the_end(row: Dialogue, index: int, lead: list[int], answer: list[int]) -> list[int]:
    """Return the token ids ``answer`` up to the token that ends the answer. If the template renders no token that ends
    an answer, such a token is added. ``lead`` are the tokens in front of the answer in the rendering of the
    conversation up to message ``index``.

    What the template puts behind the last token of the answer, such as a line break, is not learned, because generation
    stops at this token.
    """
    template = row.template
    stops = [place for place, token in enumerate(answer) if token in template.ends]
    control = _control_tokens_at_the_end(template, answer)
    if not control and stops:
        control = _control_tokens_at_the_end(template, answer[: stops[-1] + 1])
    if not control:
        return [*answer, _beginning_of_the_next(row, index)]
    if len(control) == 1:
        return answer[: control[0] + 1]
    # Of several control tokens, generation stops at the first one that is in `template.ends`: at `<end_of_turn>` and
    # not at the EOS behind it. A token that the template puts behind the whole conversation does not end an answer.
    kept = [place for place in control if place < _length_when_followed(row, index, lead, answer)] or control
    known = [place for place in kept if place in stops]
    return answer[: (known[0] if known else kept[-1]) + 1]


def _control_tokens_at_the_end(template: ChatTemplate, ids: Sequence[int]) -> list[int]:
    """Return the places of the control tokens that have only control tokens and white space behind them."""
    first = len(ids)
    while first and (ids[first - 1] in template.special or template.is_blank(ids[first - 1])):
        first -= 1
    return [place for place in range(first, len(ids)) if ids[place] in template.special]


def _beginning_of_the_next(row: Dialogue, index: int) -> int:
    """Return the token that ends message ``index`` if the template renders no token at the end of a message.

    A model with such a template stops at the token that begins the next message. If this token is not one of the
    model's stop tokens, the tokenizer's end token is returned.
    """
    control = [token for token in _followed(row, index) if token in row.template.special]
    return control[-1] if control and control[-1] in row.template.ends else row.end


def _length_when_followed(row: Dialogue, index: int, lead: list[int], answer: list[int]) -> int:
    """Return how many tokens of ``answer``, from its beginning, stay the same if another message follows."""
    followed, whole = _followed(row, index), lead + answer
    return _length_in_common(followed, whole) - len(lead)


def _length_in_common(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many items two sequences have in common at their beginnings."""
    different = (at for at, (first, second) in enumerate(zip(one, other, strict=False)) if first != second)
    return next(different, min(len(one), len(other)))


def _followed(row: Dialogue, index: int) -> list[int]:
    """Return the token ids of the conversation up to message ``index`` and one more message of a person or a tool.
    Empty if the template can't render it."""
    message = row.messages[index]
    following: Message = {"role": "user", "content": PROBE}
    if "tool_calls" in message:
        following = {"role": "tool", "content": PROBE, "name": message["tool_calls"][0]["function"]["name"]}
    try:
        return row.template.ids(row.text([*row.messages[: index + 1], following], answer_next=False))
    except ValueError:
        return []
