"""`BatchPieceTokenizer` has the ids of `PieceTokenizer` for any text and any tokenizer, and cuts texts into parts only
with tokenizers that allow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from finetune_core.row_templates import Piece, RowError
from finetune_trainer.data.piece_tokens import PieceTokenizer
from finetune_trainer.data.prepared.piece_batches import AheadText, BatchPieceTokenizer, are_parts_independent
from finetune_trainer.data.tokenizer import load_tokenizer
from tests.trainer import tiny
from tests.trainer.chat import byte_tokenizer, published

CONTROL = ("<end>", "<|im_end|>", "<|im_start|>", "<think>", "</s>", "<s>")
ALPHABET = (*CONTROL, " ", "\n", "▁", "w1", "w", "1", "<", "|", "end>", "É", "é", "ß", "🙂", "a b")


def made(pre_tokenizer: Any = None, normalizer: Any = None, **flags: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters and of a few longer tokens, with CONTROL as control tokens. ``flags`` are
    properties of `<end>`."""
    letters = sorted({letter for text in ALPHABET for letter in text} | {"▁", "[UNK]"})
    vocabulary = {letter: number for number, letter in enumerate([*letters, "▁w", "w1", "▁w1", " w"])}
    merges = [("▁", "w"), ("w", "1"), ("▁w", "1"), (" ", "w")]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="[UNK]"))
    if pre_tokenizer is not None:
        inner.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        inner.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL if token != "<end>"])
    tokenizer.add_tokens([AddedToken("<end>", special=True, **{"normalized": False, **flags})])
    return tokenizer


def around() -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts tokens around each text that begins an example."""
    tokenizer = made()
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), template]
    )
    return tokenizer


def literal() -> PreTrainedTokenizerFast:
    """Return a tokenizer that reads control tokens in texts as ordinary text."""
    tokenizer = made()
    tokenizer.split_special_tokens = True
    return tokenizer


def llama(folder: Path) -> Any:
    return load_tokenizer(tiny.write_llama_tokenizer(folder / "llama"))


def gpt(folder: Path) -> Any:
    tiny.write_byte_tokenizer(folder / "gpt")
    return load_tokenizer(folder / "gpt")


def words(folder: Path) -> Any:
    tiny.write_word_tokenizer(folder / "words")
    return load_tokenizer(folder / "words")


TOKENIZERS: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "bytes": (lambda _: byte_tokenizer(published("qwen3")), True),
    "words": (words, True),
    "gpt": (gpt, True),
    "plain": (lambda _: made(), True),
    "metaspace, always": (lambda _: made(pre_tokenizers.Metaspace(prepend_scheme="always")), True),
    "metaspace, never": (lambda _: made(pre_tokenizers.Metaspace(prepend_scheme="never")), True),
    "metaspace, first": (lambda _: made(pre_tokenizers.Metaspace(prepend_scheme="first")), False),
    "sequence with first": (
        lambda _: made(
            pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Metaspace(prepend_scheme="first")])
        ),
        False,
    ),
    "split": (lambda _: made(pre_tokenizers.Split(" ", "merged_with_next")), True),
    "prepended": (lambda _: made(None, normalizers.Prepend("▁")), True),
    "normalizer": (lambda _: made(None, normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])), True),
    "white space beside a token": (lambda _: made(lstrip=True, rstrip=True), False),
    "a token that is a word": (lambda _: made(single_word=True), False),
    "a token in normalized text": (lambda _: made(None, normalizers.Lowercase(), normalized=True), False),
    "tokens around each text": (lambda _: around(), True),
    "control tokens are text": (lambda _: literal(), False),
    "llama": (llama, True),
}
"""Tokenizers, each with whether its texts can be cut into parts."""
TEXTS = st.lists(st.sampled_from(ALPHABET), max_size=8).map("".join)
PIECES = st.lists(st.builds(Piece, TEXTS, st.booleans()), max_size=4)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: make(folder) for name, (make, _) in TOKENIZERS.items()}


def result(call: Callable[[Sequence[Piece]], Any], pieces: Sequence[Piece]) -> object:
    """Return the ids and the control tokens that were read as text, or the phrase of the error."""
    try:
        found = call(pieces)
    except RowError as error:
        return str(error)
    return list(found.ids), list(found.read_as_text)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40)
@given(st.lists(PIECES, min_size=1, max_size=4), st.booleans())
def test_any_text_has_the_same_ids(
    tokenizers: dict[str, Any], name: str, texts: list[list[Piece]], ahead: bool
) -> None:
    tokenizer = tokenizers[name]
    slow, fast = PieceTokenizer(tokenizer), BatchPieceTokenizer(tokenizer)
    if ahead:
        joined = ["".join(piece.text for piece in pieces) for pieces in texts]
        fast.encode_ahead([AheadText(text, begins) for text in joined for begins in (True, False)])
    for pieces in texts:
        assert result(fast.begin, pieces) == result(slow.begin, pieces)
        assert result(fast.follow, pieces) == result(slow.follow, pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_cut_only_with_tokenizers_that_allow_it(tokenizers: dict[str, Any], name: str) -> None:
    assert are_parts_independent(tokenizers[name]) is TOKENIZERS[name][1]


def test_a_text_that_can_not_be_tokenised_does_not_harm_the_others(tokenizers: dict[str, Any]) -> None:
    pieces = BatchPieceTokenizer(tokenizers["bytes"])
    pieces.encode_ahead([AheadText("good", begins=False), AheadText("\ud800", begins=False)])
    assert list(pieces.follow([Piece("good", from_row=True)]).ids) == list(
        PieceTokenizer(tokenizers["bytes"]).follow([Piece("good", from_row=True)]).ids
    )
    for from_row in (True, False):
        bad = [Piece("\ud800", from_row)]
        slow = PieceTokenizer(tokenizers["bytes"])
        assert result(pieces.follow, bad) == result(slow.follow, bad)
        with pytest.raises(RowError, match="can't be tokenised"):
            pieces.follow(bad)


def test_nothing_is_kept_after_forget(tokenizers: dict[str, Any]) -> None:
    pieces = BatchPieceTokenizer(tokenizers["bytes"])
    pieces.encode_ahead([AheadText("good", begins=False)])
    pieces.follow([Piece("good", from_row=True)])
    assert pieces.calls == 0
    pieces.forget()
    pieces.follow([Piece("good", from_row=True)])
    assert pieces.calls == 1
