"""The conditions under which vLLM 0.33.0 serves a LoRA adapter, written down from its code.

vLLM is not installed, because it needs a GPU and its own torch. The rules come from its Python files:
`vllm/lora/peft_helper.py` (the configuration), `vllm/config/lora.py` (the steps of the rank), `vllm/lora/utils.py` (the
names of the tensors), `vllm/lora/lora_model.py` (which modules may have an adapter, and the size of an embedding),
`vllm/lora/layers/logits_processor.py` (the output head), `vllm/lora/model_manager.py` (experts), and
`vllm/model_executor/models/*.py` (the modules of each family).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

RANK_STEPS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `--max-lora-rank` can have. The rank of an adapter may be any number up to the chosen value."""
LARGEST_HEAD = 258_048
"""Largest number of tokens of a base model whose output head gets an adapter."""
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Texts in `init_lora_weights` with which vLLM takes a saved adapter. The adapter is then served on the unchanged base
model."""
DENSE = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class Served:
    """What vLLM knows about the base model that it serves."""

    modules: frozenset[str]
    """Last parts of the names of the modules that can have an adapter: the linear layers, and the embeddings if the
    model's code names them in `embedding_modules`. Layers that vLLM packs into one layer, such as `q_proj` and
    `k_proj`, are listed one by one."""
    vocabulary: int
    expert_modules: frozenset[str] = frozenset()
    """The modules of a family in which each expert has an adapter of its own. A name begins with the part `experts` of
    the module's full name, for example `experts.0.gate_proj`. Empty for other families. A family with one tensor for
    all experts has `experts` itself among `modules`."""


def llama(vocabulary: int) -> Served:
    """Return what vLLM knows about a Llama (`llama.py`), whose embeddings can have adapters."""
    return Served(DENSE | {"embed_tokens", "lm_head"}, vocabulary)


def qwen2(vocabulary: int) -> Served:
    """Return what vLLM knows about a Qwen2 (`qwen2.py`), whose embeddings can't have adapters."""
    return Served(DENSE, vocabulary)


def qwen3_moe(vocabulary: int, experts: int) -> Served:
    """Return what vLLM knows about a Qwen3-MoE (`qwen3_moe.py`), which expects one adapter for each expert."""
    each = {f"experts.{number}.{name}" for number in range(experts) for name in ("gate_proj", "up_proj", "down_proj")}
    return Served(DENSE | {"embed_tokens", "lm_head", "gate"}, vocabulary, frozenset(each))


def needed_rank(adapter: Path) -> int:
    """Return the smallest `--max-lora-rank` for the adapter in the folder ``adapter``."""
    rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
    return next(step for step in RANK_STEPS if step >= rank)


def refusals(adapter: Path, served: Served, *, max_lora_rank: int = 16) -> list[str]:
    """Return the reasons why vLLM refuses the adapter in the folder ``adapter``. The list is empty if vLLM serves the
    adapter."""
    assert max_lora_rank in RANK_STEPS
    config = json.loads((adapter / "adapter_config.json").read_text())
    return [*_configuration_refusals(config, max_lora_rank), *_tensor_refusals(adapter, served)]


def _configuration_refusals(config: dict[str, object], max_lora_rank: int) -> Iterator[str]:
    for name in ("r", "lora_alpha", "target_modules"):
        if name not in config:
            yield f"{name} is missing"
    patterns = config.get("rank_pattern") or {}
    assert isinstance(patterns, dict)
    ranks = [config.get("r", 0), *patterns.values()]
    if any(not isinstance(rank, int) or not 0 < rank <= max_lora_rank for rank in ranks):
        yield f"a rank is not between 1 and {max_lora_rank}"
    for name in (
        "modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora",
        "use_qalora",
    ):  # fmt: skip
        if config.get(name):
            yield f"{name} is not supported"
    if config.get("bias", "none") != "none":
        yield "bias is not supported"
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in HARMLESS_STARTS:
        yield "init_lora_weights changes the base model"


def _tensor_refusals(adapter: Path, served: Served) -> Iterator[str]:
    if not (adapter / "adapter_model.safetensors").is_file():
        yield "there is no adapter_model.safetensors"
        return
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (no mapping)
            found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])", name)
            if found is None:
                yield f"{name} is no tensor of an adapter"
                continue
            module, kind = found.groups()
            inside = module.partition(".experts")[2]
            if ".experts" in module:
                # One tensor for all experts is read only for a family that has `experts` among `modules`.
                part = f"experts{inside}".removesuffix(".base_layer")
                if part not in served.expert_modules and part not in served.modules:
                    yield f"{module} is no module that can have an adapter"
            elif module.rpartition(".")[2] not in served.modules:
                yield f"{module} is no module that can have an adapter"
            if module.rpartition(".")[2] == "lm_head" and served.vocabulary > LARGEST_HEAD:
                yield f"{module} has more than {LARGEST_HEAD} tokens"
            if kind == "lora_embedding_A" and file.get_slice(name).get_shape()[1] != served.vocabulary:
                yield f"{module} has another number of tokens than the base model that is served"
