"""Turns a job into the run file of an attempt.

The operator calls `resolve` before the preflight check and before each attempt. Most defaults are fixed values in the
models of `api/`. This module chooses the defaults that depend on other fields, such as the learning rate, which depends
on the method. The trainer itself computes the values that depend on the model or the data, such as the number of steps
in one epoch.
"""

from __future__ import annotations

from datetime import date

from finetune_core.api.dataset import DatasetSpec
from finetune_core.api.evaluation import GenerationSpec
from finetune_core.api.job import FineTuneJob
from finetune_core.api.method import DEFAULT_ALPHA, DEFAULT_RANK, LoRASpec, Method
from finetune_core.api.sources import ModelSpec
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.api.status import AdapterStatus, PreflightStatus, TrainingChoices
from finetune_core.contract import (
    AdapterArtifact,
    EvaluationConfig,
    GenerationConfig,
    OptimizationConfig,
    ReportConfig,
    RunConfig,
    StabilityConfig,
    StorageConfig,
    WorldConfig,
)
from finetune_core.errors import UserError
from finetune_core.layout import run_root_of
from finetune_core.planning.micro_batch import micro_batch_of
from finetune_core.planning.training_plan import micro_batch_size, process_share, zero_stage
from finetune_core.training_choices import open_choices, with_choices
from finetune_core.validation.runnable import to_bytes, unrunnable

DEFAULT_LEARNING_RATE = {Method.LORA: 1e-4, Method.FULL: 5e-6}
"""For each method, the peak learning rate where the job sets none. The rates are those of Anyscale's study of LoRA
(September 2023), which the jobs in examples/study/llama2 repeat."""
DEFAULT_CHECKPOINT_STEPS = 100
"""Optimizer steps between two checkpoints where the job sets neither `everySteps` nor `everyMinutes`."""


def resolve(
    job: FineTuneJob,
    *,
    report: ReportConfig | None,
    preflight: PreflightStatus | None = None,
    adapter: AdapterStatus | None = None,
    today: date | None = None,
    halvings: int = 0,
    choices: TrainingChoices | None = None,
) -> RunConfig:
    """Return the run file of ``job``. Raises UserError with the field's path where the job can't be run.

    ``preflight`` is the record of the job's preflight check. Where that record names the run of a former job, the job
    uses the former job's folder in the bucket. Where the check found runs that the job continues, the record also names
    the date that chat templates got in them, and the job uses that date. Otherwise chat templates get the date
    ``today``, the day (UTC) on which attempt 1 started, or the current day where attempt 1 has not started. ``adapter``
    is the record of the artifact of the job that `model.adapter.job` names. ``halvings`` is how many attempts of the
    job ran out of memory and were followed by another one: so often the micro-batch is halved.
    ``choices`` are the settings that the plan chose for what the job leaves open. None where they are not fixed yet:
    the run file then has the defaults, and says what is open.
    """
    left_open = sorted(open_choices(job.spec)) if choices is None else []
    spec = with_choices(job.spec, choices)
    problems = unrunnable(spec)
    if problems:
        first, others = problems[0], "".join(f"; {problem}" for problem in problems[1:])
        raise UserError(first.subject, first.problem + others)
    resources = spec.resources
    on_gpus = resources.device == "GPU"
    world = WorldConfig(
        nodes=resources.nodes,
        processes_per_node=resources.processes_per_node,
        device=resources.device,
        gpu_product=(resources.gpu_product or None) if on_gpus else None,
        memory_bytes=to_bytes(resources.memory) if on_gpus and resources.memory is not None else None,
        shared_memory_bytes=to_bytes(resources.shared_memory) if on_gpus else None,
    )
    training = spec.training
    rate = float(training.learning_rate) if training.learning_rate else DEFAULT_LEARNING_RATE[spec.method]
    deepspeed = spec.deepspeed
    stage = zero_stage(
        deepspeed.zero_stage,
        processes=world.size,
        lora=spec.method is Method.LORA,
        configured=deepspeed.offload_optimizer == "CPU" or deepspeed.overrides is not None,
    )
    return RunConfig(
        world=world,
        model=spec.model,
        dataset=spec.dataset,
        method=spec.method,
        lora=_lora(spec.lora, spec.model) if spec.method is Method.LORA else None,
        optimization=OptimizationConfig(
            learning_rate=rate,
            epochs=training.epochs,
            max_steps=training.max_steps,
            global_batch_size=training.global_batch_size,
            micro_batch_size=planned_micro_batch(spec, halvings=halvings),
            schedule=training.schedule,
            warmup_steps=training.warmup_steps,
            weight_decay=float(training.weight_decay),
            gradient_clipping=float(training.gradient_clipping),
            precision=training.precision,
            gradient_checkpointing=training.gradient_checkpointing or False,
            attention=training.attention,
            seed=training.seed,
            zero_stage=stage,
            offload_optimizer=deepspeed.offload_optimizer == "CPU",
            offload_parameters=deepspeed.offload_parameters == "CPU",
            overrides=deepspeed.overrides,
        ),
        evaluation=EvaluationConfig(
            every_steps=spec.evaluation.every_steps,
            generation=_generation(spec.evaluation.generation),
            base_prompt=spec.evaluation.base_prompt,
            best_by=spec.evaluation.best_by,
            patience=spec.evaluation.patience,
            min_delta=float(spec.evaluation.min_delta or 0),
            artifact_from=spec.evaluation.artifact_from or ("Best" if spec.dataset.validation else "Last"),
            require=spec.evaluation.require or None,
        ),
        stability=StabilityConfig(
            on_non_finite=spec.stability.on_non_finite,
            on_exploding_loss=spec.stability.on_exploding_loss,
            stall_timeout_seconds=spec.stability.stall_timeout_seconds,
        ),
        storage=StorageConfig(
            uri=run_root_of(job, preflight),
            endpoint=spec.storage.endpoint_url,
            region=spec.storage.region,
            credentials="Secret" if spec.storage.credentials_secret_ref else "Identity",
            addressing=spec.storage.addressing,
            encryption=spec.storage.encryption,
            checkpoint_every_steps=spec.storage.checkpoint.every_steps
            or (None if spec.storage.checkpoint.every_minutes else DEFAULT_CHECKPOINT_STEPS),
            checkpoint_every_minutes=spec.storage.checkpoint.every_minutes,
            keep_last=spec.storage.checkpoint.keep_last,
            keep_best=spec.storage.checkpoint.keep_best,
            artifact=spec.storage.artifact or "Adapter",
        ),
        report=report,
        adapter_artifact=_adapter_artifact(spec.model, adapter),
        template_date=_template_date(spec.dataset, preflight, today),
        open_choices=tuple(left_open) or None,
    )


def planned_size(spec: FineTuneJobSpec) -> int:
    """Return how many examples one process computes at once, as the job sets it or leaves it to the plan."""
    training = spec.training
    return micro_batch_size(
        training.micro_batch_size,
        accumulation_steps=training.gradient_accumulation_steps,
        global_batch_size=training.global_batch_size,
        processes=spec.resources.processes,
    )


def planned_micro_batch(spec: FineTuneJobSpec, *, halvings: int) -> int:
    """Return how many examples one process computes at once in an attempt before which ``halvings`` attempts of the job
    ran out of memory."""
    if not halvings:
        return planned_size(spec)
    share = process_share(spec.training.global_batch_size, spec.resources.processes)
    return micro_batch_of(planned_size(spec), halvings=halvings, share=share).size


def _lora(lora: LoRASpec | None, model: ModelSpec) -> LoRASpec:
    """Return the adapters' settings, with defaults for rank and alpha. `rs_lora` and `do_ra` become None where they are
    false, so that a job that sets them to false and a job that does not set them have the same `settings_digest`.

    Where the job continues an adapter, return ``lora`` without these changes, because the trainer takes the absent
    settings from that adapter.
    """
    lora = lora or LoRASpec()
    if model.adapter is not None and model.adapter.use == "Continue":
        return lora
    return lora.model_copy(
        update={
            "rank": lora.rank or DEFAULT_RANK,
            "alpha": lora.alpha or DEFAULT_ALPHA,
            "rs_lora": lora.rs_lora or None,
            "do_ra": lora.do_ra or None,
        }
    )


def _adapter_artifact(model: ModelSpec, found: AdapterStatus | None) -> AdapterArtifact | None:
    if model.adapter is None or model.adapter.job is None or found is None:
        return None
    return AdapterArtifact(uri=found.source, manifest_sha256=found.manifest_sha256, job_uid=found.job_uid)


def _template_date(dataset: DatasetSpec, preflight: PreflightStatus | None, today: date | None) -> date | None:
    if dataset.format.messages is None:
        return None
    try:
        return date.fromisoformat(preflight.template_date) if preflight is not None else today
    except ValueError:  # no run to continue, or a record of another version
        return today


def _generation(limits: GenerationSpec | None) -> GenerationConfig:
    limits = limits or GenerationSpec()
    return GenerationConfig(
        max_new_tokens=limits.max_new_tokens, max_examples=limits.max_examples, batch_size=limits.batch_size
    )
