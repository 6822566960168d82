"""The peak memory that a training is expected to need, which the check prints beside the measured peak: the figure of
the plan of a job (`core/finetune_core/planning`)."""

from __future__ import annotations

from dataclasses import asdict

from finetune_core.planning.memory import memory_plan
from finetune_core.planning.model_families import model_sizes
from finetune_core.planning.training_setup import NumberFormat, TrainingSetup, adapter_setup
from tests.gpu.settings import LORA_RANK, Setup, Shape

SOURCE = "the plan"


def expected_peak_bytes(setup: Setup, shape: Shape) -> int:
    """Return the bytes that torch's allocator is expected to have allocated at most in an optimizer step."""
    sizes = model_sizes({"model_type": "llama", "tie_word_embeddings": False, **asdict(shape)})
    planned = TrainingSetup(
        sizes=sizes,
        adapters=adapter_setup(sizes, rank=LORA_RANK) if setup.method == "LoRA" else None,
        number_format=NumberFormat(setup.precision),
        zero_stage=setup.stage,
        recompute=setup.recompute,
        micro_batch=setup.rows,
        length=setup.length,
        packed=setup.packed_tokens is not None,
        global_batch=setup.rows,
    )
    return memory_plan(planned).step_peak
