"""Turns the pieces of a rendered text into token ids. `tokenizer.py` makes a `PieceTokenizer` for the job's tokenizer.

The text is tokenised as a whole, because many tokenizers merge characters across the border of two pieces. A control
token, such as `</s>`, is a token where it stands in a text of the template, and ordinary text where it stands in a
column of the row, because people write such texts without meaning the token. In a column only `model.addedTokens` are
tokens, or all control tokens if the job sets `allowSpecialTokens`.
"""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Encoding, Tokenizer

from finetune_core.row_templates import Piece, RowError
from finetune_trainer.pod.errors import first_line, library_boundary


class PieceIds(NamedTuple):
    """The token ids of a text."""

    ids: Sequence[int]
    read_as_text: Sequence[str] = ()
    """The control tokens that stand in columns of the row and were read as ordinary text."""


class _Match(NamedTuple):
    """A control token that the tokenizer found in a text."""

    first: int
    """Place of its first character."""
    last: int
    """Place behind its last character."""
    id: int


class PieceTokenizer:
    """Tokenises texts that consist of pieces."""

    def __init__(self, tokenizer: Any, added_tokens: Sequence[str] = (), ends: Sequence[int] = ()) -> None:
        """Take ``tokenizer``, a tokenizer of transformers that already has ``added_tokens`` (`model.addedTokens`).
        These are read as tokens in columns of the row too, because the user added them for the rows. ``ends`` are the
        ids at which the model stops.

        This module does not import transformers. `__main__.py` imports this module through other modules, and the
        process that starts the preflight check must stay small.
        """
        self._tokenizer = tokenizer
        # Some models do not mark the token that ends their answers as special.
        named = {*tokenizer.all_special_ids, *ends}
        self._tokens: dict[int, AddedToken] = {
            number: token
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or number in named
        }
        """The control tokens by their ids, including `model.addedTokens`. A token of the tokenizer's
        `added_tokens_decoder` that is neither special nor a stop token is left out, because it is an ordinary word of
        the vocabulary."""
        self._all_marked = all(token.special for token in self._tokens.values())
        """Whether the tokenizer marks all control tokens as special."""
        self._everywhere = {number for number, token in self._tokens.items() if token.content in added_tokens}
        self._literal: _LiteralTokenizer | None = None
        self.end: int = tokenizer.eos_token_id
        """Id of the end token (EOS)."""

    @property
    def control_tokens(self) -> Mapping[int, str]:
        """The texts of the control tokens by their ids."""
        return {number: token.content for number, token in self._tokens.items()}

    def other_forms(self, text: str) -> list[tuple[int, int]]:
        """Return the places of the control tokens in ``text`` if ``text`` may have one of them in another form. For
        example, a normalizer can make the token `</s>` of `</S>` or `＜/s＞`. A place has the index of the first
        character of the token, and the index of the first character behind the token. Raises RowError if ``text`` can't
        be tokenised."""
        try:
            normal = self._normal(text) if self._normal_forms else ""
            if not any(form in normal for form in self._normal_forms):
                return []
            encoding = self._tokenizer(text, add_special_tokens=False).encodings[0]
            return [(match.first, match.last) for match in self._matches(encoding, text)]
        except MemoryError:
            raise
        except Exception as error:  # a tokenizer is a program from files, which can fail in every way
            raise RowError(f"can't be tokenised: {first_line(error)}") from error

    @functools.cached_property
    def _normal_forms(self) -> list[str]:
        """The texts that the tokenizer's normalizer makes of those control tokens that the tokenizer looks for in
        normalized text. Empty if the tokenizer has no normalizer."""
        if not self._tokenizer.is_fast or self._tokenizer.backend_tokenizer.normalizer is None:
            return []
        found = (self._normal(token.content).strip("▁ ") for token in self._tokens.values() if token.normalized)
        return [form for form in found if form]

    def _normal(self, text: str) -> str:
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def begin(self, pieces: Sequence[Piece]) -> PieceIds:
        """Tokenise a text that begins an example. The tokens that the tokenizer puts in front of every text, such as
        BOS, are included. If the text itself begins with these tokens, they are not doubled. The tokens that the
        tokenizer appends to every text, such as an end token, are left out, because more text may follow in the
        example.

        Raises RowError if the text can't be tokenised, or if a control token in a column can't be read as ordinary
        text.
        """
        ids, mask, found = self._encode(pieces, specials=True)
        inside = [place for place, around in enumerate(mask) if not around]
        bos = self._tokenizer.bos_token_id
        if not inside:
            # The text is empty, so the tokenizer has added all tokens: tokens in front, and perhaps an end token
            # behind.
            return PieceIds(ids[:-1] if ids and ids[-1] == self.end != bos else ids, found)
        front, text = ids[: inside[0]], ids[inside[0] : inside[-1] + 1]
        # Some tokenizers put other tokens than BOS in front, such as GLM's `[gMASK]<sop>`.
        repeated = len(front) if text[: len(front)] == front else int(bos in front and text[0] == bos)
        return PieceIds([*front, *text[repeated:]], found)

    def follow(self, pieces: Sequence[Piece]) -> PieceIds:
        """Tokenise a text that follows other text in an example. Raises RowError as `begin` does."""
        ids, _, found = self._encode(pieces, specials=False)
        return PieceIds(ids, found)

    def _encode(self, pieces: Sequence[Piece], *, specials: bool) -> tuple[list[int], list[int], Sequence[str]]:
        """Return the ids, a mask in which 1 stands for each token that the tokenizer itself put around the text, and
        the control tokens that were read as ordinary text."""
        # A tokenizer is a program from files, which can fail in every way.
        with library_boundary(lambda error: RowError(f"can't be tokenised: {first_line(error)}"), RowError):
            return self._encode_whole(pieces, specials=specials)

    def _encode_whole(self, pieces: Sequence[Piece], *, specials: bool) -> tuple[list[int], list[int], Sequence[str]]:
        text = "".join(piece.text for piece in pieces)
        if not self._tokenizer.is_fast:
            return self._encode_slowly(text, pieces, specials=specials)
        encoding: Encoding = self._tokenizer(text, add_special_tokens=specials).encodings[0]
        ids: list[int] = encoding.ids
        if self._tokens.keys().isdisjoint(ids):
            return ids, encoding.special_tokens_mask, ()
        own = _own_ranges(pieces)
        kept: list[_Match] = []
        refused: list[_Match] = []
        for match in self._matches(encoding, text):
            stays = match.id in self._everywhere or any(a <= match.first and match.last <= b for a, b in own)
            (kept if stays else refused).append(match)
        if not refused:
            return ids, encoding.special_tokens_mask, ()
        encoding, ids, text = self._as_text(text, kept, specials=specials)
        for match in self._matches(encoding, text):
            # Some tokenizers still find a control token, because their ordinary vocabulary contains it as a word.
            if match.id != self._tokenizer.unk_token_id:
                raise RowError(_unreadable(self._tokens[match.id].content))
        names = sorted({self._tokens[match.id].content for match in refused})
        return ids, encoding.special_tokens_mask, names

    def _as_text(self, text: str, kept: Sequence[_Match], *, specials: bool) -> tuple[Encoding, list[int], str]:
        """Tokenise ``text``, and read only the control tokens ``kept`` as tokens. Return the encoding, the ids, and the
        text to which the offsets of the encoding refer."""
        if not kept and self._all_marked:
            call = self._tokenizer(text, add_special_tokens=specials, split_special_tokens=True)
            return call.encodings[0], call.encodings[0].ids, text
        if self._literal is None:
            self._literal = _LiteralTokenizer(self._tokenizer.backend_tokenizer, self._tokens)
        return self._literal.encode(text, kept, specials=specials)

    def _matches(self, encoding: Encoding, text: str) -> Iterator[_Match]:
        """Yield the control tokens that are written in ``text``.

        An id alone does not show that a control token is written there. Tokenizers also give ordinary text the id of
        the unknown token or of a byte token such as `<0x0A>`, and both may be control tokens.
        """
        for number, (first, last), around in zip(
            encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True
        ):
            token = self._tokens.get(number)
            if token is None or around:
                continue
            # Some control tokens include the white space beside them.
            found = text[first:last]
            first += len(found) - len(found.lstrip())
            found, content = found.strip(), token.content.strip()
            if found == content or (token.normalized and self._normal(found) == self._normal(content)):
                yield _Match(first, first + len(found), number)

    def _encode_slowly(
        self, text: str, pieces: Sequence[Piece], *, specials: bool
    ) -> tuple[list[int], list[int], Sequence[str]]:
        """Tokenise with a tokenizer that is written in Python. It can't read a control token as ordinary text in one
        place and as a token in another. So it raises RowError for a control token in a column, unless the token is one
        of `model.addedTokens`."""
        own = _own_ranges(pieces)
        for number, token in self._tokens.items():
            place = text.find(token.content)
            while place >= 0 and number not in self._everywhere:
                if not any(a <= place and place + len(token.content) <= b for a, b in own):
                    raise RowError(_unreadable(token.content))
                place = text.find(token.content, place + 1)
        found = self._tokenizer(text, add_special_tokens=specials, return_special_tokens_mask=True)
        mask = found["special_tokens_mask"] if specials else [0] * len(found["input_ids"])
        return found["input_ids"], mask, ()


class _LiteralTokenizer:
    """A copy of a tokenizer that reads control tokens as ordinary text, except for those that `encode` is called with.

    Before a text is tokenised, the control tokens that stay tokens are replaced by placeholders. Each placeholder is a
    token of the copy with the properties of its control token. So the text around a placeholder is split as it would be
    beside the control token itself.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: dict[int, AddedToken]) -> None:
        # Nobody can write a placeholder into a row, because this part of it is drawn anew in each process.
        self._mark = secrets.token_hex(8)
        self._tokens = tokens
        self._numbers: dict[str, int] = {}
        """The ids of the control tokens by the placeholders that stand for them. A placeholder is added when it is
        needed first."""
        stored = json.loads(tokenizer.to_str())
        for token in stored["added_tokens"]:
            # Only tokens that are marked as special can be read as ordinary text.
            token["special"] = token["special"] or token["id"] in tokens
        self._copy: Tokenizer = Tokenizer.from_str(json.dumps(stored))
        self._copy.no_truncation()
        self._copy.no_padding()
        self._copy.encode_special_tokens = True

    def encode(self, text: str, kept: Sequence[_Match], *, specials: bool) -> tuple[Encoding, list[int], str]:
        """Return the encoding of ``text`` with placeholders for ``kept``, the ids with the ids of ``kept`` in place of
        the placeholders' ids, and the text with the placeholders. Raises RowError if the copy does not find the
        placeholders in the text."""
        parts: list[str] = []
        place = 0
        for match in kept:
            parts += (text[place : match.first], self._placeholder(match.id))
            place = match.last
        marked = "".join((*parts, text[place:]))
        encoding: Encoding = self._copy.encode(marked, add_special_tokens=specials)
        found = [self._numbers.get(marked[first:last].strip()) for first, last in encoding.offsets]
        if [number for number in found if number is not None] != [match.id for match in kept]:
            raise RowError(_unreadable(self._tokens[kept[0].id].content))
        ids = [number if special is None else special for number, special in zip(encoding.ids, found, strict=True)]
        return encoding, ids, marked

    def _placeholder(self, number: int) -> str:
        """Return the placeholder for the control token with the id ``number``. The first call for an id adds the
        placeholder to the tokens of the copy."""
        name = f"\ue000{self._mark}-{number}\ue001"
        if name not in self._numbers:
            token = self._tokens[number]
            placeholder = AddedToken(
                name,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=False,
            )
            self._copy.add_tokens([placeholder])
            self._numbers[name] = number
        return name


def _own_ranges(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Return the ranges of characters that come from the template and not from the row. Ranges without a gap between
    them are joined."""
    ranges: list[tuple[int, int]] = []
    place = 0
    for piece in pieces:
        first, place = place, place + len(piece.text)
        if piece.from_row:
            continue
        if ranges and ranges[-1][1] == first:
            first = ranges.pop()[0]
        ranges.append((first, place))
    return ranges


def _unreadable(content: str) -> str:
    return (
        f"holds {content!r}, a control token that the model's tokenizer can't read as ordinary text (remove it, or set"
        " allowSpecialTokens)"
    )
