"""A tiny random Llama with a word tokenizer, and rows that it can learn: made by the tests, nothing is downloaded."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

WORDS = [f"w{number}" for number in range(60)]
TEMPLATE = "ask {prompt} answer"


def write_model(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """Write model and tokenizer in transformers' layout."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<end>", "ask", "answer", *words])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return rows of uneven lengths whose completion repeats the prompt's words backwards."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(1, 9))
        made.append({"question": " ".join(words), "reply": " ".join(reversed(words))})
    return made


def write_jsonl(path: Path, values: list[dict[str, str]]) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path
