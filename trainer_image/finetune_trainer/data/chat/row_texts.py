"""Marks the control tokens in the texts of a data row before a chat template renders the texts. In the rendering, these
tokens can then be distinguished from the control tokens that the template itself writes. `chat_template.py` makes a
`RowTexts`.

A person who writes `</s>` into a message does not mean the token. `piece_tokens.py` reads such a text as ordinary text.
For this it must know which parts of the rendering come from the row, and only marks show this, because the template is
a program that puts the texts of the row between texts of its own.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_core.row_templates import Piece
from finetune_trainer.data.chat.messages import CLOSED, OPENED
from finetune_trainer.data.piece_tokens import PieceTokenizer


class RowTexts:
    """Marks control tokens, and takes the marks out of rendered text."""

    def __init__(self, pieces: PieceTokenizer, added_tokens: Sequence[str] = ()) -> None:
        """Mark the control tokens of ``pieces``, for example `</s>`, except for ``added_tokens``."""
        # Nobody can write a mark into a row, because each process draws new marks. Marks are removed before the text is
        # tokenised. A mark has only letters and digits, which look the same in JSON, in Python's notation of values and
        # in escaped text.
        word = secrets.token_hex(12)
        self._begin, self._end = f"b{word}x", f"e{word}x"
        self._tokenizer = pieces
        tokens = sorted({token for token in pieces.control_tokens.values() if token} - set(added_tokens))
        self._tokens = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
        parts = [(token[:size], token[size:]) for token in tokens for size in range(1, len(token))]
        # A part that is a word gets no mark, because a template may compare a text with a word such as `user`.
        self._beginnings = {beginning for beginning, _ in parts if not beginning.isalnum()}
        self._endings = {ending for _, ending in parts if not ending.isalnum()}
        self._longest = max(map(len, tokens), default=0)
        self._marked = re.compile(f"{self._begin}(.*?){self._end}", re.DOTALL)

    def marked(self, value: Any) -> Any:
        """Return a JSON value with a mark before and behind each control token in its texts and in the names of its
        fields. A part of a control token at an end of a text is marked too, because the template may put a text beside
        it that completes the token."""
        if isinstance(value, str):
            return self._with_marks(value)
        if isinstance(value, Mapping):
            return {self.marked(key): self.marked(item) for key, item in value.items()}
        return [self.marked(item) for item in value] if isinstance(value, list | tuple) else value

    def marked_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with marks. Roles get no marks, because templates make control tokens of roles. The tags
        around the thoughts with which the content of an answer begins get no marks either, because templates look for
        these tags."""
        return [self._marked_message(message) for message in messages]

    def _marked_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {**self.marked(message), "role": message["role"]}
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, str):
            found["content"] = self._marked_answer(content)
        elif message["role"] == "assistant" and isinstance(content, list):
            found["content"] = [{**part, "text": self._marked_answer(part["text"])} for part in content]
        return found

    def _marked_answer(self, content: str) -> str:
        thoughts, closed, rest = content.partition(CLOSED)
        if not closed:
            return self._with_marks(content)
        before, opened, inner = thoughts.partition(OPENED)
        if before.strip():
            before, opened, inner = "", "", thoughts
        return f"{before}{opened}{self._with_marks(inner)}{closed}{self._with_marks(rest)}"

    def is_marked(self, value: Any) -> bool:
        """Return whether a JSON value has marks."""
        return any(self._begin in text for text in _texts(value))

    def without_marks(self, value: Any) -> Any:
        """Return a JSON value, or a rendered text, without the marks."""
        if isinstance(value, str):
            return value.replace(self._begin, "").replace(self._end, "") if self._begin in value else value
        if isinstance(value, Mapping):
            return {self.without_marks(key): self.without_marks(item) for key, item in value.items()}
        return [self.without_marks(item) for item in value] if isinstance(value, list | tuple) else value

    def tokens(self, value: Any) -> list[str]:
        """Return the control tokens that are marked in the texts of a JSON value, each once, as the row writes them."""
        found = {name for text in _texts(value) for name in self._marked.findall(text)}
        return sorted(name for name in found if self._whole_tokens(name))

    def first_token(self, text: str) -> str | None:
        """Return the first control token in a text without marks. None if there is none."""
        return next((text[first:last] for first, last in self._whole_tokens(text)), None)

    def pieces(self, text: str) -> list[Piece]:
        """Return rendered text as pieces without the marks: the marked texts, which come from the row, and the texts
        between them."""
        parts = self._marked.split(text)
        return [Piece(part, from_row=at % 2 == 1) for at, part in enumerate(parts) if part]

    def _with_marks(self, text: str) -> str:
        places = self._whole_tokens(text)
        inner = text.strip()
        first = len(text) - len(text.lstrip())
        last = first + len(inner)
        sizes = range(min(self._longest, len(inner)), 0, -1)
        begun = next((size for size in sizes if inner[:size] in self._endings), 0)
        ended = next((size for size in sizes if inner[-size:] in self._beginnings), 0)
        places = _joined([*places, (first, first + begun), (last - ended, last)])
        for begin, end in reversed(places):
            text = f"{text[:begin]}{self._begin}{text[begin:end]}{self._end}{text[end:]}"
        return text

    def _whole_tokens(self, text: str) -> list[tuple[int, int]]:
        """Return the places of the control tokens in ``text``."""
        found = [match.span() for match in self._tokens.finditer(text)]
        return _joined([*found, *self._tokenizer.other_forms(text)])


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts of a JSON value, also the names of its fields."""
    if isinstance(value, str):
        yield value
        return
    inner = [*value, *value.values()] if isinstance(value, Mapping) else value
    for item in inner if isinstance(inner, list | tuple) else ():
        yield from _texts(item)


def _joined(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ``places`` in their order, without empty places, and with overlapping places joined."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(places):
        if joined and first < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        elif first < last:
            joined.append((first, last))
    return joined
