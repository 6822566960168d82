"""DeepSpeed configuration."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch

from finetune_core.contract import OptimizationConfig

BUCKET_ELEMENTS = 50_000_000


def engine_config(optimization: OptimizationConfig, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration, with the job's overrides merged in last.

    Accumulation is the loop's business (a partial batch has fewer micro-batches), so the engine counts one.
    """
    zero: dict[str, Any] = {
        "stage": optimization.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if optimization.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if optimization.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_batch_size": optimization.micro_batch_size * world_size,
        "train_micro_batch_size_per_gpu": optimization.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimization.gradient_clipping,
        "bf16": {"enabled": optimization.precision == "bf16"},
        # In bf16 the sum of many micro-batches loses what the last of them add. At stage 1 DeepSpeed would take
        # another optimizer for it, which skips no update that is not finite.
        "data_types": {"grad_accum_dtype": None if optimization.zero_stage == 1 else "fp32"},
        "zero_optimization": zero,
        # torch's AdamW wherever the state lies: DeepSpeed's own for the CPU would be compiled at run time, and its
        # updates differ.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    return merged(config, json.loads(optimization.overrides)) if optimization.overrides else config


def merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with ``overrides`` on top, objects merged key by key."""
    result = dict(config)
    for key, value in overrides.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def shard_new_models(optimization: OptimizationConfig, world_size: int) -> Any:
    """Let transformers shard models over the ranks while it builds them (ZeRO-3), as long as the returned object
    lives; None at other stages."""
    if optimization.zero_stage != 3:
        return None
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    prevent_compilation()
    # Sharding looks at DeepSpeed's own view of the ranks, which else comes with the engine.
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return HfDeepSpeedConfig(engine_config(optimization, world_size))


def prevent_compilation() -> None:
    """Keep DeepSpeed from compiling an op at run time.

    On the CPU the communication backend would compile a shared-memory op where a compiler is found, and probing all
    ops takes a second: an empty table answers "not compatible" for each.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
