"""Loads the model's tokenizer, adds `model.addedTokens`, and makes the functions that turn text into token ids for
`formats.py`.

The module does not import torch, so that the preflight pod, which works without torch, can compute the same token ids
as the workers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from finetune_core.api.dataset import DatasetFormat
from finetune_core.errors import UserError
from finetune_trainer.data.chat.chat_template import ChatTemplate
from finetune_trainer.data.chat.conversations import answer_ends
from finetune_trainer.data.formats import TokenizeFunctions
from finetune_trainer.data.piece_tokens import PieceTokenizer
from finetune_trainer.data.prompts import completion_ending
from finetune_trainer.pod.errors import first_line, library_boundary


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the model's folder. Raises UserError if there is no tokenizer or if the tokenizer has no
    end token."""
    # transformers and tokenizers raise whatever a wrong file makes their code raise.
    with library_boundary(lambda error: UserError("model", f"its tokenizer can't be loaded: {first_line(error)}")):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with library_boundary(_unusable):
        end = tokenizer.eos_token_id
        # Some wrong values show only when they are used. Nothing here depends on the text of a row.
        tokenizer("")
        len(tokenizer)
        # Looking up a token that is in no vocabulary needs the unknown token, which may be such a token itself.
        list(tokenizer.all_special_ids)
        dict(tokenizer.added_tokens_decoder)
        tokenizer.decode([end] if end is not None else [])
    if end is None:
        raise UserError("model", "its tokenizer has no end token (eos_token), so no answer could ever end")
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add ``tokens`` to the tokenizer and return their ids. Raises UserError if the tokenizer already has one of the
    tokens.

    An added token matches only its exact text: surrounding spaces are kept, and the text is not normalized first.
    """
    with library_boundary(_unusable):
        known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise UserError("model.addedTokens", f"must not hold {token!r}: the model's tokenizer has it already")
    added = [AddedToken(token, special=True, normalized=False, lstrip=False, rstrip=False) for token in tokens]
    with library_boundary(_unusable):
        tokenizer.add_tokens(added, special_tokens=True)
        return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def _unusable(error: BaseException) -> UserError:
    return UserError("model", f"its tokenizer can't be used: {first_line(error)}")


def tokenize_functions(
    tokenizer: PreTrainedTokenizerBase,
    added_tokens: Sequence[str] = (),
    *,
    ends: Sequence[int] = (),
    today: date | None = None,
) -> TokenizeFunctions:
    """Return the functions with which `formats.py` turns text into token ids. ``added_tokens`` are those of
    `model.addedTokens` that the tokenizer has. ``ends`` are the ids of `stop_ids`, and only the end token if empty.
    ``today`` is the date that a chat template gets; None means the real one."""
    end, pieces = tokenizer.eos_token_id, PieceTokenizer(tokenizer, added_tokens, ends)
    if not tokenizer.chat_template:
        return TokenizeFunctions(pieces, end)
    chat = ChatTemplate(tokenizer, pieces, ends=ends or [end], today=today, added_tokens=added_tokens)
    return TokenizeFunctions(pieces, end, chat)


def stop_ids(tokenizer: PreTrainedTokenizerBase, form: DatasetFormat, model_stop_ids: Sequence[int] = ()) -> list[int]:
    """Return the ids of the tokens at which generation stops. These are the end token, the ids of ``model_stop_ids``
    that the tokenizer knows, the token that ends an answer of the chat template, and the first added token in what
    every completion ends with: in the text behind the last column of `completion`, or in `completionSuffix`.

    An ending of ordinary text adds no stop token, because the same token may occur within an answer.
    """
    ending = completion_ending(form.prompt_completion) if form.prompt_completion is not None else ""
    with library_boundary(_unusable):
        ids: Sequence[int] = tokenizer(ending, add_special_tokens=False)["input_ids"] if ending else []
    added = [number for number in ids if number in tokenizer.added_tokens_decoder and number != tokenizer.unk_token_id]
    ends = {tokenizer.eos_token_id, *added[:1], *(n for n in model_stop_ids if 0 <= n < len(tokenizer))}
    if form.messages is not None and tokenizer.chat_template:
        template = ChatTemplate(tokenizer, PieceTokenizer(tokenizer, ends=sorted(ends)), ends=sorted(ends))
        ends.update(answer_ends(form.messages, template, tokenizer.eos_token_id))
    return sorted(ends)


def model_stop_ids(folder: Path) -> list[int]:
    """Return the ids at which the model in ``folder`` stops, as its generation_config.json says, or else its
    config.json. Empty if neither says so in a form that can be read."""
    for name in ("generation_config.json", "config.json"):
        try:
            declared = json.loads((folder / name).read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # `load.py` and the preflight check say what is wrong with the files of a model
        found = declared if isinstance(declared, list) else [declared]
        ids = [number for number in found if isinstance(number, int) and not isinstance(number, bool)]
        if ids:
            return ids
    return []
