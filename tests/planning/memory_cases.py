"""The cases of which the memory is measured and planned: published shapes of models, with a method, a ZeRO stage, a
number of processes and a length.

`engine_memory.py` measures them with the trainer's engine, and `test_planned_memory.py` compares the plan with that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_core.contract import OptimizationConfig

MODELS: Mapping[str, dict[str, Any]] = {
    "Llama-2-7B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "Llama-2-13B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "Llama-2-70B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "Llama-3-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "Mistral-7B": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "Qwen3-8B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "Gemma-3-1B": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "tie_word_embeddings": True,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
}
"""Published shapes: the sizes in the models' `config.json`."""


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """A training of which the memory of a rank is measured and planned. Every position has a target."""

    model: str
    """Key of MODELS."""
    rank: int | None = None
    """Rank of the adapters on all linear layers and experts. None: every parameter is trained."""
    stage: int | None
    """ZeRO stage. None: the plain engine, without DeepSpeed."""
    processes: int
    length: int
    micro_batch: int = 1
    accumulation: int = 1
    recompute: bool = False
    precision: str = "bf16"
    dropout: str = "0"
    layers: int | None = None
    """Number of layers that are measured. None: all layers of the model."""

    @property
    def configuration(self) -> dict[str, Any]:
        """Return the model's `config.json`, with the measured number of layers."""
        shape = MODELS[self.model]
        return shape if self.layers is None else {**shape, "num_hidden_layers": self.layers}

    @property
    def measured_ranks(self) -> tuple[int, ...]:
        """Return the ranks that are measured, of whose figures the highest ones count. At ZeRO stages 1 and 2 each rank
        has another part of all parameters, the first one the embedding and the last one the head."""
        return (0, self.processes - 1) if self.processes > 1 and self.stage in (1, 2) and self.rank is None else (0,)

    def optimization(self) -> OptimizationConfig:
        """Return the settings with which the engine is made."""
        from finetune_core.contract import OptimizationConfig

        return OptimizationConfig(
            learning_rate=1e-4,
            max_steps=10,
            global_batch_size=self.micro_batch * self.accumulation * self.processes,
            micro_batch_size=self.micro_batch,
            schedule="Constant",
            warmup_steps=0,
            weight_decay=0,
            gradient_clipping=1.0,
            precision=self.precision,
            gradient_checkpointing=self.recompute,
            seed=1,
            zero_stage=self.stage,
        )

    def targets(self, model: Any) -> list[str]:
        """Return the names of all linear layers of ``model`` but its head, which get an adapter."""
        from torch import nn

        names = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is nn.Linear}
        return sorted(names - {"lm_head"})

    def expert_weights(self, model: Any) -> list[str]:
        """Return the names of the weights of all experts of ``model``, which get an adapter. transformers holds the
        weights of all experts of a layer in one parameter of three dimensions."""
        return [name for name, weight in model.named_parameters() if weight.ndim == 3 and ".experts." in name]


SOME_LAYERS = 4
"""Layers that are measured where the whole model would take a minute."""


def _lora(
    model: str, stage: int | None, processes: int, length: int, layers: int | None = SOME_LAYERS, **others: Any
) -> MemoryCase:
    return MemoryCase(model=model, rank=8, stage=stage, processes=processes, length=length, layers=layers, **others)


def _full(
    model: str, stage: int | None, processes: int, length: int, layers: int | None = SOME_LAYERS, **others: Any
) -> MemoryCase:
    return MemoryCase(model=model, stage=stage, processes=processes, length=length, layers=layers, **others)


CASES: Mapping[str, MemoryCase] = {
    "7b-lora-z1-512x8": _lora("Llama-2-7B", 1, 1, 512, micro_batch=8),
    "7b-lora-z1-512x8-accumulated": _lora("Llama-2-7B", 1, 1, 512, micro_batch=8, accumulation=2),
    "7b-lora-z2-4096-recomputed": _lora("Llama-2-7B", 2, 8, 4096, recompute=True),
    "7b-lora-z2-4096": _lora("Llama-2-7B", 2, 8, 4096),
    "7b-lora-z2-512x8": _lora("Llama-2-7B", 2, 8, 512, micro_batch=8),
    "7b-lora-z3-512x8": _lora("Llama-2-7B", 3, 8, 512, micro_batch=8),
    "7b-lora-z1-512x4-dropout": _lora("Llama-2-7B", 1, 1, 512, micro_batch=4, dropout="0.05"),
    "7b-full-z1-512": _full("Llama-2-7B", 1, 1, 512),
    "7b-full-z2-512-accumulated": _full("Llama-2-7B", 2, 1, 512, accumulation=2),
    "7b-full-z2-512x8": _full("Llama-2-7B", 2, 8, 512, micro_batch=8),
    "7b-full-z1-512x8": _full("Llama-2-7B", 1, 8, 512, micro_batch=8),
    "7b-full-z3-512x8": _full("Llama-2-7B", 3, 8, 512, micro_batch=8),
    "7b-full-z3-512x8-accumulated": _full("Llama-2-7B", 3, 8, 512, micro_batch=8, accumulation=2),
    "13b-lora-z2-512x8": _lora("Llama-2-13B", 2, 8, 512, micro_batch=8),
    "13b-full-z2-512-recomputed": _full("Llama-2-13B", 2, 8, 512, micro_batch=8, recompute=True),
    "13b-full-z3-2048-recomputed": _full("Llama-2-13B", 3, 8, 2048, micro_batch=2, recompute=True),
    "70b-lora-z3-512": _lora("Llama-2-70B", 3, 8, 512, recompute=True),
    "70b-lora-z3-512x2": _lora("Llama-2-70B", 3, 8, 512, micro_batch=2),
    "70b-full-z3-512-recomputed": _full("Llama-2-70B", 3, 8, 512, recompute=True),
    "llama3-8b-lora-z2-2048": _lora("Llama-3-8B", 2, 8, 2048, micro_batch=2),
    "llama3-8b-full-z2-2048-accumulated": _full("Llama-3-8B", 2, 8, 2048, accumulation=2),
    "llama3-8b-full-z3-8192-recomputed": _full("Llama-3-8B", 3, 8, 8192, recompute=True),
    "llama3.2-1b-full-z2-2048x4": _full("Llama-3.2-1B", 2, 8, 2048, micro_batch=4, layers=None),
    "llama3.2-1b-full-fp32-z0-512": _full("Llama-3.2-1B", 0, 1, 512, precision="fp32", layers=None),
    "llama3.2-1b-lora-z1-1024x4": _lora("Llama-3.2-1B", 1, 1, 1024, micro_batch=4, layers=None),
    "mistral-7b-lora-r64-z2-8192-recomputed": MemoryCase(
        model="Mistral-7B", rank=64, stage=2, processes=8, length=8192, recompute=True, layers=4
    ),
    "qwen2.5-0.5b-full-z1-1024x4": _full("Qwen2.5-0.5B", 1, 1, 1024, micro_batch=4, layers=None),
    "qwen2.5-7b-lora-z2-2048": _lora("Qwen2.5-7B", 2, 8, 2048),
    "qwen2.5-7b-full-z2-1024": _full("Qwen2.5-7B", 2, 8, 1024, micro_batch=2),
    "qwen3-8b-lora-z2-2048": _lora("Qwen3-8B", 2, 8, 2048),
    "qwen3-8b-full-z3-2048": _full("Qwen3-8B", 3, 8, 2048),
    "mixtral-8x7b-full-z2-512": _full("Mixtral-8x7B", 2, 8, 512, layers=2),
    "mixtral-8x7b-full-z3-512": _full("Mixtral-8x7B", 3, 8, 512, layers=2),
    "mixtral-8x7b-full-z3-512-recomputed": _full("Mixtral-8x7B", 3, 8, 512, layers=2, recompute=True),
    "mixtral-8x7b-lora-z2-512": _lora("Mixtral-8x7B", 2, 8, 512),
    "mixtral-8x7b-lora-z3-512": _lora("Mixtral-8x7B", 3, 8, 512),
    "mixtral-8x7b-lora-z3-512-recomputed": _lora("Mixtral-8x7B", 3, 8, 512, recompute=True),
    "qwen3-30b-a3b-full-z2-512": _full("Qwen3-30B-A3B", 2, 8, 512),
    "qwen3-30b-a3b-full-z3-512-recomputed": _full("Qwen3-30B-A3B", 3, 8, 512, recompute=True),
    "qwen3-30b-a3b-lora-z2-2048-recomputed": _lora("Qwen3-30B-A3B", 2, 8, 2048, recompute=True),
    "qwen3-30b-a3b-lora-z3-512": _lora("Qwen3-30B-A3B", 3, 8, 512),
    "gemma3-1b-full-z2-1024": _full("Gemma-3-1B", 2, 8, 1024, micro_batch=2),
    "gemma3-1b-lora-z1-1024": _lora("Gemma-3-1B", 1, 1, 1024, micro_batch=4),
    "7b-full-plain-512": _full("Llama-2-7B", None, 1, 512),
    "7b-full-plain-512-accumulated": _full("Llama-2-7B", None, 1, 512, accumulation=2),
    "7b-full-plain-4096-recomputed": _full("Llama-2-7B", None, 1, 4096, recompute=True),
    "7b-lora-plain-512x8": _lora("Llama-2-7B", None, 1, 512, micro_batch=8),
    "llama3.2-1b-full-plain-fp32-512": _full("Llama-3.2-1B", None, 1, 512, precision="fp32", layers=None),
    "qwen2.5-0.5b-full-plain-1024x4-accumulated": _full(
        "Qwen2.5-0.5B", None, 1, 1024, micro_batch=4, accumulation=2, layers=None
    ),
    "qwen3-8b-lora-plain-2048-accumulated": _lora("Qwen3-8B", None, 1, 2048, accumulation=2),
    "mixtral-8x7b-full-plain-512": _full("Mixtral-8x7B", None, 1, 512, layers=2),
}
