"""Finds out with which fields of a generation configuration transformers can't generate a text, by generating one.

A field such as `sequence_bias` is saved and loaded in any form. A wrong form is noticed only when a text is generated.
`generation_config.py` calls `unusable_fields` for the fields of an artifact's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from finetune_trainer.pod.errors import first_line, library_boundary

TRIED = (
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "early_stopping",
    "forced_bos_token_id", "forced_eos_token_id", "pad_token_id", "remove_invalid_values", "renormalize_logits",
    "sequence_bias", "suppress_tokens", "watermarking_config",
)  # fmt: skip
"""The fields whose values are no plain numbers, or are token ids, and that have an effect on every generated text."""
NEW_TOKENS = 3
"""Number of tokens that the trial generates. Some fields have an effect only after the first token."""


def unusable_fields(values: Mapping[str, Any], *, vocabulary: int) -> list[str]:
    """Return the names of those fields of TRIED in ``values`` with which transformers can't generate a text.

    Each field is tried alone, on a tiny model with ``vocabulary`` tokens. A field is unusable if transformers raises
    an exception of any kind.
    """
    present = [name for name in TRIED if values.get(name) is not None]
    if not present:
        return []
    model = _tiny_model(vocabulary)
    with _quiet():
        return [name for name in present if _fails(model, {name: values[name]}, vocabulary)]


def _fails(model: Any, values: Mapping[str, Any], vocabulary: int) -> bool:
    # The logits are all equal, of which transformers takes the first. So the text does not end before NEW_TOKENS.
    settings: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": vocabulary - 1, **values}
    try:
        # A wrong value can make the code of transformers raise any exception.
        with library_boundary(lambda error: ValueError(first_line(error))), torch.inference_mode():
            config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, **settings)
            # Only rank 0 exports. With ZeRO-3, transformers would otherwise wait for the other ranks at each token.
            model.generate(torch.ones(1, 2, dtype=torch.long), generation_config=config, synced_gpus=False)
    except ValueError:
        return True
    return False


def _tiny_model(vocabulary: int) -> Any:
    """Return a model whose logits are all zero. No random number is drawn, because this function also runs in the
    processes of a training, whose random numbers must be the same in every attempt."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=2, max_position_embeddings=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    zeros = {name: torch.zeros(weight.shape) for name, weight in model.state_dict().items()}
    model.load_state_dict(zeros, assign=True)
    for module in model.modules():
        # The frequencies of rotary embeddings are no part of the state.
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape))
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' warnings about the trial out of the log."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
