"""Checks by the plan of the training whether it fits the memory of its GPUs, before any GPU is held.

`preflight/entrypoint.py` calls `check_memory_of` once the base model and the first rows are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from finetune_core.api.method import DEFAULT_RANK
from finetune_core.api.status import ADVICE_LENGTH
from finetune_core.contract import RunConfig
from finetune_core.contract.preflight_result import PlannedChoices, PlannedNeeds
from finetune_core.errors import UserError
from finetune_core.planned_job import wishes_of_run
from finetune_core.planning.advice import MOST_CHANGES, Suggestion, suggestions
from finetune_core.planning.gpu_types import GIBIBYTE, find_gpu
from finetune_core.planning.job_plan import LARGEST_HOST, JobPlan, Wishes, gibibytes, plan_job, was_measured
from finetune_core.planning.memory import memory_plan
from finetune_core.planning.training_plan import process_share
from finetune_core.planning.training_setup import TrainingSetup
from finetune_trainer.pod.model_file_names import CONFIG_FILE
from finetune_trainer.pod.model_text_files import read_json_object

REFUSED_EXCESS: Final = 1.1
"""The job is refused where it needs more than this multiple of a GPU's memory for rows that it certainly trains on. The
plan is up to 8 % too high (docs/planning.md)."""
REFUSED_UNMEASURED: Final = 1.5
"""The same multiple for trainings whose memory was never measured."""
LESS_MEMORY: Final = 0.9
"""The advice for a training that ran out of memory takes at most this share of what the training takes."""
GPU_FIELD: Final = "resources.gpuProduct"


@dataclass(frozen=True, kw_only=True)
class MemoryCheck:
    """What the plan says about a training that is not refused."""

    planned: PlannedNeeds | None
    """None where the figures are larger than any that a job can ask for."""
    notices: Sequence[str]
    """Sentences for the user about a training that may not fit."""


def check_memory_of(config: RunConfig, model: Path, *, longest_row: int | None) -> MemoryCheck | None:
    """Return what `check_memory` returns for the base model in the folder ``model``."""
    return check_memory(config, read_json_object(model / CONFIG_FILE), longest_row=longest_row)


def check_memory(config: RunConfig, configuration: Mapping[str, Any], *, longest_row: int | None) -> MemoryCheck | None:
    """Return what the training ``config`` needs by its plan, and notices where a GPU or a pod may have too little.

    ``configuration`` is the content of the base model's `config.json`. ``longest_row`` is the number of tokens of the
    longest training example that was read, or None where none was. The result is None where there is no plan: on CPUs,
    and for GPUs and models that the plan does not know.

    Raises UserError where the training can't fit: where it needs far more than a GPU has even if no row is longer than
    ``longest_row``. The figures of the notices are those of rows with `dataset.maxLength` tokens, because nobody knows
    the rows that were not read.
    """
    product = config.world.gpu_product
    if config.world.device != "GPU" or product is None:
        return None
    try:
        gpu = find_gpu(product)
        wishes = wishes_of_run(config, configuration)
    except UserError:
        # The plan does not know the GPU or the model, or the model is one that another check refuses.
        return None
    plan = plan_job(wishes, gpu)
    shortest = _shortest(config, plan.setup, longest_row or 1)
    least = memory_plan(shortest)
    most = gpu.memory * (REFUSED_EXCESS if was_measured(shortest) else REFUSED_UNMEASURED)
    # What `deepspeed.overrides` changes is not planned, and may take less memory.
    if least.needed > most and not wishes.needs_deepspeed:
        raise UserError(
            GPU_FIELD,
            f"must name a GPU with more memory, because the training takes at least {gibibytes(least.needed)} of each"
            f" GPU at the peak ({least.peak_phase}) and the {gpu.name} has {gibibytes(gpu.memory)};"
            f" {_smallest_change(wishes, plan)}",
        )
    notices = [*_gpu_notices(wishes, plan), *_host_notices(wishes, plan)]
    return MemoryCheck(planned=_needs(wishes, plan), notices=notices)


def _shortest(config: RunConfig, setup: TrainingSetup, longest_row: int) -> TrainingSetup:
    """Return the training ``setup``, with the choices of its plan, where no row has more than ``longest_row`` tokens.
    Packed rows fill sequences of the largest length, but no more of them than the rows of a step need. Generated
    answers are left out, because nobody knows yet how long the prompts are."""
    if not config.dataset.packing:
        return replace(setup, answers=0, length=min(longest_row, setup.length))
    rows_in_a_sequence = max(1, setup.length // longest_row)
    sequences = -(-setup.global_batch // rows_in_a_sequence)
    share = process_share(sequences, setup.processes)
    return replace(setup, answers=0, global_batch=sequences, micro_batch=min(setup.micro_batch, share))


def _needs(wishes: Wishes, plan: JobPlan) -> PlannedNeeds | None:
    try:
        return PlannedNeeds(
            gpu_memory_bytes=plan.memory.needed,
            memory_bytes=plan.host.memory,
            cpus=plan.host.cpus,
            choices=PlannedChoices(
                zero_stage=plan.setup.zero_stage,
                offload_optimizer=plan.setup.offload_optimizer,
                gradient_checkpointing=plan.setup.recompute,
                micro_batch_size=plan.setup.micro_batch,
            ),
            advice=_advice(wishes, plan),
        )
    except ValidationError:  # `config.json` names sizes that no machine has
        return None


def _gpu_notices(wishes: Wishes, plan: JobPlan) -> Iterator[str]:
    """Yield a notice where a GPU may have too little memory."""
    gpu = plan.gpu
    if plan.memory.needed > gpu.memory:
        yield (
            f"{GPU_FIELD}: with rows of {wishes.setup.length:,} tokens the training takes"
            f" {gibibytes(plan.memory.needed)} of each GPU, and the {gpu.name} has {gibibytes(gpu.memory)};"
            f" {_smallest_change(wishes, plan)}"
        )


def _host_notices(wishes: Wishes, plan: JobPlan) -> Iterator[str]:
    """Yield a notice where a pod may need more memory than it gets, or than machines have. This is never a reason to
    refuse a job, because the memory of the host was never measured."""
    needed = f"resources.memory: a pod may need {gibibytes(plan.host.memory)}"
    if wishes.memory is None:
        if plan.host.memory > LARGEST_HOST:
            yield f"{needed}, and machines with 8 GPUs have at most {gibibytes(LARGEST_HOST)}"
    elif plan.host.memory > wishes.memory:
        yield (
            f"{needed}, and gets {gibibytes(wishes.memory)}; enough is"
            f" spec.resources.memory: {-(-plan.host.memory // GIBIBYTE)}Gi"
        )


def _advice(wishes: Wishes, plan: JobPlan) -> str:
    """Return the lines of one change after which the training takes at least a tenth less than it does with a
    micro-batch of one example, and fits: advice for a training that runs out of memory although its micro-batch can't
    be halved. Where the plan says that it fits, the tenth is what the plan or the memory that others hold may be off.

    Empty where the plan knows no such change. A search for several changes at once would take long, and most jobs need
    no advice."""
    smallest = replace(plan.setup, micro_batch=1)
    needed = memory_plan(smallest).needed
    less = plan.gpu.model_copy(
        update={"memory_gibibytes": min(plan.gpu.memory_gibibytes, needed * LESS_MEMORY / GIBIBYTE)}
    )
    written = replace(
        wishes, setup=smallest, open_stage=False, open_micro_batch=False, open_recompute=False, open_offload=False
    )
    # A larger micro-batch may take less by the plan, but has run out of memory already.
    lines = ", ".join(
        _smallest_lines(written, plan_job(written, less), most_changes=1, never="spec.training.microBatchSize:")
    )
    return lines if len(lines) <= ADVICE_LENGTH else ""


def _smallest_lines(
    wishes: Wishes, plan: JobPlan, *, most_changes: int = MOST_CHANGES, never: str = "spec.lora.quantization:"
) -> Sequence[str]:
    """Return the lines of the change of the fewest fields after which the training of ``plan`` fits; empty where no
    small change does.

    Weights in 4 bits are left out, because the run file does not have all fields that their rules compare. So are lines
    that begin with ``never``.
    """

    def again(made: Suggestion) -> JobPlan | None:
        left_out = ("spec.lora.quantization:", never)
        return None if any(line.startswith(left_out) for line in made.lines) else made.plan

    found = suggestions(wishes, plan, rank=DEFAULT_RANK, most_changes=most_changes, again=again)
    return found[0].lines if found else ()


def _smallest_change(wishes: Wishes, plan: JobPlan) -> str:
    """Return the change of `_smallest_lines` as the end of a sentence."""
    lines = _smallest_lines(wishes, plan)
    return f"the smallest change with which it fits is {', '.join(lines)}" if lines else "no small change makes it fit"
