"""The preflight check compares the plan of the training with the memory of the GPUs before any GPU is held: it refuses
what can't fit, tells what may not fit, and says nothing where it does not know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_core.api.job import FineTuneJob
from finetune_core.contract import RunConfig
from finetune_core.contract.preflight_result import FindingKind
from finetune_core.errors import UserError
from finetune_core.planned_job import plan_of, wishes_of_run, with_lines
from finetune_core.planning.gpu_types import GIBIBYTE, find_gpu
from finetune_core.planning.job_plan import plan_job
from finetune_core.planning.model_families import FAMILIES
from finetune_core.resolve import resolve
from finetune_core.validation.validate_job import validate_job
from finetune_trainer.preflight.memory_check import check_memory
from tests.core.jobs import EXAMPLES, set_at
from tests.planning.memory_cases import MODELS
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.preflights import paths_in, run_program

H200, A100, L4 = "NVIDIA-H200", "NVIDIA-A100-SXM4-80GB", "NVIDIA-L4"
LORA: dict[str, Any] = {"method": "LoRA"}
LARGE_BATCH: dict[str, Any] = {
    "dataset__maxLength": 4096,
    "training__globalBatchSize": 64,
    "training__microBatchSize": 32,
}


def job(**fields: Any) -> dict[str, Any]:
    """Return a full fine-tuning on one H200, with ``fields`` set, which are paths below `spec` with `__` for the dots.
    The value None removes a field. The job leaves nothing of its training open: the fields that are not set have the
    defaults of `resolve`."""
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / "study/llama2/7b-full-gsm8k.yaml").read_text(encoding="utf-8"))
    defaults: dict[str, Any] = {
        "deepspeed": None,
        "training__gradientCheckpointing": None,
        "training__microBatchSize": 1,
        "training__globalBatchSize": 8,
        "resources__gpuProduct": H200,
        "resources__gpusPerNode": 1,
        "resources__memory": "900Gi",
    }
    for path, value in {**defaults, **fields}.items():
        set_at(found["spec"], path.split("__"), value)
    assert validate_job(found).problems == []
    default = resolve(FineTuneJob.model_validate(found), report=None).optimization
    closed = with_lines(
        found,
        [
            f"spec.deepspeed.zeroStage: {default.zero_stage}",
            f"spec.deepspeed.offloadOptimizer: {'CPU' if default.offload_optimizer else 'None'}",
            f"spec.training.gradientCheckpointing: {'true' if default.gradient_checkpointing else 'false'}",
        ],
    )
    assert validate_job(closed).problems == []
    return closed


def run_file(found: dict[str, Any]) -> RunConfig:
    """Return the run file of the job ``found``."""
    return resolve(FineTuneJob.model_validate(found), report=None)


def refusal(found: dict[str, Any], model: str, longest_row: int | None = 512) -> str:
    """Return the sentence with which the job ``found`` is refused."""
    with pytest.raises(UserError) as caught:
        check_memory(run_file(found), MODELS[model], longest_row=longest_row)
    return str(caught.value)


def lines_of(sentence: str) -> list[str]:
    """Return the lines of YAML at the end of ``sentence``."""
    return sentence.partition("with which it fits is ")[2].split(", ")


def test_a_training_that_fits_is_planned_as_it_runs() -> None:
    found = job()
    told = check_memory(run_file(found), MODELS["Llama-3.2-1B"], longest_row=512)
    assert told is not None
    assert told.notices == []
    plan = plan_of(FineTuneJob.model_validate(with_lines(found, ["spec.deepspeed.zeroStage: 2",
        "spec.deepspeed.offloadOptimizer: None", "spec.training.gradientCheckpointing: false"])).spec,
        MODELS["Llama-3.2-1B"], find_gpu(H200))  # fmt: skip
    assert told.planned is not None
    assert told.planned.gpu_memory_bytes == plan.memory.needed
    assert (told.planned.memory_bytes, told.planned.cpus) == (plan.host.memory, plan.host.cpus)


def test_a_model_that_can_never_fit_is_refused_with_the_figures() -> None:
    sentence = refusal(job(), "Llama-2-70B")
    assert sentence.startswith("resources.gpuProduct: must name a GPU with more memory, because the training takes at")
    assert "GiB of each GPU at the peak (" in sentence
    assert "and the H200-141GB has 139.8 GiB; " in sentence


def test_a_full_training_that_only_the_plain_engine_makes_fit_is_told_so() -> None:
    """With all that a GPU takes, 1B needs 21.2 GiB without DeepSpeed and 24.7 GiB at stage 2. The L4 has 22 GiB."""
    found = job(training__globalBatchSize=1, resources__gpuProduct=L4)
    sentence = refusal(found, "Llama-3.2-1B")
    assert sentence.endswith("; the smallest change with which it fits is spec.deepspeed.zeroStage: None")
    changed = with_lines(found, lines_of(sentence))
    assert validate_job(changed).problems == []
    told = check_memory(run_file(changed), MODELS["Llama-3.2-1B"], longest_row=512)
    assert told is not None
    assert told.notices == []


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("Llama-2-70B", {**LORA, "resources__gpuProduct": A100}),
        ("Llama-2-13B", {}),
        ("Llama-2-7B", {**LARGE_BATCH}),
        ("Llama-2-7B", {**LORA, **LARGE_BATCH, "resources__gpuProduct": L4}),
        ("Llama-3.2-1B", {"resources__gpuProduct": L4}),
        ("Mixtral-8x7B", {**LORA, "resources__gpusPerNode": 2, "resources__gpuProduct": L4}),
    ],
)
def test_the_change_of_a_refusal_makes_a_valid_job_that_fits(model: str, changes: dict[str, Any]) -> None:
    found = job(**changes)
    sentence = refusal(found, model, longest_row=4096)
    lines = lines_of(sentence)
    assert all(line.startswith("spec.") for line in lines), sentence
    changed = with_lines(found, lines)
    assert validate_job(changed).problems == [], lines
    told = check_memory(run_file(changed), MODELS[model], longest_row=4096)
    assert told is not None
    assert told.notices == [], lines


def test_rows_that_are_shorter_than_the_job_allows_are_no_reason_to_refuse() -> None:
    found = job(**LORA, **LARGE_BATCH)
    assert "takes at least" in refusal(found, "Llama-2-7B", longest_row=4096)
    for longest in (100, None):
        told = check_memory(run_file(found), MODELS["Llama-2-7B"], longest_row=longest)
        assert told is not None
        (notice,) = told.notices
        assert notice.startswith("resources.gpuProduct: with rows of 4,096 tokens the training takes ")
        assert "; the smallest change with which it fits is spec." in notice


@pytest.mark.parametrize("longest_row", [2000, 4096])
def test_packed_sequences_are_always_full(longest_row: int) -> None:
    found = job(**LORA, **LARGE_BATCH, dataset__packing=True)
    assert "takes at least" in refusal(found, "Llama-2-7B", longest_row=longest_row)


def test_packed_sequences_are_no_more_than_the_rows_of_a_step_fill() -> None:
    """64 rows of 100 tokens fill two sequences of 4,096 tokens, also where a micro-batch may have 32 sequences."""
    found = job(**LORA, **LARGE_BATCH, dataset__packing=True)
    told = check_memory(run_file(found), MODELS["Llama-2-7B"], longest_row=100)
    assert told is not None
    (notice,) = told.notices
    assert "with rows of 4,096 tokens the training takes" in notice


def test_what_exceeds_the_gpu_by_less_than_a_tenth_is_a_notice() -> None:
    found = job(deepspeed__zeroStage="None", resources__gpuProduct=L4, training__microBatchSize=4)
    told = check_memory(run_file(found), MODELS["Llama-3.2-1B"], longest_row=512)
    assert told is not None
    gpu = find_gpu(L4)
    assert told.planned is not None
    assert gpu.memory < told.planned.gpu_memory_bytes <= 1.1 * gpu.memory
    (notice,) = told.notices
    assert "and the L4 has 22.0 GiB" in notice


def test_settings_of_deepspeed_that_are_not_planned_are_never_refused() -> None:
    found = job(deepspeed__overrides='{"zero_optimization": {"reduce_bucket_size": 1000}}')
    told = check_memory(run_file(found), MODELS["Llama-2-70B"], longest_row=512)
    assert told is not None
    assert told.notices[0].startswith("resources.gpuProduct: with rows of 512 tokens the training takes ")


def test_memory_of_the_pod_is_a_notice_with_the_line() -> None:
    found = job(resources__memory="72Gi", resources__gpusPerNode=8, deepspeed__zeroStage=3)
    told = check_memory(run_file(found), MODELS["Llama-2-7B"], longest_row=512)
    assert told is not None
    (notice,) = told.notices
    assert notice.startswith("resources.memory: a pod may need ")
    assert ", and gets 72.0 GiB; enough is spec.resources.memory: " in notice
    line = notice.partition("enough is ")[2]
    told = check_memory(run_file(with_lines(found, [line])), MODELS["Llama-2-7B"], longest_row=512)
    assert told is not None
    assert told.notices == []


@pytest.mark.parametrize(
    ("fields", "configuration"),
    [
        ({"resources__gpuProduct": "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb"}, MODELS["Llama-2-70B"]),
        ({"resources__gpuProduct": ""}, MODELS["Llama-2-70B"]),
        ({"resources__device": "CPU", "resources__gpusPerNode": 0}, MODELS["Llama-2-70B"]),
        ({}, {**MODELS["Llama-2-70B"], "model_type": "bloom"}),
        ({}, {"model_type": "llama"}),
        ({}, {}),
    ],
)
def test_nothing_is_said_where_the_plan_does_not_know(fields: dict[str, Any], configuration: Any) -> None:
    assert check_memory(run_file(job(**fields)), configuration, longest_row=512) is None


def test_a_gpu_without_bf16_is_refused_before_the_check() -> None:
    small = job(**LORA)
    set_at(small["spec"], ["resources", "gpuProduct"], "Tesla-T4")
    with pytest.raises(UserError, match=r"^spec\.training\.precision: must be fp32 on Tesla-T4"):
        run_file(small)
    in_fp32 = job(resources__gpuProduct="Tesla-T4", training__precision="fp32")
    assert "T4 has 14.6 GiB" in refusal(in_fp32, "Llama-2-70B")


@pytest.mark.parametrize(
    "changes",
    [{"lora": {"quantization": "NF4"}}, {"dataset__packing": True}, {"deepspeed__offloadOptimizer": "CPU"}],
    ids=["4 bits", "packing", "offload"],
)
def test_what_was_never_measured_is_refused_only_where_far_more_is_needed(changes: dict[str, Any]) -> None:
    """The same job is refused, told or said nothing about, as its largest rows or its GPU ask for more."""
    told = {}
    for product in (H200, A100, "NVIDIA-A100-SXM4-40GB", "NVIDIA-L40S", L4, "Tesla-T4"):
        # The T4 stands for a GPU with little memory. A job in bf16 is refused there before this check.
        config = run_file(job(**LORA, **changes, training__microBatchSize=8))
        config = config.model_copy(update={"world": config.world.model_copy(update={"gpu_product": product})})
        gpu = find_gpu(product)
        needed = plan_job(wishes_of_run(config, MODELS["Llama-2-13B"]), gpu).memory.needed
        try:
            check = check_memory(config, MODELS["Llama-2-13B"], longest_row=512)
        except UserError:
            told[needed / gpu.memory] = "refused"
        else:
            assert check is not None
            told[needed / gpu.memory] = "told" if any("GPU" in notice for notice in check.notices) else "nothing"
    assert {share: 0 if share <= 1 else 1 if share <= 1.5 else 2 for share in told} == {
        share: ("nothing", "told", "refused").index(what) for share, what in told.items()
    }


def test_memory_that_the_job_leaves_open_is_planned_and_told_only_where_no_machine_has_it() -> None:
    found = job(
        resources__memory=None,
        resources__sharedMemory="16Gi",
        resources__gpuProduct="NVIDIA-B200",
        resources__gpusPerNode=8,
        deepspeed__zeroStage=3,
    )
    told = check_memory(run_file(found), MODELS["Llama-2-7B"], longest_row=512)
    assert told is not None
    assert told.notices == []
    assert told.planned is not None
    assert told.planned.memory_bytes > 64 * GIBIBYTE
    told = check_memory(run_file(found), MODELS["Llama-2-70B"], longest_row=512)
    assert told is not None
    (notice,) = [notice for notice in told.notices if notice.startswith("resources.memory")]
    assert notice.endswith(", and machines with 8 GPUs have at most 2048.0 GiB")


def test_figures_beyond_all_bounds_are_no_plan() -> None:
    """A configuration is a file that anybody may have written, and only a job with own settings of DeepSpeed is never
    refused for such a file."""
    sizes = {"hidden_size": 1 << 22, "intermediate_size": 1 << 22, "num_hidden_layers": 10}
    found = job(deepspeed__overrides='{"zero_optimization": {"reduce_bucket_size": 1000}}')
    told = check_memory(run_file(found), MODELS["Llama-2-7B"] | sizes, longest_row=512)
    assert told is not None
    assert told.planned is None


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 10**9),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
)
KEYS = sorted({key for model in MODELS.values() for key in model} - {"model_type"})


@settings(max_examples=50)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    base=st.sampled_from(sorted(MODELS)),
    values=st.dictionaries(st.sampled_from(KEYS), anything, max_size=3),
    longest=st.none() | st.integers(1, 10**6),
    method=st.sampled_from(["Full", "LoRA"]),
)
def test_no_configuration_breaks_the_check(
    family: str, base: str, values: dict[str, Any], longest: int | None, method: str
) -> None:
    """A configuration is a file that anybody may have written."""
    configuration = {**MODELS[base], "num_hidden_layers": 2, **values, "model_type": family}
    try:
        told = check_memory(run_file(job(method=method, resources__gpuProduct=L4)), configuration, longest_row=longest)
    except UserError as error:
        refused = error
    else:
        assert told is None or told.planned is None or told.planned.gpu_memory_bytes > 0
        return
    assert str(refused).startswith("resources.gpuProduct: must name a GPU with more memory")


def write_large_model(tiny: Path, folder: Path) -> None:
    """Write the tiny model with layers so wide that it has a billion parameters, as a file with holes in the place of
    the weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny, folder)
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 6}
    fields |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    path.write_text(json.dumps(fields))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    header: dict[str, Any] = {}
    end = 0
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name not in tied:
            header[name] = {
                "dtype": "BF16",
                "shape": list(tensor.shape),
                "data_offsets": [end, end + 2 * tensor.numel()],
            }
            end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as weights:
        weights.write(len(text).to_bytes(8, "little") + text)
        weights.truncate(8 + len(text) + end)


def test_the_program_refuses_a_large_model_and_plans_a_small_one(
    tmp_path: Path, store: ObjectStore, tiny_model: Path
) -> None:
    paths = paths_in(tmp_path, store)
    write_large_model(tiny_model, paths.volumes / "models" / "large")
    gpus: dict[str, Any] = {"world": {"nodes": 1, "processesPerNode": 1, "device": "GPU", "gpuProduct": L4}}
    gpus |= {"optimization__precision": "bf16", "method": "Full"}
    paths.run_file.write_text(json.dumps(run_config(store, "small", **gpus)))
    small = run_program(paths)
    assert (small.code, small.result.findings) == (0, [])
    assert small.result.planned is not None
    assert small.result.planned.gpu_memory_bytes < find_gpu(L4).memory
    model = {"volume": {"claimName": "models", "path": "large"}}
    paths.run_file.write_text(json.dumps(run_config(store, "large", model=model, **gpus)))
    large = run_program(paths)
    (finding,) = large.result.findings
    assert (large.code, finding.kind) == (64, FindingKind.FINAL)
    assert finding.message.startswith("resources.gpuProduct: must name a GPU with more memory")
    assert "the smallest change with which it fits is spec." in finding.message
    assert large.result.planned is None
