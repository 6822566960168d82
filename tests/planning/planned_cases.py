"""The plan's figures for the cases of `memory_cases.py`."""

from __future__ import annotations

from finetune_core.planning.memory import MemoryPlan, memory_plan
from finetune_core.planning.model_families import model_sizes
from finetune_core.planning.model_sizes import Part
from finetune_core.planning.training_setup import AdapterSetup, NumberFormat, TrainingSetup
from tests.planning.memory_cases import MemoryCase


def setup_of(case: MemoryCase) -> TrainingSetup:
    """Return ``case`` in the terms of the plan."""
    sizes = model_sizes(case.configuration)
    adapters = None
    if case.rank is not None:
        # The measured models get adapters on linear layers only, and not on experts.
        layers = [
            [one for one in layer.linears if one.part not in (Part.ROUTER, Part.EXPERTS)] for layer in sizes.layers
        ]
        dropped = [sum(one.inputs for one in layer) if case.dropout != "0" else 0 for layer in layers]
        adapters = AdapterSetup(
            rank=case.rank,
            parameters=sum(one.adapter_parameters(case.rank) for layer in layers for one in layer),
            per_layer=tuple(len(layer) for layer in layers),
            dropped_features=tuple(dropped),
        )
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
