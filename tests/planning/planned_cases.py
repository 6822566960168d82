"""The plan's figures for the cases of `memory_cases.py`."""

from __future__ import annotations

from finetune_core.planning.memory import MemoryPlan, memory_plan
from finetune_core.planning.model_families import model_sizes
from finetune_core.planning.training_setup import NumberFormat, TrainingSetup, adapter_setup
from tests.planning.memory_cases import MemoryCase


def setup_of(case: MemoryCase) -> TrainingSetup:
    """Return ``case`` in the terms of the plan."""
    sizes = model_sizes(case.configuration)
    adapters = None
    if case.rank is not None:
        adapters = adapter_setup(sizes, rank=case.rank, dropout=case.dropout != "0")
    return TrainingSetup(
        sizes=sizes,
        adapters=adapters,
        number_format=NumberFormat(case.precision),
        processes=case.processes,
        processes_per_node=min(8, case.processes),
        zero_stage=case.stage,
        recompute=case.recompute,
        micro_batch=case.micro_batch,
        length=case.length,
        global_batch=case.micro_batch * case.accumulation * case.processes,
    )


def planned(case: MemoryCase) -> MemoryPlan:
    """Return the plan's memory of ``case``."""
    return memory_plan(setup_of(case))
