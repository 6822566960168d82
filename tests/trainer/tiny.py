"""A tiny, randomly initialized Llama with a word tokenizer, rows that this model can learn, and small tokenizers of two
other kinds.

The tests create all of them, so nothing has to be downloaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = [f"w{number}" for number in range(60)]
TEMPLATE = "ask {prompt} answer"
PROMPT_COMPLETION = {
    "promptCompletion": {
        "promptField": "question",
        "completionField": "reply",
        "template": TEMPLATE,
        "completionSuffix": " w59",
    }
}
"""The format of the rows that `rows` makes."""


def write_model(
    folder: Path,
    words: Sequence[str] = WORDS,
    *,
    tied: bool = True,
    files: str = "5GB",
    seed: int = 7,
    **shape: Any,
) -> Path:
    """Write model and tokenizer to ``folder`` in transformers' layout, and return the folder.

    ``shape`` changes fields of the LlamaConfig. ``files`` is the largest size of a weight file, for example "60KB".
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = write_word_tokenizer(folder, words)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    config = LlamaConfig(**(sizes | shape), tie_word_embeddings=tied, eos_token_id=1, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=files)
    return folder


def write_word_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> int:
    """Write a tokenizer with one token for each of ``words`` to ``folder``, and return its number of tokens. Token 1
    ends an answer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<end>", "ask", "answer", *words])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    return len(vocabulary)


def write_byte_tokenizer(folder: Path) -> int:
    """Write a byte-level tokenizer like that of GPT-2 and Qwen to ``folder``, and return its number of tokens. Token 1
    ends an answer."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([f"ask {' '.join(WORDS)} answer"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_llama_tokenizer(folder: Path) -> Path:
    """Write a small BPE tokenizer like that of Llama 2 to ``folder``, and return the folder. The tokenizer has a space
    mark before words, and byte tokens for unknown characters."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = ["inform name it what is inform(name[it]) request(genres[puzzle])"] * 20
    inner.train_from_iterator(text, BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return rows of different lengths whose completion repeats the words of the prompt in reverse order."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(1, 9))
        made.append({"question": " ".join(words), "reply": " ".join(reversed(words))})
    return made


def write_jsonl(path: Path, values: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path
