"""`training`, `deepspeed` and `stability`: the optimisation, its distribution over processes, and the reaction to
instability."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from finetune_core.api.base import QUANTITY_LENGTH, ApiModel, DecimalString, cel, exactly_one_of, int_or_string, join

Schedule = Literal["Linear", "Cosine", "Constant"]
"""How the learning rate changes after the warm-up. `TrainingSpec.schedule` explains the values."""
Precision = Literal["bf16", "fp32"]
"""Number format of the computation."""
Attention = Literal["Auto", "SDPA", "Flash", "Flex", "Eager"]
"""The kernel that computes attention. `TrainingSpec.attention` explains the values."""
StabilityAction = Literal["Record", "RollBack", "Fail"]
"""What the trainer does about an unstable step: it records the step, rolls back to an earlier checkpoint, or fails."""


class TrainingSpec(ApiModel):
    """The optimisation: AdamW with a linear, cosine or constant learning rate."""

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
    """Peak learning rate. Absent: 1e-4 with LoRA and 5e-6 with Full, as in Anyscale's study of LoRA (September
    2023)."""
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Passes over the training examples. A row may be several examples. With a mix (`dataset.train.mix`), one epoch has
    as many examples as all sources have together."""
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Optimizer steps after which the training ends."""
    global_batch_size: Annotated[int, Field(ge=1, le=65536)]
    """Examples per optimizer step, over all processes."""
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Examples that one process computes at once (with `dataset.packing`: sequences). Absent: with
    `gradientAccumulationSteps`, the process's share of the global batch divided by that number. Without
    `gradientAccumulationSteps`, the process's share of the global batch, at most 8, or what the plan of the preflight
    check chooses where the job does not fit with that."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Micro-batches of one process per optimizer step. Absent: the number that follows from `microBatchSize` and the
    process's share of the global batch. When set, this number times `microBatchSize` times the number of processes must
    equal `globalBatchSize`."""
    schedule: Schedule = "Linear"
    """How the learning rate changes after the warm-up: Linear falls in a straight line, Cosine falls in a half cosine,
    Constant stays at the peak. Linear and Cosine would reach zero one step after the last step."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Number of steps in which the learning rate rises from zero to its peak in a straight line."""
    weight_decay: DecimalString = "0"
    """Decoupled weight decay of AdamW."""
    gradient_clipping: DecimalString = "1.0"
    """Largest norm that the gradient over all trained parameters may have. A gradient with a larger norm is scaled down
    to this norm. 0 switches clipping off."""
    precision: Precision = "bf16"
    """Number format of the computation. bf16 needs CPUs, or GPUs of the generation Ampere or newer. Older GPUs compute
    in fp32, because there is no fp16. The trainer never changes the format by itself."""
    gradient_checkpointing: bool | None = None
    """true recomputes activations in the backward pass, which needs less memory and about a third more time. Absent:
    false, but true where the plan of the preflight check says that the job fits with it only, or is faster with it than
    with other ways to fit."""
    attention: Attention = "Auto"
    """The kernel that computes attention. SDPA: torch's `scaled_dot_product_attention`. Flash: the FlashAttention of
    torch (and not of the package flash-attn) for sequences of several examples; needs bf16, `dataset.packing`, and GPUs
    of the generation Ampere or newer. Flex: torch's FlexAttention; needs GPUs and a C compiler, which the image does
    not have. Eager: plain matrix products, for models that support no other kernel. Auto: the fastest kernel that keeps
    packed examples apart and that model and device support; `status.plan.attention` names the kernel. All kernels
    compute the same function, so losses differ only by rounding."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 42
    """Seed from which the order of the rows, the initial values of new weights, and dropout follow."""


ZeroStage = Annotated[
    Annotated[int, Field(ge=0, le=3)] | Annotated[str, Field(max_length=QUANTITY_LENGTH, pattern="^(Auto|None)$")],
    WithJsonSchema(int_or_string("^(Auto|None)$", least=0, most=3)),
]
"""`Auto`, `None`, or a ZeRO stage from 0 to 3."""


class DeepSpeedSpec(ApiModel):
    """How DeepSpeed shards the training state over the processes (ZeRO, arXiv 1910.02054), or that the only process
    trains without DeepSpeed."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "!has(self.offloadOptimizer) || self.offloadOptimizer == 'None' ||"
                " (type(self.zeroStage) == int ? self.zeroStage >= 1 : self.zeroStage == 'Auto')",
                "`offloadOptimizer` must be None unless `zeroStage` is 1, 2, 3 or Auto",
            ),
            (
                "!has(self.overrides) || type(self.zeroStage) == int || self.zeroStage == 'Auto'",
                "`overrides` must be absent with `zeroStage` None, which trains without DeepSpeed",
            ),
            (
                "self.offloadParameters == 'None' || type(self.zeroStage) == int && self.zeroStage == 3",
                "`offloadParameters` must be None unless `zeroStage` is 3",
            ),
        )
    )

    zero_stage: ZeroStage = "Auto"
    """ZeRO stage. 0: nothing is sharded (only with fp32). 1: the optimizer state is sharded. 2: gradients are sharded
    too. 3: parameters are sharded too. None: one process trains with torch alone, which computes the same losses and
    checkpoints with less memory. Auto: 2, but None where one process trains with LoRA and neither `offloadOptimizer`
    nor `overrides` asks for DeepSpeed. Where a job on GPUs with bf16 does not fit so, the plan of the preflight check
    chooses among None, 2 and 3."""
    offload_optimizer: Literal["None", "CPU"] | None = None
    """Memory for the optimizer state: the GPU's (None) or the node's (CPU). Absent: the GPU's, but the node's where the
    plan of the preflight check says that the job fits so only."""
    offload_parameters: Literal["None", "CPU"] = "None"
    """Memory for parameters that are not in use: the GPU's (None) or the node's (CPU). CPU needs `zeroStage: 3`."""
    overrides: Annotated[str, Field(min_length=2, max_length=16384)] | None = None
    """A JSON object that is merged into the DeepSpeed configuration last, for example `{"steps_per_print": 10}`. Keys
    that other fields decide, such as `train_batch_size` or `zero_optimization.stage`, are refused."""


class StabilitySpec(ApiModel):
    """What the trainer does when the loss or the gradient is not finite or explodes, or when training hangs."""

    on_non_finite: StabilityAction = "Fail"
    """What follows a loss or gradient that is not a finite number. A gradient that is not finite is never applied.
    Record: the step is skipped and recorded in `status.incidents`. RollBack: training continues from the last good
    checkpoint, with a lower learning rate and without the batches that may be the cause. A job that has made three
    rollbacks ends as Diverged instead of a fourth. Fail: the job ends as Diverged."""
    on_exploding_loss: StabilityAction | None = None
    """What follows a finite loss that is far too high compared with the steps before or with the job's first steps, and
    a finite gradient norm that is far too high while the loss rises. Record, RollBack and Fail are as with
    `onNonFinite`, but with Record the step is not skipped. Absent: only values that are not finite raise an alarm."""
    stall_timeout_seconds: Annotated[int, Field(ge=60, le=86_400)] = 600
    """Seconds without progress, for example in one optimizer step, after which the trainer exits. Work that has time
    limits of its own, such as requests to the object store, gets more time. The attempt then ends and is retried."""
