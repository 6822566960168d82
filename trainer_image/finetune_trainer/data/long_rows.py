"""Makes shorter examples of texts that are too long: several examples (`longRows: Split`), or only the beginning
(`longRows: Truncate`). `dataset.py` uses `LongTexts` for rows of `format.text`, whose tokens are all learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from finetune_trainer.data.examples import Example


class LongTexts:
    """Makes examples of texts that are too long, and counts them for a notice."""

    def __init__(self, policy: Literal["Split", "Truncate"], most_tokens: int) -> None:
        """Make examples of at most ``most_tokens`` tokens, or of 2 tokens if ``most_tokens`` is 1, because nothing can
        be learned of a single token."""
        self._policy, self._most = policy, max(2, most_tokens)
        self.rows = self._examples = self._tokens = self._left_out = 0
        self._first = ""

    def pieces(self, example: Example, place: str) -> Sequence[Example]:
        """Return the examples that are made of ``example``, which is too long. ``place`` is the place of its row for
        messages.
        """
        made = split(example, self._most) if self._policy == "Split" else [truncated(example, self._most)]
        self._first = self._first or place
        self.rows += 1
        self._examples += len(made)
        self._tokens += len(example.ids)
        self._left_out += len(example.ids) - self._most if self._policy == "Truncate" else 0
        return made

    @property
    def notice(self) -> str:
        """A phrase that says how many rows were too long, and what became of their tokens."""
        rows = ("1 row is" if self.rows == 1 else f"{self.rows} rows are") + f" longer than {self._most} tokens"
        became = (
            f"split into {self._examples} examples, which learn each of the {self._tokens} tokens once"
            if self._policy == "Split"
            else f"cut to {self._most} tokens; {self._left_out} of the {self._tokens} tokens are left out"
        )
        return f"{rows} and {became} (longRows: {self._policy}); the first: {self._first}"


def split(example: Example, most_tokens: int) -> list[Example]:
    """Split ``example`` into examples of at most ``most_tokens`` tokens. Together they learn each token of ``example``
    exactly once, in its order, except for the first token, which no example learns. ``most_tokens`` must be at least 2.

    Each example but the first begins with the last token of the example before it. This token is only context: without
    it nothing would predict the first token that is new.
    """
    ids = example.ids
    pieces = [Example(ids[:most_tokens], ((0, min(most_tokens, len(ids))),))]
    for start in range(most_tokens, len(ids), most_tokens - 1):
        piece = ids[start - 1 : start - 1 + most_tokens]
        pieces.append(Example(piece, ((1, len(piece)),)))
    return pieces


def truncated(example: Example, most_tokens: int) -> Example:
    """Return an example of the first ``most_tokens`` tokens of ``example``, which must be longer. All of them but the
    first are learned. The end token is lost with the rest, because the text does not end there."""
    return Example(example.ids[:most_tokens], ((0, most_tokens),))
