"""The operator refuses a job that the schema accepts but that this version can't run. The message begins with the path
of the field."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_core.api import FineTuneJob
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.errors import UserError
from finetune_core.planning.gpu_types import GPU_TYPES
from finetune_core.resolve import resolve
from finetune_core.validation.overrides import RESERVED_KEYS, SETTLED_KEYS, override_problems
from finetune_core.validation.runnable import NOT_YET, to_bytes, unrunnable
from finetune_core.validation.validate_job import validate_job
from tests.core.jobs import quickstart

VALUES: dict[str, Any] = {
    "tracking": {"tensorBoard": {}},
}


def job(path: str = "", value: Any = None) -> FineTuneJob:
    """Return the quickstart job with the field ``path`` (below `spec`, with dots) set to ``value``. None removes the
    field."""
    return FineTuneJob.model_validate(quickstart(path, value))


def test_every_field_that_waits_for_a_later_version_is_tried() -> None:
    assert [field.path for field in NOT_YET] == list(VALUES)


@pytest.mark.parametrize("path", VALUES)
def test_a_value_that_can_not_be_honoured_is_refused_with_its_path(path: str) -> None:
    with pytest.raises(UserError, match=rf"^spec\.{path}: must be .*: this version of the operator"):
        resolve(job(path, VALUES[path]), report=None)


def test_the_quickstart_can_be_run() -> None:
    assert unrunnable(job().spec) == []


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("resources.sharedMemory", "6Gi", "spec.resources.sharedMemory: must be less than `memory`, which is 6Gi"),
        ("training.microBatchSize", 9, "spec.training.microBatchSize: must be at most 8"),
        ("deepspeed.overrides", "{x", "spec.deepspeed.overrides: must be JSON"),
    ],
)
def test_what_only_the_operator_knows(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(job(path, value), report=None)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(("shared", "sentence"), [("64Gi", "which may be 64Gi where it is absent"), ("63Gi", "")])
def test_shared_memory_is_less_than_the_memory_that_a_pod_may_get(shared: str, sentence: str) -> None:
    spec = quickstart("resources.memory", None)
    spec["spec"]["resources"]["sharedMemory"] = shared
    path = "spec.resources.sharedMemory: must be less than `memory`, "
    assert [str(problem) for problem in unrunnable(FineTuneJob.model_validate(spec).spec)] == (
        [path + sentence] if sentence else []
    )


def test_flash_is_refused_in_fp32() -> None:
    spec = quickstart("resources.device", "GPU")
    spec["spec"]["resources"]["gpusPerNode"] = 1
    spec["spec"]["training"] |= {"attention": "Flash", "precision": "fp32"}
    with pytest.raises(
        UserError, match=r"^spec.training.attention: must not be Flash with precision fp32: it computes"
    ):
        resolve(FineTuneJob.model_validate(spec), report=None)


def test_flash_is_refused_for_examples_that_are_not_packed() -> None:
    """Examples that are not packed are computed by torch's SDPA even where `attention` is Flash. The status would
    therefore name a kernel that is not used."""
    spec = quickstart("resources.device", "GPU")
    spec["spec"]["resources"]["gpusPerNode"] = 1
    spec["spec"]["training"] |= {"attention": "Flash", "precision": "bf16"}
    with pytest.raises(UserError, match=r"^spec.training.attention: must not be Flash without dataset.packing: it"):
        resolve(FineTuneJob.model_validate(spec), report=None)
    spec["spec"]["dataset"]["packing"] = True
    assert resolve(FineTuneJob.model_validate(spec), report=None).optimization.attention == "Flash"


OLD_GPUS = [
    ("Tesla-T4", "training.precision: must be fp32 on Tesla-T4, which has no bf16, and there is no fp16; or name GPUs"),
    ("NVIDIA-T4", "training.precision: must be fp32 on NVIDIA-T4"),
    ("Tesla-T4-SHARED", "training.precision: must be fp32 on Tesla-T4-SHARED"),
    ("Tesla-V100-SXM2-32GB", "resources.gpuProduct: must name newer GPUs: Tesla-V100-SXM2-32GB has no bf16, and torch"),
    ("Tesla-V100-PCIE-16GB", "resources.gpuProduct: must name newer GPUs: Tesla-V100-PCIE-16GB has no bf16"),
]


def job_on(product: str, precision: str, device: str = "GPU") -> FineTuneJob:
    """Return the quickstart job on one GPU of ``product``, or on CPUs of a node that has it."""
    document = quickstart("training.precision", precision)
    gpus = 1 if device == "GPU" else 0
    document["spec"]["resources"] |= {"nodes": 1, "device": device, "gpusPerNode": gpus, "gpuProduct": product}
    return FineTuneJob.model_validate(document)


@pytest.mark.parametrize(("product", "sentence"), OLD_GPUS)
def test_bf16_is_refused_on_gpus_that_do_not_have_it(product: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^spec[.]{sentence}"):
        resolve(job_on(product, "bf16"), report=None)
    (problem,) = validate_job(quickstart() | {"spec": job_on(product, "bf16").spec.to_json()}).problems
    assert str(problem).startswith(f"spec.{sentence}")
    for fine in (job_on(product, "fp32"), job_on(product, "bf16", device="CPU")):
        assert unrunnable(fine.spec) == []


def test_bf16_is_taken_on_all_other_gpus() -> None:
    products = [product for gpu in GPU_TYPES if gpu.bf16 for product in gpu.products]
    assert len(products) > 8
    for product in [*products, "", "NVIDIA-X9000", "T"]:
        assert unrunnable(job_on(product, "bf16").spec) == []


def test_fp16_is_refused_with_what_to_use() -> None:
    (problem,) = validate_job(quickstart("training.precision", "fp16")).problems
    assert str(problem) == (
        "spec.training.precision: must be one of bf16, fp32: there is no fp16, and fp32 computes on GPUs without bf16"
    )
    (other,) = validate_job(quickstart("training.precision", "int8")).problems
    assert str(other) == "spec.training.precision: must be one of bf16, fp32"


@pytest.mark.parametrize("kernel", ["Flash", "Flex"])
def test_a_kernel_of_gpus_is_refused_on_cpus(kernel: str) -> None:
    spec = quickstart("resources.device", "CPU")
    spec["spec"]["training"]["attention"] = kernel
    with pytest.raises(UserError, match=f"^spec.training.attention: must not be {kernel} on CPUs: it trains on GPUs"):
        resolve(FineTuneJob.model_validate(spec), report=None)


FORM = "dataset.format.promptCompletion"


@pytest.mark.parametrize(
    ("form", "base_prompt", "sentence"),
    [
        ({"template": "{a}{#b}"}, None, f"spec.{FORM}.template: must close each optional part: there is no `{{/b}}`"),
        (
            {"completion": "{a}{/b}"},
            None,
            f"spec.{FORM}.completion: must close its optional parts in the",
        ),
        ({}, "{#a}{prompt}", "spec.evaluation.basePrompt: must close each optional part: there is no `{/a}`"),
        (
            {"template": "{q} {completion}"},
            None,
            f"spec.{FORM}.template: must not show every column of the completion: the prompt would give",
        ),
        (
            {"completion": "{a}{b}"},
            "{b}{a}",
            "spec.evaluation.basePrompt: must not show every column of the completion",
        ),
        (
            {"template": "{a}", "promptField": "x"},
            None,
            f"spec.{FORM}.promptField: must be absent, because no template uses it: `template` holds no `{{prompt}}`",
        ),
        (
            {"completion": "{a}", "completionField": "x"},
            None,
            f"spec.{FORM}.completionField: must be absent, because no template uses it: `completion` holds no",
        ),
    ],
)
def test_templates_that_can_not_be_meant_are_refused(
    form: dict[str, Any], base_prompt: str | None, sentence: str
) -> None:
    document = quickstart("dataset.format", {"promptCompletion": form})
    if base_prompt is not None:
        document["spec"]["dataset"]["task"] = {"name": "GSM8K"}
        document["spec"]["evaluation"]["basePrompt"] = base_prompt
    with pytest.raises(UserError) as caught:
        resolve(FineTuneJob.model_validate(document), report=None)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"template": "{question} {prompt}", "promptField": "x"},
        {"template": "{x}", "promptField": "x"},
        {"template": "{q}", "completion": "{q} because {why}"},
        {"template": "{#completion}{q}{/completion}"},
    ],
)
def test_templates_that_can_be_meant_can_be_run(form: dict[str, Any]) -> None:
    assert unrunnable(job("dataset.format", {"promptCompletion": form}).spec) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"thinking": "False"},
            ".thinking: must be false as JSON writes it: 'False' would be a text, which a template",
        ),
        ({"a": "low", "b": " None"}, ".b: must be null as JSON writes it"),
        ({"a": "false", "b": '"False"', "c": "none of it", "d": ""}, None),
        *(({name: "1"}, f".{name}: is set by the trainer") for name in ("messages", "tokenize", "strftime_now")),
    ],
    ids=str,
)
def test_an_argument_that_no_chat_template_can_get_is_refused(arguments: dict[str, str], sentence: str | None) -> None:
    given = job("dataset.format", {"messages": {"templateArguments": arguments}})
    found = [
        str(problem).partition("spec.dataset.format.messages.templateArguments")[2]
        for problem in unrunnable(given.spec)
    ]
    assert len(found) == (sentence is not None)
    assert all(problem.startswith(sentence or "") for problem in found)


@pytest.mark.parametrize(("key", "reason"), (RESERVED_KEYS | SETTLED_KEYS).items())
def test_a_key_that_another_field_or_the_trainer_decides_is_refused(key: str, reason: str) -> None:
    text = "1"
    for part in reversed(key.split(".")):
        text = f'{{"{part}": {text}}}'
    (problem,) = override_problems(text)
    assert key in str(problem)
    assert reason in str(problem)


@pytest.mark.parametrize("value", ["null", "[]", "2", '"x"'])
def test_a_section_of_the_configuration_can_not_be_replaced_as_a_whole(value: str) -> None:
    """The trainer's own settings in the section would be gone, its ZeRO stage among them."""
    (problem,) = override_problems(f'{{"zero_optimization": {value}}}')
    assert str(problem) == "spec.deepspeed.overrides: must hold an object under zero_optimization"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[]", "object"),
        ('{"a": 1, "a": 2}', "once"),
        ("{'a': 1}", "JSON"),
        ("[" * 200_000, "deep"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
    ],
    ids=["a list", "a key twice", "no JSON", "deep", "a long number"],
)
def test_overrides_that_are_no_object_are_refused(text: str, word: str) -> None:
    (problem,) = override_problems(text)
    assert word in str(problem)


@pytest.mark.parametrize(
    ("quantity", "amount"), [(5, 5), ("1.5Gi", 3 << 29), ("500Mi", 500 << 20), ("2G", 2 * 10**9), ("1Ti", 1 << 40)]
)
def test_quantities_become_bytes(quantity: int | str, amount: int) -> None:
    assert to_bytes(quantity) == amount


EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_can_be_run(path: Path) -> None:
    jobs = [document for document in yaml.safe_load_all(path.read_text()) if document["kind"] == "FineTuneJob"]
    assert jobs
    for document in jobs:
        assert unrunnable(FineTuneJobSpec.model_validate(document["spec"])) == []
