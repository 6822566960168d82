"""A plan holds what it says: the lines that it chooses or suggests make valid jobs, and those jobs fit. More GPUs, less
text or smaller micro-batches never take more memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.planned_job import changes_of, plan_of, with_lines
from finetune_core.planning.gpu_types import GPU_TYPES, GpuType, find_gpu
from finetune_core.planning.job_plan import JobPlan
from finetune_core.planning.memory import memory_plan
from finetune_core.planning.model_families import model_sizes
from finetune_core.planning.training_setup import NumberFormat, TrainingSetup, adapter_setup
from finetune_core.validation.validate_job import validate_job
from tests.core.jobs import EXAMPLES, set_at
from tests.planning.memory_cases import MODELS

Document = dict[str, Any]
OPEN = (
    "training.microBatchSize",
    "training.gradientCheckpointing",
    "deepspeed",
    "resources.memory",
    "resources.cpu",
    "resources.sharedMemory",
)
"""Fields of the example that the drawn jobs set anew or leave open."""


def job(**fields: Any) -> Document:
    """Return a Full training on one node of 8 A100-80GB that leaves open what it can, with ``fields`` set, which are
    paths below `spec` with `__` for the dots. The value None removes a field."""
    document: Document = yaml.safe_load((EXAMPLES / "study/llama2/7b-full-gsm8k.yaml").read_text(encoding="utf-8"))
    for path in OPEN:
        set_at(document["spec"], path.split("."), None)
    for path, value in fields.items():
        set_at(document["spec"], path.split("__"), value)
    return document


def plan(document: Document, model: str, gpu: GpuType) -> JobPlan:
    """Return the plan of ``document``, which must be valid."""
    assert validate_job(document).problems == []
    return plan_of(FineTuneJobSpec.model_validate(document["spec"]), MODELS[model], gpu, rows=1000)


def chosen_lines(found: JobPlan) -> list[str]:
    """Return the lines that ``found`` chooses."""
    return [f"{choice.field}: {choice.value}" for choice in found.choices]


@st.composite
def jobs(draw: st.DrawFn) -> Document:
    """Draw a valid job."""
    fields: dict[str, Any] = {
        "resources__nodes": draw(st.sampled_from([1, 1, 1, 2, 3, 64])),
        "resources__gpusPerNode": draw(st.sampled_from([1, 1, 2, 6, 8, 16])),
        "dataset__maxLength": draw(st.sampled_from([64, 512, 4096, 131_072])),
        "dataset__packing": draw(st.booleans()),
        "training__precision": draw(st.sampled_from(["bf16", "bf16", "fp32"])),
        "training__gradientCheckpointing": draw(st.sampled_from([None, True, False])),
        "training__attention": draw(st.sampled_from([None, None, "Flash", "SDPA"])),
        "deepspeed__zeroStage": draw(st.sampled_from([None, "Auto", "None", 0, 1, 2, 3])),
        "deepspeed__offloadOptimizer": draw(st.sampled_from([None, None, "CPU", "None"])),
        "deepspeed__offloadParameters": draw(st.sampled_from([None, None, None, "CPU"])),
        "resources__memory": draw(st.sampled_from([None, None, "80Gi", "512Gi", "4Ti"])),
        "resources__scratch": draw(st.sampled_from([None, None, {"size": "50Gi"}])),
    }
    processes = fields["resources__nodes"] * fields["resources__gpusPerNode"]
    micro_batch, accumulation = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from([1, 4]))
    fields["training__globalBatchSize"] = micro_batch * accumulation * processes
    if draw(st.booleans()):
        fields["training__microBatchSize"] = micro_batch
    if draw(st.booleans()):
        fields["training__gradientAccumulationSteps"] = accumulation
    if draw(st.booleans()):
        fields["method"] = "LoRA"
        fields["lora"] = draw(
            st.sampled_from(
                [None, {"rank": 64}, {"dropout": "0.05"}, {"quantization": "NF4"}, {"targetModules": ["q_proj"]}]
            )
        )
        fields["storage__artifact"] = draw(st.sampled_from([None, "Adapter", "Merged"]))
    document = job(**fields)
    assume(not validate_job(document).problems)
    return document


def with_experts(document: Document, model: str) -> bool:
    """Return whether the trainer refuses the settings of `lora` in ``document`` for the experts of ``model``."""
    lora = document["spec"].get("lora") or {}
    return "num_experts_per_tok" in MODELS[model] and ("dropout" in lora or "quantization" in lora)


# Of the first job, each change leaves something open that the plan of the changed job chooses anew. For the second one,
# stage 2 is enough, and more GPUs bring stage 2 too.
@settings(max_examples=20)
@example(document=job(resources__gpusPerNode=1), model="Llama-2-7B", gpu=find_gpu("L4"))
@example(
    document=job(training__microBatchSize=1, deepspeed__zeroStage=1),
    model="Llama-2-7B",
    gpu=find_gpu("L4"),
)
@given(document=jobs(), model=st.sampled_from(sorted(MODELS)), gpu=st.sampled_from(GPU_TYPES))
def test_the_lines_of_a_plan_make_valid_jobs_that_fit(document: Document, model: str, gpu: GpuType) -> None:
    assume(not with_experts(document, model))
    found = plan(document, model, gpu)
    as_chosen = with_lines(document, chosen_lines(found))
    again = plan(as_chosen, model, gpu)
    assert again.choices == ()
    assert (again.memory, again.host.memory) == (found.memory, found.host.memory)
    assert again.problems_as_written == again.problems
    if found.fits:
        assert again.fits
        return
    changes = changes_of(document, MODELS[model], found, rows=1000)
    for change in changes:
        assert len({line.partition(":")[0] for line in change.lines}) == len(change.lines)
        assert change.plan.fits
        assert change.plan.problems_as_written == ()
        assert plan(with_lines(document, change.lines), model, gpu) == change.plan, change.lines
        assert plan(with_lines(as_chosen, change.lines), model, gpu).fits, change.lines
        assert [other.lines for other in changes if set(other.lines) <= set(change.lines)] == [change.lines]


@st.composite
def setups(draw: st.DrawFn) -> TrainingSetup:
    """Draw a training with every choice made."""
    sizes = model_sizes({**MODELS[draw(st.sampled_from(sorted(MODELS)))], "num_hidden_layers": 4})
    adapters = None
    if draw(st.booleans()):
        adapters = adapter_setup(sizes, rank=8, dropout=draw(st.booleans()) and not sizes.active_experts)
    processes = draw(st.sampled_from([1, 2, 8, 24, 512]))
    return TrainingSetup(
        sizes=sizes,
        adapters=adapters,
        number_format=draw(st.sampled_from(NumberFormat)),
        processes=processes,
        processes_per_node=1,
        zero_stage=draw(st.sampled_from([0, 1, 2, 3] if processes > 1 else [None, None, 0, 1, 2, 3])),
        offload_optimizer=draw(st.booleans()),
        offload_parameters=draw(st.booleans()),
        recompute=draw(st.booleans()),
        micro_batch=draw(st.integers(1, 16)),
        length=draw(st.sampled_from([8, 100, 512, 4095, 131_071])),
        packed=draw(st.booleans()),
        global_batch=draw(st.sampled_from([1, 64, 4096])),
    )


@settings(max_examples=200)
@given(setup=setups(), times=st.integers(2, 8))
def test_more_of_everything_never_takes_less_memory(setup: TrainingSetup, times: int) -> None:
    before = memory_plan(setup)
    assert sum(before.parts.values()) == before.peak
    assert min(before.parts.values()) >= 0
    for changed in (
        replace(setup, length=setup.length + times),
        replace(setup, micro_batch=setup.micro_batch + times, global_batch=setup.global_batch * 100),
        replace(setup, micro_batch=setup.micro_batch * times, global_batch=setup.global_batch * times),
    ):
        assert memory_plan(changed).needed >= before.needed


@settings(max_examples=200)
@given(setup=setups(), times=st.integers(2, 8))
def test_more_gpus_never_take_more_memory_of_each(setup: TrainingSetup, times: int) -> None:
    """At stages 0 to 2 too: with more GPUs the shards and the share of the global batch only become smaller. A process
    alone has no buffers for communication, so the first of two plans has two processes at least."""
    assume(setup.zero_stage is not None)
    setup = replace(setup, processes=max(2, setup.processes))
    before = memory_plan(setup)
    more = replace(setup, processes=setup.processes * times)
    assert memory_plan(more).needed <= before.needed
    sharded = replace(setup, zero_stage=3)
    assert memory_plan(replace(sharded, processes=setup.processes * times)).needed <= memory_plan(sharded).needed
