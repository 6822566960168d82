"""Finds out whether transformers can generate a text with a generation configuration, by generating one.

A field such as `sequence_bias` is saved and loaded in any form. A wrong form is noticed only when a text is generated.
`generation_config.py` calls `can_generate` for the configuration of an artifact.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from finetune_trainer.pod.errors import first_line, library_boundary

UNTRIED = ("stop_strings", "token_healing", "max_time")
"""Fields that a trial leaves out: the first two need a tokenizer, and the last one could end the trial too early."""
AT_MOST = {"num_beams": 3, "num_return_sequences": 2, "max_cache_len": 16}
"""Fields that need memory, and values that are large enough for a trial."""
WITHOUT_OFFLOADING = {"offloaded": "dynamic", "offloaded_static": "static"}
"""Kinds of caches that move keys and values from a GPU to the memory of the host, and the kinds of which they are made.
The trial uses no GPU."""
GREEDY = {"do_sample": False, "num_return_sequences": 1}
"""What a caller passes who wants the same text each time, for example for an evaluation, whatever the artifact says."""
NEW_TOKENS = 3
"""Number of tokens that the trial generates. Some fields have an effect only after the first token."""
LARGEST_LOGIT = 30.0
"""The logits of the tiny model lie between this number and its negative, like those of a trained model."""


def can_generate(values: Mapping[str, Any], *, vocabulary: int) -> bool:
    """Return whether transformers can generate a text with the fields ``values`` of a generation configuration.

    ``values["eos_token_id"]`` is a token id or a list of token ids. The trial uses a tiny model with ``vocabulary``
    tokens. It runs on the CPU in float32, whatever the defaults of PyTorch are, and does not change the state of any
    random number generator. Any exception of transformers means no.
    """
    fields = {name: value for name, value in values.items() if name not in UNTRIED}
    for name, most in AT_MOST.items():
        if isinstance(fields.get(name), int):
            fields[name] = min(fields[name], most)
    if (cache := fields.get("cache_implementation")) in tuple(WITHOUT_OFFLOADING):
        fields["cache_implementation"] = WITHOUT_OFFLOADING[cache]
    ends = fields["eos_token_id"] if isinstance(fields["eos_token_id"], list) else [fields["eos_token_id"]]
    with _alone():
        # Some ways of generating change the model's configuration and leave the change behind when they fail.
        model = _tiny_model(vocabulary, [number for number in ends if number < vocabulary])
        try:
            # A wrong value can make the code of transformers raise any exception.
            with library_boundary(lambda error: ValueError(first_line(error))):
                # The model has the configuration, as after loading the artifact, and not only this call.
                model.generation_config = GenerationConfig.from_dict(json.loads(json.dumps(fields)))
                # Only rank 0 exports. With ZeRO-3, transformers would otherwise wait for the other ranks at each token.
                for call in ({}, GREEDY) if fields.get("do_sample") is True else ({},):
                    model.generate(
                        torch.tensor([[0, vocabulary - 1]]), max_new_tokens=NEW_TOKENS, synced_gpus=False, **call
                    )
        except ValueError:
            return False
    return True


def _tiny_model(vocabulary: int, ends: list[int]) -> Any:
    """Return a model whose logits fall from the first token to the last and are lowest for the tokens ``ends``, so that
    a text does not end before NEW_TOKENS. No random number is drawn, because this function also runs in the processes
    of a training, whose random numbers must be the same in every attempt."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=2, max_position_embeddings=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # The layer adds nothing to the embeddings, so that both numbers before the output head are 1.
    weights = {
        name: torch.full(weight.shape, float("norm" in name or "embed" in name))
        for name, weight in model.state_dict().items()
    }
    logits = torch.linspace(LARGEST_LOGIT, -LARGEST_LOGIT, vocabulary)
    logits[ends] = -LARGEST_LOGIT
    weights["lm_head.weight"] = logits[:, None].expand(-1, 2) / 2
    model.load_state_dict(weights, assign=True)
    for module in model.modules():
        # The frequencies of rotary embeddings are no part of the state.
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape))
    return model.eval()


@contextmanager
def _alone() -> Iterator[None]:
    """Keep the trial apart from the process: PyTorch's default device and type do not count, the random numbers of the
    process are not used, and transformers' warnings about the trial are kept out of the log."""
    dtype, verbosity = torch.get_default_dtype(), logging.get_verbosity()
    with (
        torch.device("cpu"),
        torch.inference_mode(),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(action="ignore"),
    ):
        torch.set_default_dtype(torch.float32)
        logging.set_verbosity_error()
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the GPUs
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            logging.set_verbosity(verbosity)
