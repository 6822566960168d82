"""Loads `config.json` of a base model. `structure.py`, `load.py`, the rehearsal of the export and the preflight check
call `load_configuration`.

The module does not import torch, because the first part of the preflight check runs without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import first_line, library_boundary
from finetune_trainer.pod.faulty_field import explained
from finetune_trainer.pod.model_file_names import CONFIG_FILE
from finetune_trainer.pod.model_text_files import read_json_object

COUNTS = {"num_hidden_layers": 2_000, "num_experts": 20_000, "num_local_experts": 10_000, "n_routed_experts": 10_000}
"""Fields of a configuration that say how often transformers repeats a part of a model, and the largest values that are
accepted. The largest published models have 126 layers and 512 experts, but `num_experts` of Doge's models is 16384. A
model with a billion layers would never be built."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields of a configuration with the number of experts among which a router chooses, in all families."""
CHOSEN_EXPERTS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
)  # fmt: skip
"""Fields of a configuration with the number of experts that a router chooses for a token, in all families."""
EXPERT_GROUPS = ("n_group", "num_expert_group")
"""Fields of a configuration with the number of groups of experts. A router first chooses `topk_group` groups."""


ALWAYS_DECODERS = ("gpt_neox", "gpt_neox_japanese")
"""Types of models whose configuration has `is_decoder`, although the models do not read it."""
QUANTISATION_FIELDS = ("quantization_config", "compression_config")
"""Fields of a configuration that describe quantised weights. The library compressed-tensors once wrote
`compression_config`."""
DTYPE_FIELDS = ("dtype", "torch_dtype")
"""Fields of a configuration with the data type of the weights. The second is the older name."""
DTYPES = ("float32", "float", "float16", "half", "bfloat16", "float64", "double")
"""The names that the data types of models have in torch. transformers builds no model in another type."""


KERNEL_FIELDS = (
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
)  # fmt: skip
"""Fields of a configuration that name a kernel for attention or experts. transformers does not save these fields,
because a kernel that one machine has may be missing on another. Some published files have them nevertheless."""

ANSWER_FIELDS: Mapping[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
    "gradient_checkpointing": False,
    "chunk_size_feed_forward": 0,
}
"""Fields of a configuration that change in which form the forward pass of a model answers, what it returns beside the
logits, or how it computes the same logits, and the values that the trainer needs. The job, not the model's publisher,
chooses gradient checkpointing. A chunk of a feed-forward layer would have to divide the length of every sequence."""


def without_kernels(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``document``, the content of `config.json`, without the fields that name a kernel, also in its parts."""
    return {
        name: without_kernels(value) if isinstance(value, Mapping) else value
        for name, value in document.items()
        if name not in KERNEL_FIELDS
    }


def load_configuration(folder: Path, field: str) -> Any:
    """Return the configuration of the model in ``folder``. ``field`` is the path in the spec that messages name.

    Raises UserError if transformers can't read the configuration, or if the configuration describes a model that is no
    causal language model, that is quantised, or that is too large to be built.

    The configuration names no kernels for attention and experts, even where the file does: the trainer chooses them,
    and those in the file may not be installed. The fields `ANSWER_FIELDS` have the values that the trainer needs.
    """

    def unusable(error: BaseException) -> UserError:
        return UserError(field, f"its config.json can't be used: {first_line(error)}")

    with library_boundary(unusable):
        document = read_json_object(folder / CONFIG_FILE)
    _check_fields(document, field)
    # A wrong file can make the code of transformers raise any exception.
    with library_boundary(
        lambda error: UserError(
            field, f"its config.json can't be used: {explained(folder, [CONFIG_FILE], read_configuration, error)}"
        )
    ):
        config = read_configuration(folder)
        text = config.get_text_config()
        counts = {name: getattr(text, name, None) for name in COUNTS}
    for name, count in counts.items():
        if isinstance(count, int | float) and not 0 <= count <= COUNTS[name]:
            raise UserError(field, f"its config.json can't be used: {name} must be between 0 and {COUNTS[name]}")
    for part in _parts(text):
        _check_routing(part, json.dumps(document), field)
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


def read_configuration(folder: Path) -> Any:
    """Return the configuration of the model in ``folder`` as `load_configuration` does, without any check. Raises
    whatever a wrong file makes the code of transformers raise."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config._attn_implementation = config._experts_implementation = None
    for part in (config, config.get_text_config()):
        for name, value in ANSWER_FIELDS.items():
            if hasattr(part, name):
                setattr(part, name, value)
    return config


def _check_fields(document: Mapping[str, Any], field: str) -> None:
    """Raise UserError if transformers does not know the type of model in ``document``, the content of `config.json`, or
    if a field that describes the data type of the weights has no value that transformers reads."""
    kind = document.get("model_type")
    problem = ""
    if document and (not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES):
        problem = f"its model_type {kind!r} is none that transformers {__version__} knows"
        if "auto_map" in document:
            problem += ", and code that comes with a model (auto_map) is never run"
    inner = document.get("text_config")
    for part in (document, inner if isinstance(inner, Mapping) else {}):
        for name in QUANTISATION_FIELDS:
            value = part.get(name)
            if value is not None and not (isinstance(value, Mapping) and value):
                problem = problem or f"{name} must be left out for weights that are not quantised"
        ends = part.get("eos_token_id")
        if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends])) and ends is not None:
            problem = problem or f"eos_token_id must be a token id or a list of token ids, and is {str(ends)[:40]!r}"
        for name in DTYPE_FIELDS:
            if part.get(name) is not None and part[name] not in DTYPES:
                problem = problem or f"{name} must be float32, float16 or bfloat16, and is {str(part[name])[:40]!r}"
    if problem:
        raise UserError(field, f"its config.json can't be used: {problem}")


def _parts(config: Any) -> list[PreTrainedConfig]:
    """Return ``config`` and the configurations in it. A wrong file can have any value in the place of a configuration,
    which `structure.py` finds out later."""
    if not isinstance(config, PreTrainedConfig):
        return []
    return [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]


def _check_routing(config: Any, document: str, field: str) -> None:
    """Raise UserError if the routers that ``config`` describes can't choose experts. A model is built with these
    numbers, and fails only when a text goes through it. The message names the fields as ``document``, the text of
    `config.json`, does, because transformers has two names for some fields."""

    def written(name: str) -> str:
        others = [other for other, mapped in config.attribute_map.items() if mapped == name]
        return next((known for known in (name, *others) if f'"{known}"' in document), name)

    fields = vars(config)
    name = next((name for name in EXPERTS if isinstance(fields.get(name), int)), None)
    if name is None or fields[name] < 2:
        return  # With one expert, several families have no router.
    experts = fields[name]
    # LongCat's routers also choose among experts that return their input.
    without_weights = fields.get("zero_expert_num")
    most = experts + (without_weights if isinstance(without_weights, int) else 0)
    limits = dict.fromkeys(CHOSEN_EXPERTS, (most, name))
    for of_groups in EXPERT_GROUPS:
        groups = fields.get(of_groups)
        if not isinstance(groups, int) or groups < 2:
            continue
        limits["topk_group"] = (groups, of_groups)
        if experts % groups or experts // groups < 2:
            problem = (
                f"{written(of_groups)} must divide {written(name)} ({experts}) into groups of at least 2 experts, and"
                f" is {groups}"
            )
            raise UserError(field, f"its config.json can't be used: {problem}")
    for chosen, (limit, source) in limits.items():
        value = fields.get(chosen)
        # Hunyuan's models may have a number for each layer.
        numbers = value if isinstance(value, list) else [value]
        if value is not None and not all(type(number) is int and 1 <= number <= limit for number in numbers):
            problem = f"{written(chosen)} must be between 1 and {written(source)} ({limit}), and is {str(value)[:40]}"
            raise UserError(field, f"its config.json can't be used: {problem}")


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
    for part in (config, config.get_text_config()):
        # transformers builds no causal mask with these values.
        both = {"is_causal": not getattr(part, "is_causal", True)}
        both["use_bidirectional_attention"] = getattr(part, "use_bidirectional_attention", None) is True
        name = next((name for name, wrong in both.items() if wrong), None)
        if name is not None:
            raise UserError(
                field,
                f"config.json describes a {config.model_type!r} that reads a text in both directions ({name} is"
                f" {str(getattr(part, name)).lower()}), which is no causal language model",
            )


def model_context(config: Any) -> int | None:
    """Return the longest sequence in tokens that a model with the configuration ``config`` can read. None if the
    configuration names no limit."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None
