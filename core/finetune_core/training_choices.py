"""What of its training a job leaves to the plan, and how the choices of the plan are filled in.

`planned_job.py` and `resolve.py` call `open_choices`, so that `finetune plan`, the preflight check and the attempts
leave the same fields open. `resolve.py` calls `with_choices` with the choices that stand in `status.plan`.
"""

from __future__ import annotations

from finetune_core.api.method import Method
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.api.status import TrainingChoices
from finetune_core.contract import OpenChoice
from finetune_core.planning.training_plan import process_share


def open_choices(spec: FineTuneJobSpec) -> frozenset[OpenChoice]:
    """Return the fields of the training that ``spec`` leaves to the plan.

    There are none on CPUs, about which there is no plan. Nor are there any where the job continues an adapter, because
    nobody knows the rank of that adapter before its files are read.
    """
    training, deepspeed, adapter = spec.training, spec.deepspeed, spec.model.adapter
    if spec.resources.device != "GPU" or (adapter is not None and adapter.use == "Continue"):
        return frozenset()
    stage = deepspeed.zero_stage
    is_open = {
        OpenChoice.ZERO_STAGE: stage == "Auto" and training.precision == "bf16",
        OpenChoice.OFFLOAD_OPTIMIZER: deepspeed.offload_optimizer is None
        and (stage == "Auto" or (isinstance(stage, int) and stage >= 1)),
        OpenChoice.GRADIENT_CHECKPOINTING: training.gradient_checkpointing is None,
        OpenChoice.MICRO_BATCH_SIZE: training.micro_batch_size is None and training.gradient_accumulation_steps is None,
    }
    return frozenset(choice for choice, value in is_open.items() if value)


def with_choices(spec: FineTuneJobSpec, choices: TrainingChoices | None) -> FineTuneJobSpec:
    """Return ``spec`` with those values of ``choices`` that it leaves open. Choices that make no job that can run are
    ignored: an image of a user may tell any."""
    if choices is None or not _possible(chosen := _filled(spec, choices)):
        return spec
    return chosen


def _filled(spec: FineTuneJobSpec, choices: TrainingChoices) -> FineTuneJobSpec:
    fields = open_choices(spec)
    training: dict[str, object] = {}
    deepspeed: dict[str, object] = {}
    if OpenChoice.ZERO_STAGE in fields:
        deepspeed["zero_stage"] = "None" if choices.zero_stage is None else choices.zero_stage
    if OpenChoice.OFFLOAD_OPTIMIZER in fields:
        deepspeed["offload_optimizer"] = "CPU" if choices.offload_optimizer else "None"
    if OpenChoice.GRADIENT_CHECKPOINTING in fields:
        training["gradient_checkpointing"] = choices.gradient_checkpointing
    if OpenChoice.MICRO_BATCH_SIZE in fields:
        training["micro_batch_size"] = choices.micro_batch_size
    return spec.model_copy(
        update={
            "training": spec.training.model_copy(update=training),
            "deepspeed": spec.deepspeed.model_copy(update=deepspeed),
        }
    )


def _possible(spec: FineTuneJobSpec) -> bool:
    """Return whether the rules of the API, which the choices of a plan never break, hold for the values in ``spec``."""
    deepspeed, processes = spec.deepspeed, spec.resources.processes
    stage = deepspeed.zero_stage
    offloads = deepspeed.offload_optimizer == "CPU"
    if stage == "None" and (processes > 1 or offloads or deepspeed.overrides is not None):
        return False
    quantized = spec.method is Method.LORA and spec.lora is not None and spec.lora.quantization is not None
    if stage == 3 and quantized:
        return False
    if stage == 0 and (offloads or spec.training.precision == "bf16"):
        return False
    size = spec.training.micro_batch_size
    return size is None or size <= process_share(spec.training.global_batch_size, processes)
