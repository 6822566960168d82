"""Finds the smallest changes that make a job fit: each is a set of lines of YAML that a person can write into the job.

`finetune plan` shows them for a job that does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

from finetune_core.planning.gpu_types import GIBIBYTE
from finetune_core.planning.job_plan import JobPlan, Wishes, plan_job
from finetune_core.planning.training_setup import TrainingSetup, adapter_setup

MOST_CHANGES = 3
"""Largest number of fields that a suggestion changes, apart from those of the pod."""
MOST_SUGGESTIONS = 5
GPUS_OF_A_NODE = 8
"""GPUs of the machines that most clouds rent. More GPUs are suggested as more nodes."""
MOST_NODES = 16
DEFAULT_RANK = 8
"""Rank of new adapters where a job sets none (`lora.rank`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """A change of the job after which it fits."""

    lines: tuple[str, ...]
    """Lines of YAML, each with the path of its field, for example `spec.training.microBatchSize: 2`."""
    plan: JobPlan
    """The plan of the changed job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """A change of one aspect of a job."""

    kind: str
    """What is changed. Changes of the same kind are alternatives."""
    lines: tuple[str, ...]
    apply: Callable[[TrainingSetup], TrainingSetup]


def suggestions(wishes: Wishes, plan: JobPlan) -> list[Suggestion]:
    """Return up to MOST_SUGGESTIONS changes after which the job ``wishes`` fits the GPU of ``plan``, which does not
    fit: those with the fewest changed fields first. Changes that contain another suggestion are left out."""
    found: list[tuple[frozenset[str], Suggestion]] = []
    changes = list(_changes(plan.setup))
    for count in range(MOST_CHANGES + 1):
        for group in combinations(changes, count):
            if len({change.kind for change in group}) < count:
                continue
            kinds = frozenset(change.kind for change in group)
            if any(before <= kinds for before, _ in found):
                continue
            suggestion = _try(wishes, plan, group)
            if suggestion is not None:
                found.append((kinds, suggestion))
        if found and count >= 1:
            break
    return [suggestion for _, suggestion in found[:MOST_SUGGESTIONS]]


def _try(wishes: Wishes, plan: JobPlan, group: Sequence[_Change]) -> Suggestion | None:
    """Return the suggestion of ``group``, with the lines for the pod's memory and scratch folder that it needs. None
    where the job does not fit then."""
    setup = plan.setup
    for change in group:
        setup = change.apply(setup)
    changed = replace(
        wishes,
        setup=setup,
        open_stage=False,
        open_micro_batch=False,
        open_recompute=False,
        open_offload=False,
    )
    result = plan_job(changed, plan.gpu)
    lines = [line for change in group for line in change.lines]
    if wishes.memory is not None and result.host.memory > wishes.memory:
        changed = replace(changed, memory=-(-result.host.memory // GIBIBYTE) * GIBIBYTE)
        lines.append(f"spec.resources.memory: {-(-result.host.memory // GIBIBYTE)}Gi")
    needed = result.host.scratch.request_gibibytes
    if wishes.scratch is not None and needed * GIBIBYTE > wishes.scratch:
        changed = replace(changed, scratch=needed * GIBIBYTE)
        lines.append(f"spec.resources.scratch.size: {needed}Gi")
    result = plan_job(changed, plan.gpu)
    return Suggestion(lines=tuple(lines), plan=result) if result.fits and lines else None


def _changes(setup: TrainingSetup) -> Iterator[_Change]:
    """Yield the changes to try, those first that change least of the training: its result is the same up to
    `gpusPerNode`, and another one with shorter rows, adapters or 4 bits."""
    for size in _halves(setup.micro_batch):
        yield _Change(
            kind="micro-batch",
            lines=(f"spec.training.microBatchSize: {size}",),
            apply=partial(replace, micro_batch=size),
        )
    if not setup.recompute:
        yield _Change(
            kind="recomputation",
            lines=("spec.training.gradientCheckpointing: true",),
            apply=lambda before: replace(before, recompute=True),
        )
    quantized = setup.adapters is not None and setup.adapters.quantized
    for stage in range(setup.zero_stage + 1, 3 if setup.processes == 1 or quantized else 4):
        yield _Change(
            kind="stage",
            lines=(f"spec.deepspeed.zeroStage: {stage}",),
            apply=partial(replace, zero_stage=stage),
        )
    if not setup.offload_optimizer and setup.zero_stage >= 1:
        yield _Change(
            kind="offload",
            lines=("spec.deepspeed.offloadOptimizer: CPU",),
            apply=lambda before: replace(before, offload_optimizer=True),
        )
    yield from _more_gpus(setup)
    for length in _halves(setup.length, least=256):
        yield _Change(
            kind="length",
            lines=(f"spec.dataset.maxLength: {length}",),
            apply=partial(replace, length=length),
        )
    if setup.adapters is None:
        yield _Change(
            kind="method",
            lines=("spec.method: LoRA",),
            apply=lambda before: replace(
                before, adapters=adapter_setup(before.sizes, rank=DEFAULT_RANK, added_rows=before.added_rows)
            ),
        )
    elif not quantized and setup.zero_stage < 3 and not setup.sizes.active_experts:
        yield _Change(
            kind="quantization",
            lines=("spec.lora.quantization: NF4",),
            apply=lambda before: replace(
                before, adapters=replace(before.adapters, quantized=True) if before.adapters is not None else None
            ),
        )


def _more_gpus(setup: TrainingSetup) -> Iterator[_Change]:
    """Yield more GPUs: first in one node, then in more nodes. The rest of the training stays as it is, as far as the
    global batch has an example for each process."""
    gpus, nodes = setup.processes_per_node, setup.processes // setup.processes_per_node
    while gpus < GPUS_OF_A_NODE:
        gpus = min(GPUS_OF_A_NODE, 2 * gpus)
        yield _processes(setup, gpus, nodes)
    while nodes < MOST_NODES:
        nodes = min(MOST_NODES, 2 * nodes)
        yield _processes(setup, gpus, nodes)


def _processes(setup: TrainingSetup, gpus: int, nodes: int) -> _Change:
    lines = []
    if gpus != setup.processes_per_node:
        lines.append(f"spec.resources.gpusPerNode: {gpus}")
    if nodes != setup.processes // setup.processes_per_node:
        lines.append(f"spec.resources.nodes: {nodes}")
    share = -(-setup.global_batch // (gpus * nodes))
    micro_batch = min(setup.micro_batch, share)
    if micro_batch != setup.micro_batch:
        lines.append(f"spec.training.microBatchSize: {micro_batch}")

    def apply(before: TrainingSetup) -> TrainingSetup:
        # Another change of the same suggestion may have made the micro-batch smaller still.
        stage = max(before.zero_stage, 2)
        return replace(
            before,
            processes=gpus * nodes,
            processes_per_node=gpus,
            micro_batch=min(before.micro_batch, micro_batch),
            zero_stage=stage,
        )

    if setup.zero_stage < 2:
        lines.append("spec.deepspeed.zeroStage: 2")
    return _Change(kind="gpus", lines=tuple(lines), apply=apply)


def _halves(value: int, *, least: int = 1) -> Iterator[int]:
    """Yield half of ``value``, a quarter and so on, down to ``least``."""
    while value // 2 >= least:
        value //= 2
        yield value
