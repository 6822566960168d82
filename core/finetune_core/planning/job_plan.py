"""The plan of a job: what it needs on a GPU, what the plan chooses where the job leaves something open, how fast the
training is, and whether it fits.

`plan_job` is the function of the room that others call: `finetune plan` by `finetune_core/planned_job.py`. It is pure
arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from finetune_core.planning.activations import MEASURED_FAMILIES
from finetune_core.planning.gpu_types import GIBIBYTE, GpuType
from finetune_core.planning.host_needs import CPUS_PER_GPU, HostNeeds, host_needs
from finetune_core.planning.memory import MemoryPlan, Phase, memory_plan
from finetune_core.planning.speed import SpeedEstimate, estimate_speed
from finetune_core.planning.training_setup import NumberFormat, TrainingSetup

MICRO_BATCH_TOKENS = 16_384
"""Tokens of a micro-batch beyond which a larger one is not faster: every matrix product fills the GPU long before."""
LARGEST_HOST = 2048 * GIBIBYTE
"""Memory of the host in bytes beyond which the plan takes no machine for granted: the machines with 8 GPUs that clouds
rent have at most 2 TiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """A job, with what it leaves open."""

    setup: TrainingSetup
    """The job's settings. Those that are open have their defaults."""
    open_stage: bool = False
    """Whether the plan chooses the ZeRO stage."""
    open_micro_batch: bool = False
    open_recompute: bool = False
    open_offload: bool = False
    """Whether the plan may move the optimizer state to the memory of the host."""
    memory: int | None = None
    """Bytes of memory that each pod gets. None: open."""
    cpus: float | None = None
    """CPUs that each pod gets. None: open."""
    scratch: int | None = None
    """Bytes of the scratch folder. None: open."""
    shared_memory: int = 16 * GIBIBYTE
    """Bytes of /dev/shm, which count towards the memory of the pod."""
    steps: int | None = None
    """Optimizer steps of the training. None where the number of rows is not known."""
    data_bytes: int = 0
    """Bytes of the files with the rows."""
    models_written: int = 0
    """Models of the base model's size that the job publishes."""
    model_is_elsewhere: bool = False
    """Whether the files of the model are on a volume."""
    sets_accumulation: bool = False
    """Whether the job sets the number of micro-batches of an optimizer step (`gradientAccumulationSteps`)."""
    needs_deepspeed: bool = False
    """Whether the job sets something that the plain engine does not have (`deepspeed.overrides`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A value that the plan has chosen."""

    field: str
    """Path in the job, for example `spec.deepspeed.zeroStage`."""
    value: str
    """The value as in YAML."""
    reason: str
    """A sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPlan:
    """The plan of a job on one type of GPU."""

    gpu: GpuType
    setup: TrainingSetup
    memory: MemoryPlan
    host: HostNeeds
    speed: SpeedEstimate
    choices: tuple[Choice, ...]
    problems: tuple[str, ...]
    """What keeps the job from running, in sentences. Empty where it fits."""
    notes: tuple[str, ...]
    """What the figures leave out, in sentences."""
    problems_as_written: tuple[str, ...] = ()
    """What keeps the job from running without the lines of ``choices``, in sentences: the operator has simpler defaults
    for the training. Empty where the job fits without them."""
    hours: float | None
    """Hours of the training, without evaluations and checkpoints. None where the number of steps is not known."""
    cost: float | None
    """Hours times GPUs times the price of a GPU and hour. None without a price."""

    @property
    def fits(self) -> bool:
        """Whether the job fits: the GPU, and the memory that each pod gets."""
        return not self.problems


def plan_job(wishes: Wishes, gpu: GpuType, *, price: float | None = None) -> JobPlan:
    """Return the plan of ``wishes`` on GPUs of the type ``gpu``. ``price`` is that of one GPU for an hour."""
    setup = _chosen(wishes, gpu)
    memory = memory_plan(setup)
    speed = estimate_speed(setup, gpu)
    host = host_needs(
        setup,
        shared_memory=wishes.shared_memory,
        data_bytes=wishes.data_bytes,
        models_written=wishes.models_written,
        model_is_elsewhere=wishes.model_is_elsewhere,
    )
    hours = speed.hours(wishes.steps) if wishes.steps is not None else None
    return JobPlan(
        gpu=gpu,
        setup=setup,
        memory=memory,
        host=host,
        speed=speed,
        choices=tuple(_choices(wishes, setup, memory, host, gpu)),
        problems=tuple(_problems(wishes, setup, memory, host, gpu)),
        notes=tuple(_notes(setup, memory)),
        hours=hours,
        cost=hours * setup.processes * price if hours is not None and price is not None else None,
    )


def fits_gpu(setup: TrainingSetup, gpu: GpuType) -> bool:
    """Return whether the memory of ``setup`` fits one GPU of the type ``gpu``."""
    return memory_plan(setup).needed <= gpu.memory


def was_measured(setup: TrainingSetup) -> bool:
    """Return whether the memory of trainings like ``setup`` was measured (docs/planning.md)."""
    quantized = setup.adapters is not None and setup.adapters.quantized
    unmeasured = quantized or setup.packed or setup.offload_optimizer or setup.offload_parameters
    return setup.sizes.family in MEASURED_FAMILIES and not unmeasured


def gibibytes(count: float) -> str:
    """Return ``count`` bytes as text, for example `12.3 GiB`."""
    return f"{count / GIBIBYTE:.1f} GiB"


# ---- What the job leaves open ----


def _chosen(wishes: Wishes, gpu: GpuType) -> TrainingSetup:
    """Return the job's settings with the defaults of what it leaves open, where that fits: a plan changes nothing of a
    job that runs without it. Otherwise return the fastest setup that fits, without offload where possible. Where none
    fits, return the one that exceeds the memory of the GPU least, and among those the one that exceeds the memory of
    the host least."""
    allowed = list(_candidates(wishes))
    if len(allowed) == 1:
        return allowed[0]
    most = wishes.memory if wishes.memory is not None else LARGEST_HOST

    def excess_of(setup: TrainingSetup) -> tuple[int, int]:
        """Return how many bytes of GPU and host ``setup`` takes too many."""
        host = host_needs(setup, shared_memory=wishes.shared_memory).memory
        return max(0, memory_plan(setup).needed - gpu.memory), max(0, host - most)

    if excess_of(wishes.setup) == (0, 0):
        return wishes.setup
    excess = [(*excess_of(setup), setup) for setup in allowed]
    least = min(found[:2] for found in excess)
    candidates = [found[2] for found in excess if found[:2] == least]
    if least[0]:
        # A person who changes the job begins with the smallest micro-batch.
        return min(candidates, key=lambda setup: (setup.offload_optimizer, setup.micro_batch))

    def preference(setup: TrainingSetup) -> tuple[bool, bool, float]:
        """Return a key that is smallest for the best setup. Where a job would get DeepSpeed, the plain engine is taken
        only where nothing else fits without offload."""
        is_other_engine = setup.zero_stage is None and wishes.setup.zero_stage is not None
        return setup.offload_optimizer, is_other_engine, estimate_speed(setup, gpu).seconds_per_step

    return min(candidates, key=preference)


def _candidates(wishes: Wishes) -> Iterator[TrainingSetup]:
    """Yield every setup that ``wishes`` allow. Those that are preferred among equally fast ones come first."""
    setup = wishes.setup
    for offload in (False, True) if wishes.open_offload else (setup.offload_optimizer,):
        for stage in _stages(wishes, offload=offload):
            for recompute in (False, True) if wishes.open_recompute else (setup.recompute,):
                for micro_batch in _micro_batches(wishes):
                    yield replace(
                        setup,
                        zero_stage=stage,
                        offload_optimizer=offload,
                        recompute=recompute,
                        micro_batch=micro_batch,
                    )


def _stages(wishes: Wishes, *, offload: bool) -> tuple[int | None, ...]:
    """Return the ZeRO stages to try with or without ``offload`` of the optimizer state, as `TrainingSetup.zero_stage`
    has them."""
    setup = wishes.setup
    if offload and setup.zero_stage is None:
        # Only DeepSpeed moves the optimizer state.
        return (2,)
    if not wishes.open_stage or setup.zero_stage is None:
        return (setup.zero_stage,)
    if setup.processes == 1:
        return (2,) if offload or wishes.needs_deepspeed else (2, None)
    # bitsandbytes' tensors of 4-bit numbers can't be sharded.
    quantized = setup.adapters is not None and setup.adapters.quantized
    return (2,) if quantized else (2, 3)


def _micro_batches(wishes: Wishes) -> list[int]:
    """Return the sizes of micro-batches to try, the largest first: those that divide a process's share of the global
    batch and have at most MICRO_BATCH_TOKENS tokens."""
    setup = wishes.setup
    if not wishes.open_micro_batch:
        return [setup.micro_batch]
    share = -(-setup.global_batch // setup.processes)
    most = max(1, MICRO_BATCH_TOKENS // setup.length)
    return [size for size in range(min(share, most), 0, -1) if share % size == 0]


def _choices(
    wishes: Wishes, setup: TrainingSetup, memory: MemoryPlan, host: HostNeeds, gpu: GpuType
) -> Iterator[Choice]:
    fits = memory.needed <= gpu.memory
    if wishes.open_stage:
        yield Choice(
            field="spec.deepspeed.zeroStage",
            value=stage_value(setup.zero_stage),
            reason=_stage_reason(setup, fits=fits),
        )
    if wishes.open_recompute:
        reason = (
            "The activations do not fit otherwise, or leave room for small micro-batches only."
            if setup.recompute
            else "The activations fit, and computing them again would take about a third more time."
            if fits
            else "Computing the activations again would not make the job fit."
        )
        yield Choice(
            field="spec.training.gradientCheckpointing", value="true" if setup.recompute else "false", reason=reason
        )
    if wishes.open_offload:
        reason = (
            "The optimizer state does not fit the GPUs."
            if setup.offload_optimizer
            else "The optimizer state fits the GPUs, where the update is far faster."
            if fits
            else "Moving the optimizer state to the memory of the host would not make the job fit."
        )
        yield Choice(
            field="spec.deepspeed.offloadOptimizer", value="CPU" if setup.offload_optimizer else "None", reason=reason
        )
    if wishes.open_micro_batch:
        reason = (
            f"It has {setup.tokens:,} tokens, and it is the default, which fits."
            if fits and setup == wishes.setup
            else f"It has {setup.tokens:,} tokens, and the fastest size that fits was chosen."
            if fits
            else "No size fits, and none takes less memory."
        )
        yield Choice(field="spec.training.microBatchSize", value=str(setup.micro_batch), reason=reason)
    if wishes.memory is None:
        what = "the copies of the training state for checkpoints" if host.snapshots >= host.loading else "loading"
        yield Choice(
            field="spec.resources.memory",
            value=f"{-(-host.memory // GIBIBYTE)}Gi",
            reason=f"Most of it is for {what}.",
        )
    if wishes.cpus is None:
        yield Choice(
            field="spec.resources.cpu",
            value=str(host.cpus),
            reason=f"Each process gets {CPUS_PER_GPU} CPUs for Python, NCCL and the preparation of batches.",
        )
    if wishes.scratch is None:
        yield Choice(
            field="spec.resources.scratch.size",
            value=f"{host.scratch.request_gibibytes}Gi",
            reason="The folder holds the model, the rows, and checkpoints and artifact until they are uploaded.",
        )


def stage_value(zero_stage: int | None) -> str:
    """Return the value of `spec.deepspeed.zeroStage` for ``zero_stage``, for example `2`, or `None` for the plain
    engine."""
    return str(zero_stage)


def _stage_reason(setup: TrainingSetup, *, fits: bool) -> str:
    if setup.zero_stage is None:
        if setup.adapters is not None:
            return "One process that trains with LoRA needs nothing of DeepSpeed, and takes less memory without it."
        if fits:
            return "Only training without DeepSpeed fits: it takes 16 bytes a parameter, and stage 2 takes 18 or more."
        return "Training without DeepSpeed takes least memory, and does not fit either."
    if setup.processes == 1:
        return "With one process nothing can be sharded, and stage 2 adds up gradients in fp32."
    if setup.adapters is not None and setup.adapters.quantized:
        return "Weights in 4 bits can't be sharded, and stage 2 shards the rest."
    if setup.zero_stage == 2 and not fits:
        return "Sharding the weights too would not make the job fit."
    if setup.zero_stage == 2:
        return "Weights fit each GPU, and stage 2 shards the rest without more communication."
    return "The weights must be sharded too, or sharding them leaves room for larger micro-batches."


def _problems(wishes: Wishes, setup: TrainingSetup, memory: MemoryPlan, host: HostNeeds, gpu: GpuType) -> Iterator[str]:
    if not gpu.kernels:
        yield f"Torch in the trainer image has no kernels for the {gpu.name}."
    if not gpu.bf16 and setup.number_format is NumberFormat.BF16:
        yield f"The {gpu.name} has no bf16 arithmetic, and spec.training.precision is bf16."
    if memory.needed > gpu.memory:
        yield (
            f"A GPU needs {gibibytes(memory.needed)} ({memory.peak_phase}), and the {gpu.name} has"
            f" {gibibytes(gpu.memory)}."
        )
    if wishes.memory is not None and host.memory > wishes.memory:
        yield (f"spec.resources.memory: a pod needs {gibibytes(host.memory)}, and gets {gibibytes(wishes.memory)}.")
    if wishes.memory is None and host.memory > LARGEST_HOST:
        yield (
            f"A pod needs {gibibytes(host.memory)} of memory, and machines with 8 GPUs have at most"
            f" {gibibytes(LARGEST_HOST)}."
        )
    if wishes.scratch is not None and host.scratch.request_gibibytes * GIBIBYTE > wishes.scratch:
        yield (
            f"spec.resources.scratch.size: a pod needs {host.scratch.request_gibibytes}.0 GiB, and gets"
            f" {gibibytes(wishes.scratch)}."
        )


def _notes(setup: TrainingSetup, memory: MemoryPlan) -> Iterator[str]:
    yield from setup.left_out
    if memory.peak_phase is Phase.GENERATION:
        yield "The memory of the generation of answers was never measured: it follows from keys and values."
    if setup.sizes.family not in MEASURED_FAMILIES:
        yield f"The memory of models of the family {setup.sizes.family} was never measured."
    if setup.number_format is NumberFormat.FP32:
        yield "The speed is that of bf16, and fp32 takes up to 16 times as long: it was never measured."
    if setup.adapters is not None and any(setup.adapters.expert_weights):
        yield "The speed leaves out that the adapters of experts are merged into their weights in each forward pass."
    if setup.adapters is not None and setup.adapters.quantized:
        yield "The memory of a base model in 4 bits was never measured."
    if setup.offload_optimizer or setup.offload_parameters:
        yield (
            "Offload was never measured: the memory follows from DeepSpeed's code, and the speed leaves out the"
            " transfers."
        )
