"""Tiny, randomly initialized models of the families that transformers can train, made from transformers' own
configurations, with one of the two tokenizers of `tiny.py`.

`FAMILIES` describes each family. `write_family` writes the files of a family with the names of tensors that the
family's maker publishes. For many families these names differ from the names in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.trainer import tiny

SHAPE: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
"""Fields of the configuration of a tiny model, mostly sizes, as far as its family does not set them itself (see
`Family.shape`). Fields that the configuration of a family does not have are left out."""

MAMBA_2: Mapping[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
"""The sizes of Mamba-2 layers in a model of 32 features."""
SLIDING = ["sliding_attention", "full_attention"]
LINEAR = ["linear_attention", "full_attention"]
SIGLIP: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
"""The sizes of a vision tower."""


@dataclass(frozen=True)
class Family:
    """How the tiny model of a family is made."""

    model_type: str
    """The type in `config.json`."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration, in addition to SHAPE or instead of it."""
    text: str = ""
    """Model type of the text part of a model that also reads images. `shape` then describes the text part. Empty for a
    model that only reads text."""
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The configurations of the other parts, by their field in the configuration, for example `vision_config`."""
    whole: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration that belong to no part."""
    architecture: str = ""
    """Class of the published model. Empty where `AutoModelForCausalLM` makes a model of this class."""
    prefixes: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of the tensor names that transformers writes, each with the beginning that published files have
    instead."""
    bytes: bool = False
    """Whether the tokenizer is byte-level. For some families transformers makes a byte-level tokenizer, whatever the
    tokenizer's files say."""
    unused: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Tensors of published files that transformers does not read, with their shapes."""


FAMILIES: Mapping[str, Family] = {
    "afmoe": Family("afmoe", {"num_dense_layers": 1, "layer_types": SLIDING}),
    "apertus": Family("apertus"),
    "arcee": Family("arcee"),
    "bailing-hybrid": Family("bailing_hybrid"),
    "bamba": Family("bamba", {**MAMBA_2, "attn_layer_indices": [1]}),
    "bert": Family("bert"),
    "bitnet": Family("bitnet"),
    "bloom": Family("bloom", prefixes={"transformer.": ""}),
    "codegen": Family("codegen", {"rotary_dim": 4, "num_attention_heads": 4}),
    "cohere": Family("cohere", {"logit_scale": 0.5}),
    "cohere2": Family("cohere2", {"logit_scale": 0.5, "layer_types": SLIDING}),
    "cohere2-moe": Family("cohere2_moe", {"logit_scale": 0.5}),
    "cwm": Family("cwm", {"bos_token_id": 0, "layer_types": SLIDING}),
    "dbrx": Family(
        "dbrx",
        {
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek-v2": Family("deepseek_v2", {"head_dim": 8, "num_key_value_heads": 2}),
    # The published files have one more layer than the configuration says. This layer predicts the token after the next.
    "deepseek-v3": Family(
        "deepseek_v3", {"num_key_value_heads": 2}, unused={"model.layers.2.eh_proj.weight": (32, 64)}
    ),
    "deepseek-v3.2": Family("deepseek_v32", {"num_key_value_heads": 2}),
    "deepseek-v4": Family(
        "deepseek_v4",
        {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
        prefixes={"model.embed_tokens.": "embed.", "model.hc_head.hc_": "hc_head_", "model.": ""},
    ),
    "diffllama": Family("diffllama", {"num_key_value_heads": 2}),
    "doge": Family("doge"),
    "dots1": Family("dots1", {"num_key_value_heads": 2}),
    "ernie-4.5": Family("ernie4_5"),
    "ernie-4.5-moe": Family("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}),
    "exaone-4": Family("exaone4", {"layer_types": SLIDING}),
    "exaone-moe": Family("exaone_moe", {"layer_types": SLIDING}),
    "falcon": Family("falcon", {"num_kv_heads": 1}),
    "falcon-40b": Family("falcon", {"num_kv_heads": 1, "new_decoder_architecture": True}),
    "falcon-alibi": Family(
        "falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "num_kv_heads": 2}
    ),
    "falcon-h1": Family("falcon_h1", {**MAMBA_2, "mamba_d_ssm": 64}),
    "falcon-mamba": Family("falcon_mamba", {"state_size": 8}),
    "flex-olmo": Family("flex_olmo"),
    "gemma": Family("gemma"),
    "gemma-2": Family("gemma2", {"query_pre_attn_scalar": 16, "layer_types": SLIDING}),
    "gemma-3": Family("gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": SLIDING}),
    "gemma-3-vision": Family(
        "gemma3",
        {"query_pre_attn_scalar": 16, "layer_types": SLIDING},
        text="gemma3_text",
        parts={"vision_config": {"model_type": "siglip_vision_model", **SIGLIP}},
        whole={"mm_tokens_per_image": 1, "boi_token_index": 60, "eoi_token_index": 61, "image_token_index": 62},
        prefixes={"vision_tower.": "vision_tower.vision_model."},
    ),
    "gemma-3n": Family(
        "gemma3n_text",
        {
            "intermediate_size": [48] * 4,
            "num_hidden_layers": 4,
            "layer_types": [*SLIDING, *SLIDING],
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "laurel_rank": 4,
            "pad_token_id": 0,
        },
    ),
    "gemma-4": Family(
        "gemma4_text",
        {
            "layer_types": SLIDING,
            "per_layer_config": {"1": {"head_dim": 16}},
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "glm": Family("glm"),
    "glm-4": Family("glm4"),
    "glm-4-moe": Family("glm4_moe"),
    "glm-4-moe-lite": Family("glm4_moe_lite", {"num_key_value_heads": 2}),
    "glm-moe-dsa": Family("glm_moe_dsa", {"num_key_value_heads": 2}),
    "gpt-2": Family("gpt2", prefixes={"transformer.": ""}, unused={"h.0.attn.bias": (1, 1, 128, 128)}),
    "gpt-bigcode": Family("gpt_bigcode"),
    "gpt-j": Family("gptj", {"rotary_dim": 8}),
    "gpt-neo": Family(
        "gpt_neo",
        {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gpt-neox": Family("gpt_neox"),
    "gpt-oss": Family("gpt_oss", {"layer_types": SLIDING}),
    "granite": Family("granite", {"logits_scaling": 2.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}),
    "granite-4": Family(
        "granitemoehybrid",
        {**MAMBA_2, "layer_types": LINEAR, "shared_intermediate_size": 16, "position_embedding_type": "rope"},
    ),
    "granite-moe": Family("granitemoe"),
    "granite-moe-shared": Family("granitemoeshared", {"shared_intermediate_size": 16}),
    "helium": Family("helium"),
    "hunyuan-dense": Family("hunyuan_v1_dense"),
    "hunyuan-moe": Family("hunyuan_v1_moe"),
    "hy-v3": Family("hy_v3"),
    "jamba": Family(
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "jetmoe": Family("jetmoe", {"kv_channels": 16, "num_key_value_heads": 1}),
    "kimi-linear": Family(
        "kimi_linear",
        {
            "layer_types": LINEAR,
            "mlp_layer_types": ["dense", "sparse"],
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "num_key_value_heads": 2,
        },
    ),
    "lfm2": Family("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "lfm2-moe": Family("lfm2_moe", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "lfm3": Family("lfm3", {"layer_types": ["conv", "full_attention"]}),
    "llama-2": Family(
        "llama", {"num_key_value_heads": 2}, unused={"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    ),
    "llama-3": Family(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama-3-tied": Family("llama", {"tie_word_embeddings": True}),
    "llama-4": Family(
        "llama4_text",
        {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 8, "no_rope_layers": [1, 0]},
    ),
    "llama-4-vision": Family(
        "llama4",
        {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 8, "no_rope_layers": [1, 0]},
        text="llama4_text",
        parts={
            "vision_config": {
                **SIGLIP,
                "intermediate_size": 64,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            }
        },
        whole={"boi_token_index": 60, "eoi_token_index": 61, "image_token_index": 62},
        architecture="Llama4ForConditionalGeneration",
    ),
    "mamba": Family("mamba", {"state_size": 8}),
    "mamba-2": Family("mamba2", {"state_size": 8, "num_heads": 4, "n_groups": 1, "chunk_size": 8}),
    "mimo-v2-flash": Family("mimo_v2_flash"),
    "minicpm-3": Family("minicpm3", {"num_key_value_heads": 2, "dim_model_base": 32}),
    "minimax": Family("minimax", {"layer_types": LINEAR, "block_size": 8}),
    "minimax-m2": Family("minimax_m2"),
    "ministral": Family("ministral", {"layer_types": SLIDING}),
    "ministral-3": Family("ministral3"),
    "mistral": Family("mistral"),
    "mixtral": Family("mixtral"),
    "modernbert-decoder": Family("modernbert-decoder", {"pad_token_id": 0, "bos_token_id": 0, "layer_types": SLIDING}),
    "mpt": Family("mpt", {"max_seq_len": 128}),
    "nanochat": Family("nanochat"),
    "nemotron": Family("nemotron"),
    "nemotron-h": Family(
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 16,
            "use_mamba_kernels": False,
        },
    ),
    "olmo": Family("olmo"),
    "olmo-2": Family("olmo2"),
    "olmo-3": Family("olmo3", {"layer_types": SLIDING}),
    "olmo-hybrid": Family("olmo_hybrid", {"layer_types": LINEAR}),
    "olmoe": Family("olmoe"),
    "openai-gpt": Family("openai-gpt"),
    "opt": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-350m": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "persimmon": Family("persimmon"),
    "phi": Family("phi"),
    "phi-3": Family("phi3"),
    "phi-moe": Family("phimoe"),
    "qwen2": Family("qwen2", bytes=True),
    "qwen2-sliding": Family("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, bytes=True),
    "qwen2-moe": Family("qwen2_moe", {"decoder_sparse_step": 1}),
    "qwen3": Family("qwen3", {"tie_word_embeddings": True}),
    "qwen3-moe": Family("qwen3_moe", {"decoder_sparse_step": 1}),
    "qwen3-next": Family("qwen3_next", {"layer_types": LINEAR}),
    "qwen3.5": Family("qwen3_5_text", {"layer_types": LINEAR}),
    "qwen3.5-moe": Family("qwen3_5_moe_text", {"layer_types": LINEAR}, bytes=True),
    "qwen3.5-vision": Family(
        "qwen3_5",
        {"layer_types": LINEAR},
        text="qwen3_5_text",
        parts={
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "patch_size": 8,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
            }
        },
        whole={"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63},
        architecture="Qwen3_5ForConditionalGeneration",
        bytes=True,
    ),
    "recurrent-gemma": Family(
        "recurrent_gemma", {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]}
    ),
    "rwkv": Family("rwkv", {"attention_hidden_size": 32}),
    "seed-oss": Family("seed_oss"),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0]}),
    "solar-open": Family("solar_open"),
    "stablelm": Family("stablelm"),
    "starcoder2": Family("starcoder2"),
    "vaultgemma": Family("vaultgemma", {"query_pre_attn_scalar": 16, "layer_types": SLIDING}),
    "youtu": Family("youtu", {"num_key_value_heads": 2}),
    "zamba2": Family(
        "zamba2",
        {
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_expand": 2,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "attention_head_dim": 32,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "adapter_rank": 4,
            "use_mem_eff_path": False,
        },
    ),
    "zaya": Family("zaya", {"num_experts_per_tok": 1, "router_hidden_size": 16}),
}
"""The families by their names in docs/models.md."""


def family_configuration(name: str, *, vocabulary: int) -> Any:
    """Return transformers' configuration of the tiny model ``name``, with ``vocabulary`` tokens."""
    from transformers import CONFIG_MAPPING

    family = FAMILIES[name]
    text = _sized(family.text or family.model_type, {"vocab_size": vocabulary, **family.shape})
    if not family.text:
        return CONFIG_MAPPING[family.model_type](**text)
    nested = {"text_config": {"model_type": family.text, **text}, **family.parts, **family.whole}
    return CONFIG_MAPPING[family.model_type](**nested)


def _sized(model_type: str, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``shape``, and those sizes of SHAPE that configurations of ``model_type`` have."""
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[model_type]
    fields = {*known.attribute_map, *getattr(known, "__dataclass_fields__", {})}
    return {key: value for key, value in SHAPE.items() if key in fields} | dict(shape)


def write_family(name: str, folder: Path, *, seed: int = 7) -> Path:
    """Write the tiny model ``name`` and its tokenizer to ``folder``, and return the folder.

    The names of the tensors are those that the family publishes. The weights are large enough for each layer to change
    the logits: with the small weights that transformers draws, the logits would not show a broken layer.
    """
    import torch
    import transformers

    write_tokenizer = tiny.write_byte_tokenizer if FAMILIES[name].bytes else tiny.write_word_tokenizer
    configuration = family_configuration(name, vocabulary=write_tokenizer(folder))
    torch.manual_seed(seed)
    published = FAMILIES[name].architecture
    model = (
        getattr(transformers, published)(configuration)
        if published
        else transformers.AutoModelForCausalLM.from_config(configuration)
    )
    with torch.no_grad():
        buffers = {name for name, _ in model.named_buffers()}
        for parameter, value in model.state_dict().items():
            # The biases of routers are buffers. All other buffers follow from the configuration.
            if not value.is_floating_point() or (parameter in buffers and "bias" not in parameter):
                continue
            if value.ndim >= 2:
                value.normal_(0, value.shape[-1] ** -0.5)
            else:
                value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder)
    _rename_as_published(folder / "model.safetensors", FAMILIES[name])
    return folder


def _rename_as_published(file: Path, family: Family) -> None:
    """Give the tensors in ``file`` the names that published files of ``family`` have, and add the tensors that only
    published files have."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(file).items():
        begins = next((begin for begin in family.prefixes if name.startswith(begin)), "")
        tensors[family.prefixes.get(begins, "") + name.removeprefix(begins)] = tensor
    tensors.update({name: torch.ones(shape) for name, shape in family.unused.items()})
    save_file(tensors, file, metadata={"format": "pt"})
