"""Loads the tokenizer of a model folder and makes the functions that turn text into token ids.

Needs no torch: the preflight check, which runs in a small pod, makes the same token ids as the workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_core.errors import UserError
from finetune_trainer.data.examples import Tokenize
from finetune_trainer.errors import first_line


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer; raises UserError where it is missing or has no end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError("model", f"its tokenizer can't be loaded: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError("model", "its tokenizer has no end token (eos_token), so no answer could ever end")
    return tokenizer


def tokenize_with(tokenizer: PreTrainedTokenizerBase) -> Tokenize:
    """Return the functions that examples are made with."""
    end = tokenizer.eos_token_id

    def prompt(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=True)["input_ids"]
        # Some tokenizers put the end token behind every text; behind a prompt it would end the example.
        return ids[:-1] if ids and ids[-1] == end else ids

    def completion(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return Tokenize(prompt, completion, end)
