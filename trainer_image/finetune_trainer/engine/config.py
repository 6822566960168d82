"""DeepSpeed's configuration for a job, and the settings that DeepSpeed needs before a model is built.

`engine.py` passes the configuration to DeepSpeed. `preparation.py` calls `shard_new_models`, so that under ZeRO-3 a
model is sharded over the ranks while it is loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch

from finetune_core.contract import OptimizationConfig

BUCKET_ELEMENTS = 50_000_000
"""Largest number of elements that DeepSpeed puts together for one communication call, when it reduces or gathers them:
100 MB in bf16. The gradient of a larger parameter is reduced in a call of its own. DeepSpeed's default is 500
million."""


def engine_config(
    optimization: OptimizationConfig, world_size: int, *, overlap_communication: bool = False
) -> dict[str, Any]:
    """Return DeepSpeed's configuration. The job's `deepspeed.overrides` are merged in last, so that they win.
    ``overlap_communication`` is the value of `overlap_comm`, on which only the engine depends.

    For DeepSpeed an update has one micro-batch. The training loop accumulates gradients itself, because the last global
    batch of an epoch may have fewer micro-batches than the others.
    """
    is_bf16 = optimization.precision == "bf16"
    clips = engine_clips(optimization)
    alone = clips and world_size == 1
    zero: dict[str, Any] = {
        "stage": optimization.zero_stage,
        "overlap_comm": overlap_communication,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if clips:
        zero["compute_grad_norm"] = False
    if alone:
        # Nothing is scattered, and DeepSpeed would divide gradients by 1 and copy them onto themselves.
        zero["reduce_scatter"] = False
        if optimization.zero_stage == 1 or not is_bf16:
            # Gradients are added up in the number format of the weights, and no other rank takes a part of them. So
            # autograd adds them up, and they stay where they are until the update. Stage 2 would reduce them after
            # each micro-batch. A bucket with room for one number holds a single gradient at a time. DeepSpeed would
            # copy several gradients next to each other.
            zero |= {"stage": 1, "contiguous_gradients": False, "reduce_bucket_size": 1}
    if optimization.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if optimization.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_batch_size": optimization.micro_batch_size * world_size,
        "train_micro_batch_size_per_gpu": optimization.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if clips else optimization.gradient_clipping,
        # The training loop makes no update where the norm is not finite, so DeepSpeed need not look for such gradients.
        "bf16": {"enabled": is_bf16, "check_grad_overflow": False},
        # Gradients accumulate in fp32, because a bf16 sum over many micro-batches loses what the last of them add.
        # Stage 1 is the exception: at stage 1, None selects DeepSpeed's default, the dtype of the model. At this stage
        # DeepSpeed would combine bf16 parameters and fp32 accumulation in its `BF16_Optimizer`, which lacks the
        # gradient norm and the gradient buffers that `engine.py` uses.
        "data_types": {"grad_accum_dtype": None if optimization.zero_stage == 1 else "fp32"},
        "zero_optimization": zero,
        # torch's AdamW is used even where the optimizer state is in CPU memory. DeepSpeed's own CPU optimizer would
        # be compiled at run time, and its updates differ from torch's.
        "zero_force_ds_cpu_optimizer": False,
        # The mean over one rank is the sum, and DeepSpeed would divide every gradient by 1. Stage 3 has no sum.
        "gradient_allreduce_op": "sum" if alone else "mean",
        "steps_per_print": 1_000_000_000,
    }
    return merge_overrides(config, json.loads(optimization.overrides)) if optimization.overrides else config


def engine_clips(optimization: OptimizationConfig) -> bool:
    """Return whether `engine.py` computes the norm of the gradient and clips it, and not DeepSpeed. With offload,
    DeepSpeed has computed the norms of all gradients before it moved them to the CPU."""
    return optimization.zero_stage in (1, 2) and not optimization.offload_optimizer


def overlap_pays(stage: int, trained: int) -> bool:
    """Return whether DeepSpeed can compute while it communicates the gradients of ``trained`` parameters, or at stage 3
    the weights of a model.

    Below stage 3, DeepSpeed reduces a bucket when the next gradient does not fit into the bucket, and the last bucket
    after the backward pass. Where all gradients fit into one bucket, nothing overlaps. But with `overlap_comm`, the CPU
    waits at the end of the backward pass until the GPU has done all of its work
    (`independent_gradient_partition_epilogue` in deepspeed/runtime/zero/stage_1_and_2.py), at stage 2 in each
    micro-batch, and there is a second bucket.
    """
    return stage == 3 or trained > BUCKET_ELEMENTS


def merge_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with ``overrides`` merged in. Two objects under the same key are merged key by key."""
    result = dict(config)
    for key, value in overrides.items():
        below = result.get(key)
        result[key] = merge_overrides(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def shard_new_models(optimization: OptimizationConfig, world_size: int) -> Any:
    """At ZeRO stage 3, let transformers shard every model over the ranks while it builds the model. transformers does
    so as long as the returned object is referenced. At other stages do nothing and return None."""
    if optimization.zero_stage != 3:
        return None
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    prevent_compilation()
    # Sharding needs DeepSpeed's own process groups, which are otherwise created together with the engine.
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return HfDeepSpeedConfig(engine_config(optimization, world_size))


def prevent_compilation() -> None:
    """Keep DeepSpeed from compiling its C++ and CUDA ops at run time.

    DeepSpeed looks up in a table which ops it can compile. The table is emptied, so that DeepSpeed treats every op as
    not compatible. Otherwise its communication backend for the CPU would compile a shared-memory op wherever it finds a
    compiler, and the check of all ops would take a second.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
