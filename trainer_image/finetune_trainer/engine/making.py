"""Makes the engine that a job trains with: DeepSpeed's, or the plain engine in one process.

`train.py` calls `make_engine` for each run.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from finetune_core.contract import OptimizationConfig
from finetune_trainer.engine.engine import Engine
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.engine.plain_engine import PlainEngine
from finetune_trainer.kernels.parts import KernelPart


def make_engine(
    model: torch.nn.Module,
    optimization: OptimizationConfig,
    device: torch.device,
    *,
    lora_plus_ratio: float = 1.0,
    plain_kernels: Collection[KernelPart] = (),
) -> TrainingEngine:
    """Return the engine with ``model``, and with the optimizer that ``optimization`` describes. All ranks must make
    their engine together.

    ``lora_plus_ratio`` is the learning rate of the matrices B of adapters, and of all trained vectors, as a multiple of
    the job's learning rate. ``plain_kernels`` are the parts of a step that compute without the trainer's own kernels.
    """
    kind = Engine if optimization.zero_stage is not None else PlainEngine
    return kind(model, optimization, device, lora_plus_ratio=lora_plus_ratio, plain_kernels=plain_kernels)
