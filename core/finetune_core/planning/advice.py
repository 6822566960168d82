"""Finds the smallest changes that make a job fit: each is a set of lines of YAML that a person can write into the job.

`finetune plan` shows them for a job that does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

from finetune_core.planning.gpu_types import GIBIBYTE, GpuType
from finetune_core.planning.job_plan import LARGEST_HOST, JobPlan, Wishes, fits_gpu, plan_job, stage_value
from finetune_core.planning.memory import Phase as MemoryPhase
from finetune_core.planning.memory import memory_plan
from finetune_core.planning.training_plan import process_share
from finetune_core.planning.training_setup import NumberFormat, TrainingSetup, adapter_setup

MOST_CHANGES = 3
"""Largest number of aspects of a job (`_Change.kind`) that a suggestion changes, apart from the memory and the scratch
folder of its pods, and the number of answers that a process generates at once."""
MOST_SUGGESTIONS = 5
GPUS_OF_A_NODE = 8
"""GPUs of the machines that most clouds rent. More GPUs are suggested as more nodes."""
MOST_NODES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """A change of the job after which it fits."""

    lines: tuple[str, ...]
    """Lines of YAML, each with the path of its field, for example `spec.training.microBatchSize: 2`."""
    plan: JobPlan
    """The plan of the job with ``lines``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """A change of one aspect of a job."""

    kind: str
    """What is changed. Changes of the same kind are alternatives."""
    apply: Callable[[TrainingSetup], TrainingSetup]


def suggestions(
    wishes: Wishes,
    plan: JobPlan,
    *,
    rank: int,
    most_changes: int = MOST_CHANGES,
    again: Callable[[Suggestion], JobPlan | None] = lambda made: made.plan,
) -> list[Suggestion]:
    """Return up to MOST_SUGGESTIONS changes after which the job ``wishes`` fits the GPU of ``plan``, which does not
    fit: those with the fewest changed aspects first. Changes that contain another suggestion are left out.

    At most ``most_changes`` aspects are changed. ``rank`` is that of new adapters. ``again`` returns the plan of the
    job with the lines of a suggestion, which may choose anew what the job leaves open, or None where that job is not
    valid. It is called only for changes that fit by the arithmetic of this module, and those of which the new plan does
    not fit are left out.
    """
    found: list[tuple[frozenset[str], Suggestion]] = []
    changes = list(_changes(wishes, plan, rank))
    for count in range(most_changes + 1):
        for group in combinations(changes, count):
            if len({change.kind for change in group}) < count:
                continue
            kinds = frozenset(change.kind for change in group)
            if any(before <= kinds for before, _ in found):
                continue
            suggestion = _try(wishes, plan, group)
            if suggestion is None or any(set(other.lines) <= set(suggestion.lines) for _, other in found):
                continue
            planned = again(suggestion)
            if planned is not None and planned.fits:
                found.append((kinds, replace(suggestion, plan=planned)))
        if found:
            break
    return [suggestion for _, suggestion in found[:MOST_SUGGESTIONS]]


def _try(wishes: Wishes, plan: JobPlan, group: Sequence[_Change]) -> Suggestion | None:
    """Return the suggestion of ``group``, with the lines that it needs for the pod's memory and scratch folder, and for
    the generation of answers. None where the job does not fit then."""
    setup = plan.setup
    for change in group:
        setup = change.apply(setup)
    setup = _fewer_answers(setup, plan.gpu)
    quantized = setup.adapters is not None and setup.adapters.quantized
    if (quantized and setup.zero_stage == 3) or not fits_gpu(setup, plan.gpu):
        return None
    if wishes.sets_accumulation and setup.micro_batch * setup.accumulation * setup.processes != setup.global_batch:
        return None
    changed = replace(
        wishes,
        setup=setup,
        open_stage=False,
        open_micro_batch=False,
        open_recompute=False,
        open_offload=False,
    )
    result = plan_job(changed, plan.gpu)
    lines = _lines(plan.setup, setup, accumulation=wishes.sets_accumulation)
    # A person may also have written the memory and the scratch folder that the plan chose into the job.
    memory = wishes.memory if wishes.memory is not None else plan.host.memory
    if LARGEST_HOST >= result.host.memory > memory:
        changed = replace(changed, memory=-(-result.host.memory // GIBIBYTE) * GIBIBYTE)
        lines.append(f"spec.resources.memory: {-(-result.host.memory // GIBIBYTE)}Gi")
    needed = result.host.scratch.request_gibibytes
    scratch = wishes.scratch if wishes.scratch is not None else plan.host.scratch.request_gibibytes * GIBIBYTE
    if needed * GIBIBYTE > scratch:
        changed = replace(changed, scratch=needed * GIBIBYTE)
        lines.append(f"spec.resources.scratch.size: {needed}Gi")
    result = plan_job(changed, plan.gpu)
    return Suggestion(lines=tuple(lines), plan=result) if result.fits and lines else None


def _fewer_answers(setup: TrainingSetup, gpu: GpuType) -> TrainingSetup:
    """Return ``setup`` with as many answers at once as fit ``gpu``, where only their generation does not fit."""
    while setup.answers > 1:
        memory = memory_plan(setup)
        if memory.needed <= gpu.memory or memory.peak_phase is not MemoryPhase.GENERATION:
            break
        setup = replace(setup, answers=setup.answers // 2)
    return setup


def _lines(before: TrainingSetup, after: TrainingSetup, *, accumulation: bool) -> list[str]:
    """Return the lines of YAML that turn the job of ``before`` into that of ``after``. ``accumulation`` says whether
    the job sets the number of micro-batches, which then must go with their size."""
    old, new = _fields(before, accumulation=accumulation), _fields(after, accumulation=accumulation)
    return [f"spec.{field}: {value}" for field, value in new.items() if old[field] != value]


def _fields(setup: TrainingSetup, *, accumulation: bool) -> dict[str, str | int]:
    """Return the fields of a job below `spec` that a suggestion can change, with the values that ``setup`` means."""
    adapters = setup.adapters
    fields: dict[str, str | int] = {
        "method": "Full" if adapters is None else "LoRA",
        "dataset.maxLength": setup.length,
        "training.precision": setup.number_format.value,
        "evaluation.generation.batchSize": setup.answers,
        "training.microBatchSize": setup.micro_batch,
        "training.gradientAccumulationSteps": setup.accumulation if accumulation else "",
        "training.gradientCheckpointing": "true" if setup.recompute else "false",
        "deepspeed.zeroStage": stage_value(setup.zero_stage),
        "deepspeed.offloadOptimizer": "CPU" if setup.offload_optimizer else "None",
        "resources.gpusPerNode": setup.processes_per_node,
        "resources.nodes": setup.processes // setup.processes_per_node,
        "lora.quantization": "NF4" if adapters is not None and adapters.quantized else "",
    }
    return fields


def _changes(wishes: Wishes, plan: JobPlan, rank: int) -> Iterator[_Change]:
    """Yield the changes to try: first the number format, where the GPU has no bf16, then those that change least of the
    training. Its result is the same up to the number of GPUs, and another one with another number format, shorter rows,
    adapters of rank ``rank`` or 4 bits."""
    setup = plan.setup
    if not plan.gpu.bf16 and setup.number_format is NumberFormat.BF16:
        yield _Change(kind="precision", apply=partial(replace, number_format=NumberFormat.FP32))
    has_plain = setup.processes == 1 and not wishes.needs_deepspeed and not setup.offload_parameters
    if has_plain and setup.zero_stage is not None:
        # The plain engine computes the same, and is no slower.
        yield _Change(kind="stage", apply=_without_deepspeed)
    for size in _halves(setup.micro_batch):
        yield _Change(kind="micro-batch", apply=partial(_smaller, micro_batch=size))
    share = process_share(setup.global_batch, setup.processes)
    if setup.micro_batch < share:
        # A step of one micro-batch accumulates no gradients, which can take more than the activations of a larger one.
        yield _Change(kind="micro-batch", apply=partial(replace, micro_batch=share))
    if not setup.recompute:
        yield _Change(kind="recomputation", apply=partial(replace, recompute=True))
    quantized = setup.adapters is not None and setup.adapters.quantized
    if setup.zero_stage is not None:
        for stage in range(setup.zero_stage + 1, 3 if setup.processes == 1 or quantized else 4):
            yield _Change(kind="stage", apply=partial(_sharded, stage=stage))
    if not setup.offload_optimizer and setup.zero_stage != 0:
        yield _Change(kind="offload", apply=_offloaded)
    yield from _more_gpus(setup)
    for length in _halves(setup.length, least=256):
        yield _Change(kind="length", apply=partial(replace, length=length))
    if setup.adapters is None:
        yield _Change(kind="method", apply=partial(_with_adapters, rank=rank))
    elif not quantized and setup.zero_stage != 3 and not setup.sizes.active_experts:
        yield _Change(kind="quantization", apply=_in_four_bits)


def _smaller(setup: TrainingSetup, *, micro_batch: int) -> TrainingSetup:
    return replace(setup, micro_batch=min(setup.micro_batch, micro_batch))


def _sharded(setup: TrainingSetup, *, stage: int) -> TrainingSetup:
    return replace(setup, zero_stage=max(setup.zero_stage or 0, stage))


def _without_deepspeed(setup: TrainingSetup) -> TrainingSetup:
    return replace(setup, zero_stage=None, offload_optimizer=False)


def _offloaded(setup: TrainingSetup) -> TrainingSetup:
    """Return ``setup`` with its optimizer state in the memory of the host, which DeepSpeed can do."""
    return replace(setup, offload_optimizer=True, zero_stage=2 if setup.zero_stage is None else setup.zero_stage)


def _with_adapters(setup: TrainingSetup, *, rank: int) -> TrainingSetup:
    adapters = adapter_setup(setup.sizes, rank=rank, added_rows=setup.added_rows)
    return replace(setup, adapters=adapters)


def _in_four_bits(setup: TrainingSetup) -> TrainingSetup:
    adapters = setup.adapters
    return setup if adapters is None else replace(setup, adapters=replace(adapters, quantized=True))


def _more_gpus(setup: TrainingSetup) -> Iterator[_Change]:
    """Yield more GPUs: first in one node, then in more nodes. For a single process, yield them with sharded weights
    too, because no other change shards them."""
    for stage in (2, 3) if setup.processes == 1 else (2,):
        gpus, nodes = setup.processes_per_node, setup.processes // setup.processes_per_node
        while gpus < GPUS_OF_A_NODE:
            gpus = min(GPUS_OF_A_NODE, 2 * gpus)
            yield _Change(kind="gpus", apply=partial(_on_more, gpus=gpus, nodes=nodes, stage=stage))
        while nodes < MOST_NODES:
            nodes = min(MOST_NODES, 2 * nodes)
            yield _Change(kind="gpus", apply=partial(_on_more, gpus=gpus, nodes=nodes, stage=stage))


def _on_more(setup: TrainingSetup, *, gpus: int, nodes: int, stage: int) -> TrainingSetup:
    """Return ``setup`` on ``nodes`` nodes with ``gpus`` GPUs each, at least at ZeRO stage ``stage``. The rest of the
    training stays as it is, as far as the global batch has an example for each process. Stage 2 is the first one that
    shards gradients."""
    share = -(-setup.global_batch // (gpus * nodes))
    return replace(
        setup,
        processes=gpus * nodes,
        processes_per_node=gpus,
        micro_batch=min(setup.micro_batch, share),
        zero_stage=max(setup.zero_stage or 0, stage),
    )


def _halves(value: int, *, least: int = 1) -> Iterator[int]:
    """Yield half of ``value``, a quarter and so on, down to ``least``."""
    while value // 2 >= least:
        value //= 2
        yield value
