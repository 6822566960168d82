"""A `PieceTokenizer` that makes the same token ids with less work. `chunk_outcomes.py` tells it the texts of a whole
chunk of rows, which one call of the tokenizer turns into ids. A rendered conversation is cut at its control tokens, and
each part is tokenised once, because the renderings of one conversation have most of their parts in common.

Whatever this module can't do in the short way, `PieceTokenizer` does in its own way, also each error.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from finetune_core.row_templates import Piece
from finetune_trainer.data.piece_tokens import PieceTokenizer
from finetune_trainer.data.prepared.batch_encoding import EncodedText, calls_the_library, encoded
from finetune_trainer.pod.errors import first_line, library_boundary

PLACELESS = frozenset(
    (
        "BertPreTokenizer",
        "ByteLevel",
        "CharDelimiterSplit",
        "Digits",
        "Punctuation",
        "Split",
        "UnicodeScripts",
        "Whitespace",
        "WhitespaceSplit",
    )
)
"""Pre-tokenizers of the tokenizers library that do the same to a part of a text wherever the part stands in the text.
Metaspace is one too, unless it treats the beginning of the text in another way."""

WINDOW_IDS = 1_000_000
"""Once so many ids of whole texts are kept, they are forgotten. The texts of a conversation contain each other, so
thousands of them would fill the memory."""


class AheadText(NamedTuple):
    """A text that will be tokenised."""

    text: str
    begins: bool
    """Whether the text begins an example (`PieceTokenizer.begin`), or follows other text (`follow`)."""


class _BatchError(Exception):
    """The tokenizer failed for a batch of texts."""


class BatchPieceTokenizer(PieceTokenizer):
    """Tokenises texts that consist of pieces, and knows the ids of texts that were tokenised ahead."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, added_tokens: Sequence[str] = (), ends: Sequence[int] = ()
    ) -> None:
        """Take the arguments of `PieceTokenizer`."""
        super().__init__(tokenizer, added_tokens, ends)
        self._ahead: dict[AheadText, EncodedText] = {}
        self._window: dict[str, EncodedText] = {}
        """The ids of texts for `follow`."""
        self._window_ids = 0
        self._parts = _Parts(tokenizer) if are_parts_independent(tokenizer) else None
        self.calls = 0
        """How many texts were tokenised in the way of `PieceTokenizer`, each with a call of its own."""

    def encode_ahead(self, texts: Iterable[AheadText]) -> None:
        """Tokenise ``texts`` with two calls of the tokenizer at most, and keep the ids until `forget` is called. Where
        the tokenizer fails for one of the texts, no ids are kept."""
        if not self._tokenizer.is_fast:
            return
        for begins in (True, False):
            batch = list(dict.fromkeys(text for text in texts if text.begins is begins))
            if not batch:
                continue
            try:
                with library_boundary(lambda error: _BatchError(first_line(error))):
                    made = encoded(self._tokenizer, [text.text for text in batch], specials=begins)
            except _BatchError:
                return
            self._ahead.update(zip(batch, made, strict=True))

    def follow_ahead(self, texts: Sequence[str]) -> None:
        """Tokenise ``texts``, in which each control token is meant as a token and which follow other text, with one
        call of the tokenizer at most. Where the tokenizer fails for one of the texts, no ids are kept."""
        if not self._tokenizer.is_fast:
            return
        with contextlib.suppress(_BatchError), library_boundary(lambda error: _BatchError(first_line(error))):
            if self._parts is not None:
                self._parts.encode(texts)
                return
            made = encoded(self._tokenizer, texts, specials=False)
            if self._window_ids > WINDOW_IDS:
                self._window, self._window_ids = {}, 0
            self._window.update(zip(texts, made, strict=True))
            self._window_ids += sum(len(each.ids) for each in made)

    def forget(self) -> None:
        """Forget all texts whose ids are known."""
        self._ahead.clear()
        self._window, self._window_ids = {}, 0
        if self._parts is not None:
            self._parts.known.clear()

    def _encode_whole(self, pieces: Sequence[Piece], *, specials: bool) -> tuple[list[int], list[int], Sequence[str]]:
        text = "".join(piece.text for piece in pieces)
        # In a text without a piece of a row, every control token is meant as a token.
        is_own = not any(piece.from_row for piece in pieces)
        known = self._ahead.get(AheadText(text, specials)) or (self._window.get(text) if not specials else None)
        if known is not None and (is_own or self._tokens.keys().isdisjoint(known.ids)):
            return known.ids, known.mask, ()
        if self._parts is not None and is_own and not specials:
            # Where a part can't be tokenised, the whole text shows the error.
            with contextlib.suppress(_BatchError), library_boundary(lambda error: _BatchError(first_line(error))):
                ids = self._parts.ids(text)
                return ids, [0] * len(ids), ()
        self.calls += 1
        return super()._encode_whole(pieces, specials=specials)


class _Parts:
    """Tokenises texts part by part. A part is a control token, or the text between two of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        stored = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
        self._tokens: Mapping[str, int] = {token["content"]: token["id"] for token in stored if token["content"]}
        # Of two tokens that begin at the same place, the tokenizers library takes the longer one.
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.known: dict[str, list[int]] = {}
        """The ids of the parts that were tokenised."""

    def ids(self, text: str) -> list[int]:
        """Return the ids of ``text``, to which no special tokens are added."""
        ids: list[int] = []
        for part in self.encode([text])[0]:
            number = self._tokens.get(part)
            if number is None:
                ids += self.known[part]
            else:
                ids.append(number)
        return ids

    def encode(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the parts of each of ``texts``, after those whose ids are not known were tokenised with one call."""
        parts = [[part for part in self._cut.split(text) if part] for text in texts]
        missing = list(
            dict.fromkeys(
                part for each in parts for part in each if part not in self._tokens and part not in self.known
            )
        )
        if missing:
            made = encoded(self._tokenizer, missing, specials=False)
            self.known.update((part, each.ids) for part, each in zip(missing, made, strict=True))
        return parts


def are_parts_independent(tokenizer: Any) -> bool:
    """Return whether the ids of a text are always those of its parts, one behind the other, where a part is a token of
    the tokenizer's `added_tokens_decoder`, or the text between two such tokens.

    The tokenizers library first cuts a text at these tokens. Each part between them is then normalized, pre-tokenised
    and tokenised by itself (`AddedVocabulary::extract_and_normalize`, `TokenizerImpl::encode_single_sequence`). So the
    ids are independent if the tokens are looked for in the text as it is, take no white space beside them, and if no
    pre-tokenizer looks at the place of a part.
    """
    if not calls_the_library(tokenizer):
        return False
    if tokenizer.split_special_tokens:
        return False  # the tokens are ordinary text
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    if any(token[flag] for token in stored["added_tokens"] for flag in flags):
        return False
    return not stored["model"].get("dropout") and _is_placeless(stored["pre_tokenizer"])


def _is_placeless(stored: Mapping[str, Any] | None) -> bool:
    """Return whether a pre-tokenizer, as tokenizer.json has it, does the same at every place of a text."""
    if stored is None or stored["type"] in PLACELESS:
        return True
    if stored["type"] == "Sequence":
        return all(_is_placeless(inner) for inner in stored["pretokenizers"])
    return stored["type"] == "Metaspace" and stored.get("prepend_scheme") in ("always", "never")
