"""Loads `config.json` of a base model. `structure.py`, the rehearsal of the export and the preflight check call
`load_configuration`.

The module does not import torch, because the first part of the preflight check runs without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import first_line, library_boundary

COUNTS = {"num_hidden_layers": 2_000, "num_experts": 10_000, "num_local_experts": 10_000, "n_routed_experts": 10_000}
"""Fields of a configuration that say how often transformers repeats a part of a model, and the largest values that are
accepted. The largest published models have 126 layers and 512 experts. A model with a billion layers would never be
built."""


ALWAYS_DECODERS = ("gpt_neox", "gpt_neox_japanese")
"""Types of models whose configuration has `is_decoder`, although the models do not read it."""
QUANTISATION_FIELDS = ("quantization_config", "compression_config")
"""Fields of a configuration that describe quantised weights. The library compressed-tensors once wrote
`compression_config`."""


def load_configuration(folder: Path, field: str) -> Any:
    """Return the configuration of the model in ``folder``. ``field`` is the path in the spec that messages name.

    Raises UserError if transformers can't read the configuration, or if the configuration describes a model that is no
    causal language model, that is quantised, or that is too large to be built.
    """
    # A wrong file can make the code of transformers raise any exception.
    with library_boundary(lambda error: UserError(field, f"its config.json can't be used: {first_line(error)}")):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        counts = {name: getattr(text, name, None) for name in COUNTS}
    for name, count in counts.items():
        if isinstance(count, int | float) and not 0 <= count <= COUNTS[name]:
            raise UserError(field, f"its config.json can't be used: {name} must be between 0 and {COUNTS[name]}")
    _check_kind(config, field)
    for part in (config, text):
        for name in QUANTISATION_FIELDS:
            quantisation = getattr(part, name, None)
            if quantisation:
                method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
                raise UserError(
                    field,
                    f"its weights are quantised ({name} in config.json{f': {method}' if method else ''}), and must be"
                    " floating-point numbers of 16 or 32 bits; name the model from which it was made",
                )
    return config


def _check_kind(config: Any, field: str) -> None:
    """Raise UserError if ``config`` is not the configuration of a causal language model, which continues a text."""
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(field, f"config.json names model_type {config.model_type!r}, which is no causal language model")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            field, f"config.json describes a {config.model_type!r} with an encoder, which is no causal language model"
        )
    if getattr(config, "is_decoder", True) is False and config.model_type not in ALWAYS_DECODERS:
        raise UserError(
            field,
            f"config.json describes a {config.model_type!r} that reads a text in both directions (is_decoder is false),"
            " which is no causal language model",
        )


def model_context(config: Any) -> int | None:
    """Return the longest sequence in tokens that a model with the configuration ``config`` can read. None if the
    configuration names no limit."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None
