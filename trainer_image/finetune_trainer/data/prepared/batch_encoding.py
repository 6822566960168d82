"""Turns many texts into token ids with one call of the tokenizers library. `piece_batches.py` calls it.

The call goes past the Python code of transformers where that code does nothing but call the library, and asks the
library for no places of tokens in the text, which cost time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, TokenizersBackend


class EncodedText(NamedTuple):
    """The token ids of a text."""

    ids: list[int]
    mask: list[int]
    """1 for each token that the tokenizer itself put around the text, and 0 for the others."""


def encoded(tokenizer: Any, texts: Sequence[str], *, specials: bool) -> list[EncodedText]:
    """Return the ids that ``tokenizer``, a fast tokenizer of transformers, makes of each of ``texts``. With
    ``specials`` they include the tokens that the tokenizer puts around a text. Raises whatever the tokenizer raises for
    one of the texts."""
    if not calls_the_library(tokenizer):
        found = tokenizer([*texts], add_special_tokens=specials).encodings
    else:
        library = tokenizer.backend_tokenizer
        # transformers sets these three in each of its calls, and other calls may have left other values.
        if library.truncation is not None:
            library.no_truncation()
        if library.padding is not None:
            library.no_padding()
        if library.encode_special_tokens != tokenizer.split_special_tokens:
            library.encode_special_tokens = tokenizer.split_special_tokens
        found = library.encode_batch_fast([*texts], add_special_tokens=specials)
    return [EncodedText(encoding.ids, encoding.special_tokens_mask) for encoding in found]


def calls_the_library(tokenizer: Any) -> bool:
    """Return whether a call of ``tokenizer`` gives each text unchanged to the tokenizers library. Classes of some
    models change texts before."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, TokenizersBackend)
        and kind._encode_plus is TokenizersBackend._encode_plus
        and kind.__call__ is PreTrainedTokenizerBase.__call__
    )
