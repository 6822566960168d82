"""A job gets a plan that fits, and where none does, changes that make it fit."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_core.api.job import FineTuneJob
from finetune_core.api.method import DEFAULT_RANK
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.errors import UserError
from finetune_core.planned_job import gpu_of, plan_of, wishes_of
from finetune_core.planning.advice import suggestions
from finetune_core.planning.gpu_types import GIBIBYTE, GPU_TYPES, find_gpu, with_types
from finetune_core.planning.job_plan import LARGEST_HOST, JobPlan, plan_job
from finetune_core.planning.memory import Phase, memory_plan
from tests.core.jobs import EXAMPLES, set_at
from tests.planning.memory_cases import MODELS

A100, H200 = find_gpu("A100-80GB"), find_gpu("H200-141GB")


def job(**fields: Any) -> FineTuneJobSpec:
    """Return the spec of a Full training on one node of 8 A100-80GB that leaves open what it can, with ``fields`` set,
    which are paths below `spec` with `__` for the dots. The value None removes a field."""
    document = yaml.safe_load((EXAMPLES / "study/llama2/7b-full-gsm8k.yaml").read_text(encoding="utf-8"))
    spec = document["spec"]
    for path in (
        "training.microBatchSize",
        "training.gradientCheckpointing",
        "deepspeed",
        "resources.memory",
        "resources.cpu",
    ):
        set_at(spec, path.split("."), None)
    for path, value in fields.items():
        set_at(spec, path.split("__"), value)
    return FineTuneJob.model_validate(document).spec


def chosen(plan: JobPlan) -> dict[str, str]:
    """Return the values that ``plan`` chose, by the last part of their fields."""
    return {choice.field.rpartition(".")[2]: choice.value for choice in plan.choices}


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("study/llama2/*.yaml")), ids=lambda path: path.stem)
def test_every_example_of_the_study_fits(example: Any) -> None:
    spec = FineTuneJob.model_validate(yaml.safe_load(example.read_text(encoding="utf-8"))).spec
    plan = plan_of(spec, MODELS[f"Llama-2-{example.stem.partition('-')[0].upper()}"], gpu_of(spec))
    assert plan.problems == ()


def test_what_a_job_leaves_open_is_chosen_with_a_reason() -> None:
    plan = plan_of(job(), MODELS["Llama-2-7B"], A100)
    assert plan.fits
    values = chosen(plan)
    assert values["zeroStage"] in ("2", "3")
    assert values["offloadOptimizer"] == "None"
    assert int(values["microBatchSize"]) * 512 == plan.setup.tokens
    assert values.keys() == {
        "zeroStage",
        "gradientCheckpointing",
        "offloadOptimizer",
        "microBatchSize",
        "memory",
        "cpu",
        "size",
    }
    assert all(choice.reason.endswith(".") for choice in plan.choices)


def test_what_a_job_sets_is_never_chosen() -> None:
    spec = job(
        training__microBatchSize=4,
        training__gradientCheckpointing=True,
        deepspeed__zeroStage=3,
        deepspeed__offloadOptimizer="CPU",
        resources__memory="900Gi",
        resources__cpu=32,
        resources__scratch={"size": "500Gi"},
    )
    plan = plan_of(spec, MODELS["Llama-2-7B"], A100)
    assert plan.choices == ()
    setup = plan.setup
    assert (setup.micro_batch, setup.recompute, setup.zero_stage, setup.offload_optimizer) == (4, True, 3, True)


def test_weights_are_sharded_and_moved_only_where_they_must_be() -> None:
    """13B in bf16 with fp32 state takes 208 GB, which 8 A100 hold only where the state is sharded; 70B takes 1.1 TB, so
    its state must leave the GPUs, or more of them are needed."""
    assert chosen(plan_of(job(), MODELS["Llama-2-13B"], A100))["offloadOptimizer"] == "None"
    large = plan_of(job(resources__nodes=4), MODELS["Llama-2-70B"], A100)
    assert large.fits
    assert chosen(large)["zeroStage"] == "3"
    assert not large.setup.offload_optimizer


def test_one_process_is_planned_at_stage_2() -> None:
    plan = plan_of(job(resources__gpusPerNode=1), MODELS["Llama-3.2-1B"], A100)
    assert chosen(plan)["zeroStage"] == "2"


def test_one_process_with_lora_is_planned_without_deepspeed_as_the_operator_runs_it() -> None:
    for fields, stage in (
        ({}, "None"),
        ({"resources__gpusPerNode": 2}, "2"),
        ({"deepspeed__overrides": '{"steps_per_print": 10}'}, "2"),
    ):
        spec = job(method="LoRA", **{"resources__gpusPerNode": 1, **fields})
        plan = plan_of(spec, MODELS["Llama-3.2-1B"], A100)
        assert plan.fits
        assert chosen(plan)["zeroStage"] == stage


def test_a_full_training_is_planned_without_deepspeed_only_where_nothing_else_fits() -> None:
    """The state of 7B takes 100 GiB at 16 bytes a parameter, and 113 GiB at the 18 of stage 2."""
    small = with_types(
        [{"name": "S", "memoryGibibytes": 112, "teraFlops": 1, "memoryBandwidth": 1, "linkBandwidth": 1}], "table"
    )[0]
    spec = job(resources__gpusPerNode=1)
    assert chosen(plan_of(spec, MODELS["Llama-2-7B"], H200))["zeroStage"] == "2"
    plan = plan_of(spec, MODELS["Llama-2-7B"], small)
    assert plan.fits
    assert (chosen(plan)["zeroStage"], chosen(plan)["offloadOptimizer"]) == ("None", "None")
    reason = next(choice.reason for choice in plan.choices if choice.field.endswith("zeroStage"))
    assert reason.startswith("Only training without DeepSpeed fits")
    # What the job says itself stands, and the plan names the change that makes it fit.
    wishes = wishes_of(
        job(resources__gpusPerNode=1, deepspeed={"zeroStage": 2, "offloadOptimizer": "None"}), MODELS["Llama-2-7B"]
    )
    plan = plan_job(wishes, small)
    assert not plan.fits
    assert suggestions(wishes, plan, rank=DEFAULT_RANK)[0].lines == ("spec.deepspeed.zeroStage: None",)
    tied = job(
        resources__gpusPerNode=1,
        deepspeed={"zeroStage": 2, "offloadOptimizer": "None", "overrides": '{"steps_per_print": 10}'},
    )
    wishes = wishes_of(tied, MODELS["Llama-2-7B"])
    found = suggestions(wishes, plan_job(wishes, small), rank=DEFAULT_RANK)
    assert found
    assert not any("zeroStage: None" in line for suggestion in found for line in suggestion.lines)


def test_more_gpus_shard_the_weights_where_a_whole_copy_fits_none() -> None:
    """The weights of 70B alone take 129 GiB."""
    wishes = wishes_of(job(method="LoRA", resources__gpusPerNode=1), MODELS["Llama-2-70B"])
    found = suggestions(wishes, plan_job(wishes, A100), rank=DEFAULT_RANK)
    assert any("spec.deepspeed.zeroStage: 3" in suggestion.lines for suggestion in found)


@settings(max_examples=40)
@given(
    model=st.sampled_from(sorted(MODELS)),
    gpu=st.sampled_from(GPU_TYPES),
    gpus=st.sampled_from([1, 2, 8]),
    length=st.sampled_from([128, 512, 4096]),
    batch=st.sampled_from([8, 64]),
)
def test_a_suggestion_makes_the_job_fit(model: str, gpu: Any, gpus: int, length: int, batch: int) -> None:
    spec = job(resources__gpusPerNode=gpus, dataset__maxLength=length, training__globalBatchSize=batch)
    wishes = wishes_of(spec, MODELS[model])
    plan = plan_job(wishes, gpu)
    assert sum(plan.memory.parts.values()) == plan.memory.peak
    assert plan.fits == (gpu.bf16 and plan.memory.needed <= gpu.memory and plan.host.memory <= LARGEST_HOST)
    found = [] if plan.fits else suggestions(wishes, plan, rank=DEFAULT_RANK)
    for suggestion in found:
        assert suggestion.plan.fits
        assert suggestion.lines
        assert memory_plan(suggestion.plan.setup).needed <= gpu.memory
    assert len({suggestion.lines for suggestion in found}) == len(found)


def test_the_lines_of_a_suggestion_can_be_written_into_the_job() -> None:
    spec = job(training__microBatchSize=8, training__gradientCheckpointing=False, deepspeed__zeroStage=2)
    wishes = wishes_of(spec, MODELS["Llama-2-13B"])
    plan = plan_job(wishes, find_gpu("A100-40GB"))
    assert not plan.fits
    found = suggestions(wishes, plan, rank=DEFAULT_RANK)
    assert found
    for suggestion in found:
        fields: dict[str, Any] = {
            "training__microBatchSize": 8,
            "training__gradientCheckpointing": False,
            "deepspeed__zeroStage": 2,
        }
        for line in suggestion.lines:
            path, _, value = line.removeprefix("spec.").partition(": ")
            fields[path.replace(".", "__")] = yaml.safe_load(value)
        again = plan_of(job(**fields), MODELS["Llama-2-13B"], find_gpu("A100-40GB"))
        assert again.fits, suggestion.lines


def test_more_of_everything_never_takes_less_memory() -> None:
    def needed(**fields: Any) -> int:
        spec = job(training__microBatchSize=2, training__gradientCheckpointing=False, **fields)
        return plan_of(spec, MODELS["Llama-2-7B"], H200).memory.needed

    assert needed(dataset__maxLength=1024) > needed(dataset__maxLength=512)
    assert needed(training__precision="fp32") > needed()
    assert needed(deepspeed__zeroStage=1) >= needed(deepspeed__zeroStage=2) > needed(deepspeed__zeroStage=3)


def test_a_pod_with_too_little_memory_is_a_problem_that_names_the_field() -> None:
    plan = plan_of(job(resources__memory="64Gi"), MODELS["Llama-2-7B"], H200)
    assert [problem.partition(":")[0] for problem in plan.problems] == ["spec.resources.memory"]
    wishes = wishes_of(job(resources__memory="64Gi"), MODELS["Llama-2-7B"])
    lines = [line for suggestion in suggestions(wishes, plan, rank=DEFAULT_RANK) for line in suggestion.lines]
    assert any(line.startswith("spec.resources.memory: ") for line in lines)


def test_hours_and_cost_follow_from_rows_or_steps() -> None:
    by_rows = plan_of(job(), MODELS["Llama-2-7B"], H200, rows=6400, price=2.5)
    by_steps = plan_of(job(training__epochs=None, training__maxSteps=1000), MODELS["Llama-2-7B"], H200, price=2.5)
    assert by_rows.hours is not None
    assert by_rows.hours == pytest.approx(by_steps.hours)  # 10 epochs of 100 steps
    assert by_rows.cost == pytest.approx(by_rows.hours * 8 * 2.5)
    assert plan_of(job(), MODELS["Llama-2-7B"], H200).hours is None


def test_a_family_that_was_never_measured_is_named() -> None:
    unknown = {**MODELS["Mixtral-8x7B"], "model_type": "olmoe", "num_experts": 8}
    (note,) = plan_of(job(), unknown, H200).notes
    assert note == "The memory of models of the family olmoe was never measured."
    assert plan_of(job(), MODELS["Mixtral-8x7B"], H200).notes == ()


def test_adapters_of_experts_are_merged_in_each_layer() -> None:
    """peft adds the product of an adapter's matrices to the weights of the experts, and the sums of all layers stay
    until the backward pass: 1.4 billion numbers in each of the 32 layers of Mixtral 8x7B."""
    lora: dict[str, Any] = {"method": "LoRA", "training__microBatchSize": 1, "deepspeed__zeroStage": 2}
    lora |= {"deepspeed__offloadOptimizer": "None"}

    def needed(*, recompute: bool, **fields: Any) -> int:
        spec = job(**lora, training__gradientCheckpointing=recompute, **fields)
        return plan_of(spec, MODELS["Mixtral-8x7B"], H200).memory.peak

    attention = {"lora": {"targetModules": ["q_proj"]}}
    experts = 8 * 3 * 4096 * 14336
    assert needed(recompute=False) - needed(recompute=False, **attention) > 32 * 2 * experts
    assert needed(recompute=True) - needed(recompute=True, **attention) < 2 * 2 * experts


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"quantization": "NF4"}, "spec.lora.quantization: must be absent for a model with experts"),
        ({"dropout": "0.05"}, "spec.lora.dropout: must be 0 where experts get an adapter"),
        ({"doRA": True}, "spec.lora.doRA: must be false where experts get an adapter"),
    ],
)
def test_what_the_trainer_refuses_for_experts_is_not_planned(lora: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(job(method="LoRA", lora=lora), MODELS["Mixtral-8x7B"], H200)
    assert str(caught.value).startswith(sentence)
    if "quantization" not in lora:
        beside = {**lora, "targetModules": ["q_proj", "v_proj"]}
        assert plan_of(job(method="LoRA", lora=beside), MODELS["Mixtral-8x7B"], H200).fits


def test_weights_in_4_bits_are_never_sharded() -> None:
    spec = job(method="LoRA", lora={"quantization": "NF4"})
    assert chosen(plan_of(spec, MODELS["Llama-2-70B"], find_gpu("L4")))["zeroStage"] == "2"


def test_a_reason_never_says_that_a_job_fits_which_does_not() -> None:
    plan = plan_of(job(resources__gpusPerNode=1), MODELS["Llama-2-70B"], find_gpu("L4"))
    assert not plan.fits
    reasons = {choice.field.rpartition(".")[2]: choice.reason for choice in plan.choices}
    assert reasons["microBatchSize"] == "No size fits, and none takes less memory."
    assert chosen(plan)["microBatchSize"] == "1"
    assert [reason for reason in reasons.values() if "fit each GPU" in reason or "fits the GPUs" in reason] == []


def test_a_step_of_one_micro_batch_may_take_less_memory_than_smaller_ones() -> None:
    """At stage 1 the gradients that two micro-batches accumulate take more than the activations of the second one."""
    fields: dict[str, Any] = {"training__globalBatchSize": 16, "training__gradientCheckpointing": True}
    fields |= {"deepspeed__zeroStage": 1, "deepspeed__offloadOptimizer": "None"}
    gpu = A100.model_copy(update={"memory_gibibytes": 35.0})
    wishes = wishes_of(job(**fields, training__microBatchSize=1), MODELS["Llama-2-7B"])
    plan = plan_job(wishes, gpu)
    assert not plan.fits
    lines = [suggestion.lines for suggestion in suggestions(wishes, plan, rank=DEFAULT_RANK)]
    assert ("spec.training.microBatchSize: 2",) in lines
    small = plan_of(job(**fields), MODELS["Llama-2-7B"], find_gpu("L4"))
    assert not small.fits
    assert chosen(small)["microBatchSize"] == "2"
    reasons = [choice.reason for choice in small.choices if choice.field == "spec.training.microBatchSize"]
    assert reasons == ["No size fits, and none takes less memory."]


def test_memory_that_the_job_sets_is_not_compared_with_machines_for_rent() -> None:
    fields = {"resources__memory": "4Ti", "resources__nodes": 2}
    plan = plan_of(job(**fields), MODELS["Llama-2-70B"], H200)
    assert plan.host.memory < 4 << 40
    assert plan.fits


def test_a_gpu_without_bf16_gets_another_number_format() -> None:
    gpu = find_gpu("T4")
    wishes = wishes_of(job(method="LoRA"), MODELS["Llama-3.2-1B"])
    plan = plan_job(wishes, gpu)
    assert not plan.fits
    found = suggestions(wishes, plan, rank=DEFAULT_RANK)
    assert found
    assert all("spec.training.precision: fp32" in suggestion.lines for suggestion in found)
    assert any("fp32 takes up to 16 times as long" in note for note in found[0].plan.notes)


def test_a_suggestion_keeps_the_number_of_micro_batches_consistent() -> None:
    """`gradientAccumulationSteps` times the micro-batch times the processes must be the global batch."""
    fields = {
        "training__globalBatchSize": 64,
        "training__microBatchSize": 8,
        "training__gradientAccumulationSteps": 1,
        "training__gradientCheckpointing": False,
        "dataset__maxLength": 4096,
        "deepspeed__zeroStage": 3,
    }
    wishes = wishes_of(job(**fields), MODELS["Llama-2-7B"])
    found = suggestions(wishes, plan_job(wishes, find_gpu("H200-141GB")), rank=DEFAULT_RANK)
    assert any("spec.training.gradientAccumulationSteps: 2" in suggestion.lines for suggestion in found)
    for setup in (suggestion.plan.setup for suggestion in found):
        assert setup.micro_batch * setup.accumulation * setup.processes == 64


def test_settings_that_the_plan_leaves_out_are_named() -> None:
    spec = job(dataset__packing=True, deepspeed__overrides='{"zero_optimization": {"reduce_bucket_size": 1000}}')
    notes = plan_of(spec, MODELS["Llama-2-7B"], H200).notes
    assert [note.partition(":")[0] for note in notes] == ["spec.dataset.packing", "spec.deepspeed.overrides"]
    assert plan_of(job(), MODELS["Llama-2-7B"], H200).notes == ()


def test_a_gpu_without_kernels_is_refused() -> None:
    plan = plan_of(job(training__precision="fp32"), MODELS["Llama-3.2-1B"], find_gpu("Tesla-V100-SXM2-32GB"))
    assert plan.problems[0] == "Torch in the trainer image has no kernels for the V100-32GB."


def test_a_gpu_without_bf16_is_refused() -> None:
    plan = plan_of(job(), MODELS["Llama-3.2-1B"], find_gpu("T4"))
    assert plan.problems[0] == "The T4 has no bf16 arithmetic, and spec.training.precision is bf16."


def test_the_gpu_comes_from_the_product_of_the_job() -> None:
    assert gpu_of(job()).name == "A100-80GB"
    assert find_gpu("nvidia-h200").name == "H200-141GB"
    for fields, sentence in (
        (
            {"resources__gpuProduct": "NVIDIA-X1"},
            "spec.resources.gpuProduct: must be a type of GPU that the plan knows",
        ),
        ({"resources__gpuProduct": ""}, "spec.resources.gpuProduct: must name a GPU, or --gpu must"),
        ({"resources__device": "CPU"}, "spec.resources.device: must be GPU"),
    ):
        with pytest.raises(UserError) as caught:
            gpu_of(job(**fields))
        assert str(caught.value).startswith(sentence)


def test_a_table_of_a_user_adds_and_replaces_types() -> None:
    own = {"name": "h200-141gb", "memoryGibibytes": 100, "teraFlops": 1, "memoryBandwidth": 2, "linkBandwidth": 3}
    types = with_types([own], "gpus.yaml")
    assert find_gpu("H200-141GB", types).memory == 100 * GIBIBYTE
    assert len(types) == len(GPU_TYPES)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "gpus.yaml: must be a list of GPU types"),
        ([{"name": "X"}], "gpus.yaml: [0].memoryGibibytes: must be set"),
        ([{"name": "X", "speed": 3}], "gpus.yaml: [0]."),
        ([3], "gpus.yaml: [0]: must be another value"),
        (
            [{"name": "X", "memoryGibibytes": -1, "teraFlops": 1, "memoryBandwidth": 1, "linkBandwidth": 1}],
            "gpus.yaml: [0].memoryGibibytes: must be another value: Input should be greater than 0",
        ),
    ],
)
def test_a_wrong_table_is_named(values: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        with_types(values, "gpus.yaml")
    assert str(caught.value).startswith(sentence)


def test_the_cache_of_generated_answers_counts() -> None:
    """Llama 2 7B keeps 512 KiB of keys and values for a token: 32 layers, 2 x 4,096 numbers of 2 bytes."""
    fields: dict[str, Any] = {
        "method": "LoRA",
        "resources__gpusPerNode": 1,
        "dataset__maxLength": 3840,
        "training__globalBatchSize": 8,
        "training__gradientCheckpointing": True,
    }
    small, large = (
        plan_of(job(evaluation__generation={"batchSize": size}, **fields), MODELS["Llama-2-7B"], find_gpu("A100-40GB"))
        for size in (8, 16)
    )
    without = plan_of(job(dataset__task=None, **fields), MODELS["Llama-2-7B"], find_gpu("A100-40GB"))
    assert Phase.GENERATION not in without.memory.phases
    grown = large.memory.phases[Phase.GENERATION] - small.memory.phases[Phase.GENERATION]
    assert grown >= 8 * 4096 * 512 * 1024
    assert large.memory.peak_phase is Phase.GENERATION
    assert (without.fits, small.fits, large.fits) == (True, True, False)


def test_a_plan_says_what_it_would_be_without_its_choices() -> None:
    """Without the check before the first attempt, a job that leaves the stage open gets ZeRO stage 2, whatever the
    model."""
    fields: dict[str, Any] = {"method": "LoRA", "dataset__task": None, "runPolicy": {"preflight": "Skip"}}
    plan = plan_of(job(**fields), MODELS["Llama-2-70B"], A100)
    assert plan.fits
    assert chosen(plan)["zeroStage"] == "3"
    (problem,) = plan.problems_as_written
    needed = float(problem.removeprefix("A GPU needs ").partition(" GiB")[0])
    assert needed > 137.95e9 / GIBIBYTE, "the weights alone"
    checked = plan_of(job(**fields | {"runPolicy": {}}), MODELS["Llama-2-70B"], A100)
    assert (checked.setup, checked.problems_as_written) == (plan.setup, ()), "the check chooses what the plan chooses"
    written = job(**fields, deepspeed__zeroStage=3, training__microBatchSize=1)
    assert plan_of(written, MODELS["Llama-2-70B"], A100).problems_as_written == ()
