"""Makes the plan of a FineTuneJob: takes from the job, or from its run file, what the arithmetic of `planning` needs.

`finetune plan` calls `gpu_of`, `plan_of` and `changes_of` for a job. The trainer's preflight check calls
`wishes_of_run` for a run file, which says what the job leaves open. The plan chooses the same in both cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, Final

import yaml

from finetune_core.api.dataset import DatasetSpec
from finetune_core.api.evaluation import GenerationSpec
from finetune_core.api.method import DEFAULT_RANK, LoRASpec, Method
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.api.storage import Export
from finetune_core.contract import OpenChoice, RunConfig
from finetune_core.errors import UserError
from finetune_core.planning.advice import Suggestion, suggestions
from finetune_core.planning.gpu_types import GPU_TYPES, GpuType, find_gpu
from finetune_core.planning.job_plan import JobPlan, Wishes, plan_job
from finetune_core.planning.model_families import model_sizes
from finetune_core.planning.model_sizes import ModelSizes, Part
from finetune_core.planning.training_plan import micro_batch_size, process_share, total_steps, zero_stage
from finetune_core.planning.training_setup import AdapterSetup, NumberFormat, TrainingSetup, adapter_setup
from finetune_core.training_choices import open_choices
from finetune_core.validation.runnable import to_bytes
from finetune_core.validation.validate_job import validate_job

PRODUCT: Final = "spec.resources.gpuProduct"
"""The field that names the GPU of a job."""


def gpu_of(spec: FineTuneJobSpec, types: tuple[GpuType, ...] = GPU_TYPES) -> GpuType:
    """Return the type of the GPUs that ``spec`` asks for. Raises UserError where the job names none, or one that is not
    in ``types``."""
    if spec.resources.device == "CPU":
        raise UserError(
            "spec.resources.device",
            "must be GPU, because the plan is about GPUs; to plan this job as if it had some, give their type, for"
            " example --gpu L4",
        )
    if not spec.resources.gpu_product:
        raise UserError(PRODUCT, "must name a GPU, or --gpu must")
    return find_gpu(spec.resources.gpu_product, types, field=PRODUCT)


def plan_of(
    spec: FineTuneJobSpec,
    configuration: Mapping[str, Any],
    gpu: GpuType,
    *,
    rows: int | None = None,
    price: float | None = None,
) -> JobPlan:
    """Return the plan of the job ``spec`` on GPUs of the type ``gpu``. The arguments are those of `wishes_of`."""
    wishes = wishes_of(spec, configuration, rows=rows)
    plan = plan_job(wishes, gpu, price=price)
    if _is_planned_by_check(spec, gpu):
        return plan
    return replace(plan, problems_as_written=plan_job(_as_written(wishes), gpu).problems)


def _is_planned_by_check(spec: FineTuneJobSpec, gpu: GpuType) -> bool:
    """Return whether the preflight check of the job ``spec`` makes its plan, for GPUs of the type ``gpu``. The table of
    the check is that of the trainer image, without types of a user."""
    product = spec.resources.gpu_product
    if spec.run_policy.preflight == "Skip" or spec.resources.device != "GPU" or not product:
        return False
    try:
        return find_gpu(product) == gpu
    except UserError:
        return False


def _as_written(wishes: Wishes) -> Wishes:
    """Return ``wishes`` with nothing of the training open, as the operator runs a job without the plan of a preflight
    check: with the values that `resolve` takes."""
    return replace(wishes, open_stage=False, open_micro_batch=False, open_recompute=False, open_offload=False)


def changes_of(
    document: Mapping[str, Any], configuration: Mapping[str, Any], plan: JobPlan, *, rows: int | None = None
) -> list[Suggestion]:
    """Return changes after which the job ``document`` fits, as `suggestions` finds them, and of which each one makes a
    valid job that fits when its lines are written into ``document``. The plan of a change is that of this job, which
    chooses anew what the job leaves open. ``plan`` is the plan of ``document``, and the other arguments are those of
    `wishes_of`."""

    def again(made: Suggestion) -> JobPlan | None:
        changed = with_lines(document, made.lines)
        if validate_job(changed).problems:
            return None
        return plan_of(FineTuneJobSpec.model_validate(changed["spec"]), configuration, plan.gpu, rows=rows)

    def complete(made: Suggestion) -> Suggestion | None:
        """Return ``made`` with what its plan chooses of the training, where the job does not fit without that."""
        if not made.plan.problems_as_written:
            return made
        changed = {line.partition(":")[0] for line in made.lines}
        chosen = [
            f"{choice.field}: {choice.value}"
            for choice in made.plan.choices
            if choice.field not in changed and not choice.field.startswith("spec.resources.")
        ]
        whole = replace(made, lines=(*made.lines, *chosen))
        planned = again(whole)
        return replace(whole, plan=planned) if planned is not None and planned.fits else None

    spec = FineTuneJobSpec.model_validate(document["spec"])
    found = suggestions(wishes_of(spec, configuration, rows=rows), plan, rank=DEFAULT_RANK, again=again)
    return [made for made in map(complete, found) if made is not None]


def with_lines(document: Mapping[str, Any], lines: Sequence[str]) -> dict[str, Any]:
    """Return the job ``document`` with ``lines``, each with the path of a field and its value in YAML, for example
    `spec.training.microBatchSize: 2`."""
    changed = deepcopy(dict(document))
    for line in lines:
        path, _, value = line.partition(": ")
        *sections, field = path.split(".")
        node = changed
        for section in sections:
            node[section] = node.get(section) or {}
            node = node[section]
        node[field] = yaml.safe_load(value)
    return changed


def wishes_of(spec: FineTuneJobSpec, configuration: Mapping[str, Any], *, rows: int | None = None) -> Wishes:
    """Return what ``spec`` says and leaves open, with a base model of ``configuration`` (the content of `config.json`).
    ``rows`` is the number of training examples, where it is known.

    A field counts as open where the job does not set it. Raises UserError for a model of an unknown family, for entries
    of `lora.targetModules` that the model does not have, and for settings of `lora` that the trainer refuses for models
    with experts.
    """
    sizes = model_sizes(configuration)
    training, deepspeed, resources = spec.training, spec.deepspeed, spec.resources
    processes = resources.processes
    offloads = deepspeed.offload_optimizer == "CPU"
    stage = zero_stage(
        deepspeed.zero_stage,
        processes=processes,
        lora=spec.method is Method.LORA,
        configured=offloads or deepspeed.overrides is not None,
    )
    left_open = open_choices(spec)
    length = min(spec.dataset.max_length, sizes.context or spec.dataset.max_length)
    micro_batch = micro_batch_size(
        training.micro_batch_size,
        accumulation_steps=training.gradient_accumulation_steps,
        global_batch_size=training.global_batch_size,
        processes=processes,
    )
    added = len(spec.model.added_tokens)
    generation = spec.evaluation.generation or GenerationSpec()
    setup = TrainingSetup(
        sizes=sizes,
        adapters=_adapters(spec.lora, sizes, added) if spec.method is Method.LORA else None,
        number_format=NumberFormat(training.precision),
        processes=processes,
        processes_per_node=resources.processes_per_node,
        zero_stage=stage,
        offload_optimizer=offloads,
        offload_parameters=deepspeed.offload_parameters == "CPU",
        recompute=training.gradient_checkpointing or False,
        micro_batch=micro_batch,
        length=length,
        packed=spec.dataset.packing,
        global_batch=training.global_batch_size,
        added_rows=added,
        answers=generation.batch_size if generates(spec.dataset) else 0,
        answer_length=generation.max_new_tokens,
        left_out=tuple(
            _left_out(
                attention=training.attention,
                packing=spec.dataset.packing,
                overrides=deepspeed.overrides is not None,
                lora=spec.lora,
            )
        ),
    )
    known = training.max_steps is not None or rows is not None
    scratch = resources.scratch
    return Wishes(
        setup=setup,
        open_stage=OpenChoice.ZERO_STAGE in left_open,
        open_micro_batch=OpenChoice.MICRO_BATCH_SIZE in left_open,
        open_recompute=OpenChoice.GRADIENT_CHECKPOINTING in left_open,
        open_offload=OpenChoice.OFFLOAD_OPTIMIZER in left_open,
        memory=to_bytes(resources.memory) if resources.memory is not None else None,
        cpus=_cpus(resources.cpu) if resources.cpu is not None else None,
        scratch=to_bytes(scratch.size) if scratch is not None else None,
        shared_memory=to_bytes(resources.shared_memory),
        steps=total_steps(
            rows=rows or 0,
            global_batch_size=training.global_batch_size,
            epochs=training.epochs,
            max_steps=training.max_steps,
        )
        if known
        else None,
        models_written=_models_written(spec.method, spec.storage.artifact),
        model_is_elsewhere=spec.model.volume is not None,
        sets_accumulation=training.gradient_accumulation_steps is not None,
        needs_deepspeed=deepspeed.overrides is not None,
    )


def wishes_of_run(config: RunConfig, configuration: Mapping[str, Any], *, length: int | None = None) -> Wishes:
    """Return what the run file ``config`` says, with a base model of ``configuration`` (the content of `config.json`).
    Open is what `open_choices` names, the CPUs and the scratch folder of the pods, and their memory where the run file
    does not name it. ``length`` is the length of the rows in tokens; None: the largest that the job allows.

    Raises UserError as `wishes_of` does, and where the rank of the adapters is that of another job.
    """
    sizes = model_sizes(configuration)
    optimization, world, lora = config.optimization, config.world, config.lora
    if config.method is Method.LORA and (lora is None or lora.rank is None):
        raise UserError("lora.rank", "must be set, or the adapter must be new")
    added = len(config.model.added_tokens)
    limit = min(config.dataset.max_length, sizes.context or config.dataset.max_length)
    setup = TrainingSetup(
        sizes=sizes,
        adapters=_adapters(lora, sizes, added) if config.method is Method.LORA else None,
        number_format=NumberFormat(optimization.precision),
        processes=world.size,
        processes_per_node=world.processes_per_node,
        zero_stage=optimization.zero_stage,
        offload_optimizer=optimization.offload_optimizer,
        offload_parameters=optimization.offload_parameters,
        recompute=optimization.gradient_checkpointing,
        micro_batch=min(optimization.micro_batch_size, process_share(optimization.global_batch_size, world.size)),
        length=limit if length is None else min(length, limit),
        packed=config.dataset.packing,
        global_batch=optimization.global_batch_size,
        added_rows=added,
        answers=config.evaluation.generation.batch_size if generates(config.dataset) else 0,
        answer_length=config.evaluation.generation.max_new_tokens,
        left_out=tuple(
            _left_out(
                attention=optimization.attention,
                packing=config.dataset.packing,
                overrides=optimization.overrides is not None,
                lora=lora,
            )
        ),
    )
    left_open = config.open_choices or ()
    return Wishes(
        setup=setup,
        open_stage=OpenChoice.ZERO_STAGE in left_open,
        open_micro_batch=OpenChoice.MICRO_BATCH_SIZE in left_open,
        open_recompute=OpenChoice.GRADIENT_CHECKPOINTING in left_open,
        open_offload=OpenChoice.OFFLOAD_OPTIMIZER in left_open,
        memory=world.memory_bytes,
        shared_memory=world.shared_memory_bytes or 0,
        models_written=_models_written(config.method, config.storage.artifact),
        model_is_elsewhere=config.model.volume is not None,
        # A run file does not say whether the job sets the number of micro-batches. Changes that keep this number
        # consistent are right in both cases.
        sets_accumulation=True,
        needs_deepspeed=optimization.overrides is not None,
    )


def generates(dataset: DatasetSpec) -> bool:
    """Return whether a job with ``dataset`` generates answers to score the model."""
    return dataset.task is not None and (dataset.validation is not None or dataset.test is not None)


def _left_out(*, attention: str, packing: bool, overrides: bool, lora: LoRASpec | None) -> Iterator[str]:
    if attention in ("Eager", "Flex"):
        yield f"spec.training.attention: the memory of {attention} is left out; that of Flash is planned."
    if packing:
        yield "spec.dataset.packing: packed sequences were never measured; they are planned as single long examples."
    if overrides:
        yield "spec.deepspeed.overrides: what they change is left out."
    if lora is not None and lora.do_ra:
        yield "spec.lora.doRA: the memory of its norms is left out."


def _adapters(lora: LoRASpec | None, sizes: ModelSizes, added_rows: int) -> AdapterSetup:
    adapters = adapter_setup(
        sizes,
        rank=(lora.rank if lora is not None else None) or DEFAULT_RANK,
        targets=lora.target_modules if lora is not None else (),
        dropout=lora is not None and float(lora.dropout) > 0,
        added_rows=added_rows,
        quantized=lora is not None and lora.quantization is not None,
    )
    if lora is not None:
        _refuse_for_experts(lora, sizes, adapters)
    return adapters


def _refuse_for_experts(lora: LoRASpec, sizes: ModelSizes, adapters: AdapterSetup) -> None:
    """Raise UserError for settings that the trainer refuses for models with experts."""
    if lora.quantization is not None and any(
        linear.part is Part.EXPERTS for layer in sizes.layers for linear in layer.linears
    ):
        raise UserError(
            "spec.lora.quantization",
            "must be absent for a model with experts, because bitsandbytes quantizes linear layers only",
        )
    if lora.only_for_modules is not None and any(adapters.expert_weights):
        name, must = lora.only_for_modules
        raise UserError(
            f"spec.lora.{name}",
            f"must be {must} where experts get an adapter, because peft has nothing else for experts; or"
            " lora.targetModules must name modules without experts",
        )


def _models_written(method: Method, artifact: Export | None) -> int:
    """Return how many models of the base model's size a job with ``artifact`` writes."""
    if method is Method.FULL:
        return 1
    return 0 if (artifact or "Adapter") == "Adapter" else 1


def _cpus(quantity: int | str) -> float:
    text = str(quantity)
    return float(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)
