"""Chat templates of published models, which trl ships as files, and a small tokenizer that has their control tokens."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune_core.api.dataset import MessagesFormat
from finetune_trainer.data.chat.chat_template import ChatTemplate
from finetune_trainer.data.chat.conversations import conversation_renderer
from finetune_trainer.data.examples import Example
from finetune_trainer.data.piece_tokens import PieceTokenizer

CONTROL = r"<[|｜][^<>\s'\"]{1,40}?>|<[a-z_\"]+\|>|<(?:start_of_turn|end_of_turn|end_of_utterance|/s)>"
"""Regular expression that matches the control tokens in the text of a template."""
WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Texts that are tokens in some tokenizers, such as Qwen's, but no special tokens."""


def template_folder() -> Path:
    """Return the folder with the templates, without importing trl, whose dependencies are not installed."""
    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(next(iter(found.submodule_search_locations))) / "chat_templates"


def published(name: str) -> str:
    """Return the text of a published template, for example of `qwen3`."""
    return (template_folder() / f"{name}.jinja").read_text(encoding="utf-8")


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the single bytes, the pair of two line breaks, `<bos>`, `<eos>`, the control
    tokens of ``template``, and WORDS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"ĊĊ": len(alphabet)}
    model = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>", eos_token="<eos>")
    control = sorted(set(re.findall(CONTROL, template)))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in WORDS])
    tokenizer.chat_template = template
    return tokenizer


def renderer(
    tokenizer: PreTrainedTokenizerFast, ends: Sequence[str] = (), today: date | None = None, **form: Any
) -> Callable[[Mapping[str, Any]], Sequence[Example] | str]:
    """Return a function that makes the examples of a row, or the phrase with which the row is refused.

    ``ends`` are the tokens at which the model stops, besides `<eos>`. ``today`` is the date that the chat template
    gets, and ``form`` has fields of `dataset.format.messages`.

    The function renders all rows in one child process, as in a job, because a fork of the large test process takes far
    longer than the rendering of a row. The child process ends when the function is deleted.
    """
    stops = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(token) for token in ends)]
    template = ChatTemplate(tokenizer, PieceTokenizer(tokenizer, ends=stops), ends=stops, today=today)
    return conversation_renderer(MessagesFormat.model_validate(form), template, tokenizer.eos_token_id)


def rendered(
    tokenizer: PreTrainedTokenizerFast,
    row: Mapping[str, Any],
    ends: Sequence[str] = (),
    today: date | None = None,
    **form: Any,
) -> Sequence[Example] | str:
    """Return what the function of `renderer` returns for the single row ``row``."""
    return renderer(tokenizer, ends, today, **form)(row)


def learned(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example] | str) -> list[list[str]]:
    """Return, for each example, the texts that are learned."""
    assert not isinstance(examples, str), examples
    return [[tokenizer.decode(list(example.ids[a:b])) for a, b in example.spans] for example in examples]
