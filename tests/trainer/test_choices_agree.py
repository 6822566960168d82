"""`finetune plan`, the preflight check, `status.plan` and the attempts have the same settings for open fields."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_core.api.job import FineTuneJob
from finetune_core.api.status import TrainingChoices
from finetune_core.contract import OptimizationConfig
from finetune_core.contract.preflight_result import PlannedNeeds
from finetune_core.errors import UserError
from finetune_core.planned_job import plan_of
from finetune_core.planning.gpu_types import find_gpu
from finetune_core.planning.training_setup import TrainingSetup
from finetune_core.resolve import resolve
from finetune_operator.status.inputs import choices_of
from finetune_operator.status.inputs import plan_of as status_plan_of
from finetune_trainer.preflight.memory_check import MemoryCheck, check_memory
from tests.planning.memory_cases import MODELS
from tests.trainer.test_memory_check import job as closed_job

PRODUCTS = ("NVIDIA-H200", "NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-SXM4-40GB", "NVIDIA-L4")
A100_40GB = "NVIDIA-A100-SXM4-40GB"
OPEN = {
    "deepspeed.zeroStage": "zeroStage",
    "deepspeed.offloadOptimizer": "offloadOptimizer",
    "training.gradientCheckpointing": "gradientCheckpointing",
    "training.microBatchSize": "microBatchSize",
}


def job(*, left_open: frozenset[str], **fields: Any) -> FineTuneJob:
    """Return the job of `closed_job` without the fields ``left_open``, which are keys of OPEN."""
    document = closed_job(**fields)
    for path in left_open:
        section, field = path.split(".")
        document["spec"][section].pop(field, None)
    return FineTuneJob.model_validate(document)


Settings = tuple[int | None, bool, bool, int]


def of_setup(setup: TrainingSetup) -> Settings:
    return setup.zero_stage, setup.offload_optimizer, setup.recompute, setup.micro_batch


def of_run(config: OptimizationConfig) -> Settings:
    return config.zero_stage, config.offload_optimizer, config.gradient_checkpointing, config.micro_batch_size


def of_choices(choices: TrainingChoices) -> Settings:
    return (
        choices.zero_stage,
        choices.offload_optimizer,
        choices.gradient_checkpointing,
        choices.micro_batch_size,
    )


def checked(found: FineTuneJob, model: str) -> PlannedNeeds:
    """Return what the check of the job ``found`` plans. Raises UserError where the check refuses the job."""
    told = check_memory(resolve(found, report=None), MODELS[model], longest_row=None)
    assert isinstance(told, MemoryCheck)
    assert told.planned is not None
    return told.planned


@settings(max_examples=40)
@given(
    model=st.sampled_from(["Llama-3.2-1B", "Llama-2-7B", "Llama-2-13B", "Llama-2-70B"]),
    method=st.sampled_from(["Full", "LoRA"]),
    product=st.sampled_from(PRODUCTS),
    gpus=st.sampled_from([1, 2, 8]),
    length=st.sampled_from([512, 4096]),
    batch=st.sampled_from([8, 64, 72]),
    left_open=st.frozensets(st.sampled_from(sorted(OPEN))),
)
def test_plan_check_status_and_attempts_agree(
    model: str, method: str, product: str, gpus: int, length: int, batch: int, left_open: frozenset[str]
) -> None:
    found = job(
        left_open=left_open,
        method=method,
        resources__gpuProduct=product,
        resources__gpusPerNode=gpus,
        dataset__maxLength=length,
        training__globalBatchSize=batch,
    )
    plan = plan_of(found.spec, MODELS[model], find_gpu(product))
    try:
        planned = checked(found, model)
    except UserError:
        assert not plan.fits
        return
    choices = choices_of(None, planned)
    assert choices is not None
    assert of_choices(choices) == of_setup(plan.setup)
    assert planned.gpu_memory_bytes == plan.memory.needed
    attempt = resolve(found, report=None, choices=choices)
    assert attempt.open_choices is None
    assert of_run(attempt.optimization) == of_setup(plan.setup)
    status = status_plan_of(attempt, planned, fixes=True)
    assert status.choices == choices
    # A later attempt, and an operator of another version, take what stands in the status.
    halved = resolve(found, report=None, choices=status.choices, halvings=1).optimization
    assert of_run(halved) == (*of_setup(plan.setup)[:3], max(1, plan.setup.micro_batch // 2))
    # What fits with the defaults gets the defaults.
    default = resolve(found, report=None).optimization
    if of_run(default) != of_setup(plan.setup):
        skipped = found.spec.model_copy(
            update={"run_policy": found.spec.run_policy.model_copy(update={"preflight": "Skip"})}
        )
        assert plan_of(skipped, MODELS[model], find_gpu(product)).problems_as_written


@pytest.mark.parametrize(
    ("model", "fields"),
    [("Llama-2-70B", {"method": "LoRA"}), ("Llama-2-13B", {"method": "Full"})],
)
def test_what_fits_only_with_the_choices_of_the_plan_runs_with_them(model: str, fields: dict[str, Any]) -> None:
    """On 8 A100-40GB the defaults of both jobs do not fit, and ZeRO stage 3 makes them fit."""
    large = {"resources__gpuProduct": A100_40GB, "resources__gpusPerNode": 8, "training__globalBatchSize": 64}
    found = job(left_open=frozenset(OPEN), **large, **fields)
    planned = checked(found, model)
    gpu = find_gpu(A100_40GB)
    assert planned.gpu_memory_bytes <= gpu.memory
    attempt = resolve(found, report=None, choices=choices_of(None, planned)).optimization
    assert attempt.zero_stage == 3
    assert of_run(attempt) != of_run(resolve(found, report=None).optimization)


@pytest.mark.parametrize(
    "told",
    [
        {"zero_stage": None},
        {"zero_stage": 0},
        {"micro_batch_size": 65},
        {"zero_stage": None, "offload_optimizer": True},
    ],
)
def test_choices_that_make_no_job_are_ignored(told: dict[str, Any]) -> None:
    """An image of a user may tell anything. The job has 8 processes and 64 examples in a step."""
    found = job(left_open=frozenset(OPEN), resources__gpusPerNode=8, training__globalBatchSize=64)
    fitting = {"zero_stage": 2, "offload_optimizer": False, "gradient_checkpointing": True, "micro_batch_size": 4}
    default = resolve(found, report=None).optimization
    changed = resolve(found, report=None, choices=TrainingChoices.model_validate(fitting)).optimization
    assert of_run(changed) == (2, False, True, 4)
    ignored = resolve(found, report=None, choices=TrainingChoices.model_validate(fitting | told)).optimization
    assert ignored == default


def test_choices_never_replace_what_the_job_sets() -> None:
    found = job(left_open=frozenset(), resources__gpusPerNode=8, training__globalBatchSize=64)
    told = TrainingChoices(zero_stage=3, offload_optimizer=True, gradient_checkpointing=True, micro_batch_size=4)
    with_them = resolve(found, report=None, choices=told)
    assert with_them == resolve(found, report=None)
    assert with_them.open_choices is None
