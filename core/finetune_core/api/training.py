"""The optimisation and how DeepSpeed spreads it: `training`, `deepspeed` and `stability`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from finetune_core.api.base import QUANTITY_LENGTH, ApiModel, DecimalString, cel, exactly_one_of, int_or_string, join

Schedule = Literal["Linear", "Cosine", "Constant"]
Precision = Literal["bf16", "fp32"]
StabilityAction = Literal["Record", "RollBack", "Fail"]
"""SHORT"""


class TrainingSpec(ApiModel):
    """The optimisation: AdamW with a linear, cosine or constant rate."""

    model_config = ConfigDict(
        json_schema_extra=join(
            exactly_one_of("epochs", "maxSteps"),
            cel(
                (
                    "!has(self.learningRate) || double(self.learningRate) > 0.0 && double(self.learningRate) <= 1.0",
                    "`learningRate` must be greater than 0 and at most 1",
                ),
                (
                    "!has(self.maxSteps) || self.warmupSteps <= self.maxSteps",
                    "`warmupSteps` must be at most `maxSteps`",
                ),
                (
                    "!has(self.microBatchSize) || self.microBatchSize <= self.globalBatchSize",
                    "`microBatchSize` must be at most `globalBatchSize`",
                ),
            ),
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
    """Examples (with `dataset.packing` sequences) that one process computes at once; default: the process's share of
    the global batch, at most 8."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Micro-batches per optimizer step; default: as many as the global batch needs. Where it is set, it times
    `microBatchSize` times the number of processes is the global batch."""
    schedule: Schedule = "Linear"
    """How the rate falls after the warm-up: to zero in a line, in a half cosine, or not at all."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps in which the rate rises from zero in a line."""
    weight_decay: DecimalString = "0"
    """Decoupled weight decay of AdamW."""
    gradient_clipping: DecimalString = "1.0"
    """Largest norm of the gradient over all parameters; 0 switches clipping off."""
    precision: Precision = "bf16"
    """Number format of the computation; never changed silently."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 42
    """Seed of the order of rows, the new weights and dropout."""


ZeroStage = Annotated[
    Annotated[int, Field(ge=0, le=3)] | Annotated[str, Field(max_length=QUANTITY_LENGTH, pattern="^Auto$")],
    WithJsonSchema(int_or_string("^Auto$", least=0, most=3)),
]


class DeepSpeedSpec(ApiModel):
    """How DeepSpeed spreads the training state over the processes (ZeRO, arXiv 1910.02054)."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.offloadOptimizer == 'None' || type(self.zeroStage) != int || self.zeroStage >= 1",
                "`offloadOptimizer` must be None unless `zeroStage` is 1, 2, 3 or Auto",
            ),
            (
                "self.offloadParameters == 'None' || type(self.zeroStage) == int && self.zeroStage == 3",
                "`offloadParameters` must be None unless `zeroStage` is 3",
            ),
        )
    )

    zero_stage: ZeroStage = "Auto"
    """0: replicate everything (only with fp32), 1: shard optimizer state, 2: and gradients, 3: and parameters. Auto: 2
    with several processes, else 1."""
    offload_optimizer: Literal["None", "CPU"] = "None"
    """Where the optimizer state lies: on the GPU, or in the memory of the node."""
    offload_parameters: Literal["None", "CPU"] = "None"
    """Where parameters lie between uses: on the GPU, or in the memory of the node; only with `zeroStage: 3`."""
    overrides: Annotated[str, Field(min_length=2, max_length=16384)] | None = None
    """A JSON object that is merged into the DeepSpeed configuration last. Keys that other fields decide, such as
    `train_batch_size` or `zero_optimization.stage`, are refused."""


class StabilitySpec(ApiModel):
    """What happens when training goes wrong without an error."""

    on_non_finite: StabilityAction = "Fail"
    """What follows a loss or gradient that is not a finite number. It is never applied. Record: the step is skipped and
    counted; RollBack: back to the last good checkpoint with a lower rate; Fail: the job ends as Diverged."""
    on_exploding_loss: StabilityAction | None = None
    """What follows a loss far above its recent values; absent: it is not watched."""
    stall_timeout_seconds: Annotated[int, Field(ge=60, le=86_400)] = 600
    """A step that takes longer ends the attempt, which is then retried."""
