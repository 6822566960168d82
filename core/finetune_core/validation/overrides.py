"""Checks `deepspeed.overrides`: the text must be a JSON object, and must not set a key that another field or the
trainer decides."""

from __future__ import annotations

import json
from typing import Any

from finetune_core.errors import UserError

PATH = "spec.deepspeed.overrides"
"""Path of the field `deepspeed.overrides`. Each message about the field begins with this path."""

RESERVED_KEYS: dict[str, str] = {
    "train_batch_size": "training.globalBatchSize",
    "train_micro_batch_size_per_gpu": "training.microBatchSize",
    "gradient_accumulation_steps": "training.gradientAccumulationSteps",
    "gradient_clipping": "training.gradientClipping",
    "bf16": "training.precision",
    "bfloat16": "training.precision",
    "fp16": "training.precision",
    "amp": "training.precision",
    "optimizer": "training.learningRate and training.weightDecay",
    "scheduler": "training.schedule",
    "zero_optimization.stage": "deepspeed.zeroStage",
    "zero_optimization.offload_optimizer": "deepspeed.offloadOptimizer",
    "zero_optimization.offload_param": "deepspeed.offloadParameters",
    "zero_optimization.cpu_offload": "deepspeed.offloadOptimizer",
    "zero_optimization.cpu_offload_param": "deepspeed.offloadParameters",
    "tensorboard": "tracking",
    "wandb": "tracking",
    "csv_monitor": "tracking",
    "comet": "tracking",
    "checkpoint": "storage.checkpoint",
    "nebula": "storage.checkpoint",
    "elasticity": "resources.nodes",
}
"""For each key of the DeepSpeed configuration that users must not override: the field of the spec that decides it."""

SETTLED_KEYS: dict[str, str] = {
    "zero_optimization.round_robin_gradients": (
        "DeepSpeed then takes the values of one parameter for those of another, and checkpoints would be wrong"
    ),
    "zero_optimization.compute_grad_norm": "the trainer computes the norm of the gradient",
    "gradient_allreduce_op": "the trainer expects the mean over all ranks",
    "data_types.grad_accum_dtype": "the trainer reads gradients in the number format that it has chosen",
    "managed_gradient_accumulation": "the trainer says which micro-batch is the last one of a step",
    "compile.deepcompile": "the trainer does not compile models",
    "sequence_parallel_size": "each rank trains on examples of its own",
    "tensor_parallel": "each rank trains on examples of its own",
}
"""For each key of the DeepSpeed configuration that users must not override although no field decides it: why not."""


def override_problems(text: str) -> list[UserError]:
    """Return the problems of ``text``, the value of `deepspeed.overrides`."""
    try:
        overrides = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        return [UserError(PATH, f"must be JSON: {error.msg} at line {error.lineno}, column {error.colno}")]
    except _DuplicateKeyError as error:
        return [UserError(PATH, f"must hold each key once: {error}")]
    except RecursionError:
        return [UserError(PATH, "must not be nested that deep")]
    except ValueError:
        return [UserError(PATH, "must not hold a number with thousands of digits")]
    if not isinstance(overrides, dict):
        return [UserError(PATH, "must be a JSON object")]
    reasons = {key: f"`{field}` decides it" for key, field in RESERVED_KEYS.items()} | SETTLED_KEYS
    sections = {key.partition(".")[0] for key in reasons if "." in key}
    return [
        *(
            UserError(PATH, f"must hold an object under {section}")
            for section in sorted(sections & overrides.keys())
            if not isinstance(overrides[section], dict)
        ),
        *(UserError(PATH, f"must not hold {key}: {reason}") for key, reason in reasons.items() if _has(overrides, key)),
    ]


class _DuplicateKeyError(Exception):
    """A key occurs twice in a JSON object."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result


def _has(node: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True
