"""How the model is trained: `method`, `lora`, `training`, `deepspeed` and `evaluation`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from finetune_core.api.base import ApiModel, DecimalString, cel


class Method(StrEnum):
    """What is trained: low-rank adapters beside frozen weights, or every parameter."""

    LORA = "LoRA"
    FULL = "Full"


class LoRASpec(ApiModel):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685); only with `method: LoRA`."""

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    """Rank of each adapter."""
    alpha: Annotated[int, Field(ge=1, le=1024)] = 16
    """The update is scaled by alpha / rank."""
    dropout: DecimalString = "0"
    """Dropout on the adapter's input, from 0 to less than 1."""
    target_modules: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]],
        Field(max_length=64, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = []
    """Names of the modules that get an adapter; empty means all dense layers of the decoder."""


class TrainingSpec(ApiModel):
    """The optimisation: AdamW with a linear, cosine or constant rate."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("has(self.epochs) != has(self.maxSteps)", "exactly one of `epochs`, `maxSteps` must be set"),
        )
    )

    learning_rate: DecimalString | None = None
    """Peak rate; default 1e-4 with LoRA, 5e-6 with Full."""
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Passes over the training rows."""
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Optimizer steps."""
    global_batch_size: Annotated[int, Field(ge=1, le=65536)]
    """Examples per optimizer step, over all nodes and GPUs."""
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Examples that one process computes at once; default: planned."""
    schedule: Literal["Linear", "Cosine", "Constant"] = "Linear"
    """How the rate falls after the warm-up: to zero in a line, in a half cosine, or not at all."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps in which the rate rises from zero in a line."""
    weight_decay: DecimalString = "0"
    """Decoupled weight decay of AdamW."""
    gradient_clipping: DecimalString = "1.0"
    """Largest norm of the gradient over all parameters; 0 switches clipping off."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of the computation; never changed silently."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 42
    """Seed of the order of rows, the new weights and dropout."""


ZeroStage = Annotated[
    int | Literal["Auto"],
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 4,
        }
    ),
]


class DeepSpeedSpec(ApiModel):
    """How DeepSpeed spreads the training state over the processes (ZeRO, arXiv 1910.02054)."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "type(self.zeroStage) == int ? self.zeroStage >= 0 && self.zeroStage <= 3 : self.zeroStage == 'Auto'",
                "`zeroStage` must be 0, 1, 2, 3 or Auto",
            ),
        )
    )

    zero_stage: ZeroStage = "Auto"
    """0: replicate everything (only with fp32), 1: shard optimizer state, 2: and gradients, 3: and parameters."""


class EvaluationSpec(ApiModel):
    """When the validation rows are scored, and which checkpoint becomes the artifact."""

    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Steps between evaluations; default: at the end of each epoch, and at the end."""
    artifact_from: Literal["Best", "Last"] | None = None
    """The checkpoint to export: least validation perplexity, or the last; default Best with `dataset.validation`."""
