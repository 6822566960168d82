"""Marks the control tokens in texts of a data row before a chat template renders them, so that they can be told from
those that the template itself writes. `chat_template.py` calls `RowTexts`.

A person who writes `</s>` into a message does not mean the token. `piece_tokens.py` reads such a text as ordinary text,
but it must know which parts of the rendering come from the row, and a template is a program that mixes both.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune_core.row_templates import Piece, RowError

NO_CHARACTERS = ("\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3")
"""Code points that Unicode keeps for the use inside of a program. They stand at the ends of a mark, so that a mark that
a template has cut apart is noticed."""


class RowTexts:
    """Marks control tokens, and takes the marks out of rendered text."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        """Mark the given tokens, for example `</s>`."""
        # Nobody can write a mark into a row, because it is drawn anew in each process. It never reaches an id.
        word, (first, second, third, fourth) = secrets.token_hex(8), NO_CHARACTERS
        self._begin, self._end = f"{first}{word}{second}", f"{third}{word}{fourth}"
        longest_first = sorted((token for token in control_tokens if token), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._marked = re.compile(f"{self._begin}(.*?){self._end}", re.DOTALL)

    def marked(self, value: Any) -> Any:
        """Return a JSON value with a mark before and behind each control token in its texts."""
        if isinstance(value, str):
            return self._tokens.sub(lambda match: f"{self._begin}{match[0]}{self._end}", value)
        if isinstance(value, Mapping):
            return {key: self.marked(item) for key, item in value.items()}
        return [self.marked(item) for item in value] if isinstance(value, list | tuple) else value

    def marked_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with marks. Roles get none, because templates make control tokens of roles."""
        return [{**self.marked(message), "role": message["role"]} for message in messages]

    def tokens(self, value: Any) -> list[str]:
        """Return the control tokens that stand in a text or in the texts of a JSON value, each once."""
        if isinstance(value, str):
            return sorted(set(self._tokens.findall(value)))
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        return sorted({token for item in inner for token in self.tokens(item)})

    def pieces(self, text: str) -> list[Piece]:
        """Return rendered text without marks: the control tokens of the row, and what stands around them. Raises
        RowError if the template has changed a mark."""
        parts = self._marked.split(text)
        if any(character in part for part in parts for character in NO_CHARACTERS):
            raise RowError("has a control token in a message that the model's chat template cuts apart")
        return [Piece(part, from_row=at % 2 == 1) for at, part in enumerate(parts) if part]
