"""`finetune plan` prints a plan, ends with a code that says whether the job fits, and names every wrong input."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_cli.jobfiles.plan_view import nested
from finetune_cli.jobfiles.validate import SIZE_LIMIT
from finetune_cli.main import main
from finetune_core.planned_job import with_lines
from tests.core.jobs import EXAMPLES, quickstart
from tests.planning.memory_cases import MODELS
from tests.trainer.objectstore import ACCESS_KEY, BUCKET, SECRET_KEY, ObjectStore

JOB = EXAMPLES / "study/llama2/7b-full-gsm8k.yaml"


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no line be broken."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return the configuration of Llama 2 7B as a file."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Llama-2-7B"]), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run `finetune plan` with ``arguments``. Return its exit code and what it printed."""
    code = main(["plan", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err


def give(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let ``content`` be the standard input, as where the locale is C."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "ascii", "surrogateescape"))


def test_a_job_that_fits(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    code, output, _ = run(capsys, JOB, "--model-config", config, "--rows", 7473, "--price", 2.5)
    assert code == 0
    assert "llama2-7b-full-gsm8k  Full of 6.74 B parameters on 1 x 8 A100-80GB" in output
    assert "\nfits\n" in output
    for word in ("weights", "optimizer", "activations", "tokens per second", "by the price", "a checkpoint  80.9 GB"):
        assert word in output


def test_a_job_that_does_not_fit_ends_with_1_and_shows_changes(
    capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    config.write_text(json.dumps(MODELS["Llama-2-13B"]), encoding="utf-8")
    code, output, _ = run(capsys, JOB, "--model-config", config, "--gpu", "L4")
    assert code == 1
    assert "\ndoes not fit\n" in output
    choices, changes = (output.split(f"{title}\n")[1] for title in ("leaves it open", "makes the job fit:"))
    assert choices.splitlines()[1].rstrip() == "spec:"
    same = json.loads(run(capsys, JOB, "--model-config", config, "--gpu", "L4", "-o", "json")[1])["changes"]
    shown = [yaml.safe_load(change) for change in changes.strip().split("\n\n")]
    assert shown == [with_lines({}, change["lines"]) for change in same] != []


def test_lines_with_common_sections_are_one_document() -> None:
    fields = {
        "spec.training.microBatchSize": "2",
        "spec.deepspeed.zeroStage": "Auto",
        "spec.training.gradientCheckpointing": "true",
        "method": '"3"',
    }
    lines = list(nested(fields))
    assert [field for _, field in lines if field is not None] == [
        "spec.training.microBatchSize",
        "spec.training.gradientCheckpointing",
        "spec.deepspeed.zeroStage",
        "method",
    ]
    assert yaml.safe_load("\n".join(line for line, _ in lines)) == with_lines(
        {}, [f"{field}: {value}" for field, value in fields.items()]
    )


def test_the_commands_of_the_page_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (EXAMPLES.parent / "docs/planning.md").read_text(encoding="utf-8")
    written, *commands = page.split("```console\n$ ")[1].split("\n```")[0].split("\n$ ")
    content = written.removeprefix("echo '").split("' > config.json")[0]
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    assert len(commands) == 3
    for command in commands:
        program, plan, *arguments = shlex.split(command.split(" | ")[0])
        assert (program, plan) == ("finetune", "plan")
        code, output, error = run(capsys, *arguments)
        assert (code, error) == (0, "")
        assert "6.74 B" in output or json.loads(output)["parameters"] > 6.7e9


def test_a_job_without_gpus_is_planned_with_a_type(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    job = EXAMPLES / "quickstart.yaml"
    code, output, error = run(capsys, job, "--model-config", config)
    assert (code, output) == (2, "")
    assert "spec.resources.device: must be GPU, because the plan is about GPUs" in error
    assert "give their type, for example --gpu L4" in error
    _, output, error = run(capsys, job, "--model-config", config, "--gpu", "L4")
    assert "on 2 x 1 L4" in output
    assert error == ""


@pytest.mark.parametrize(("form", "parse"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_programs_get_the_same_figures(capsys: pytest.CaptureFixture[str], config: Path, form: str, parse: Any) -> None:
    code, output, _ = run(capsys, JOB, "--model-config", config.parent, "-o", form)
    plan = parse(output)
    assert (code, plan["fits"]) == (0, True)
    assert plan["parameters"] == plan["trainedParameters"] == 6_738_448_384  # with 4 rows in two embeddings
    parts = plan["memory"]["parts"]
    assert sum(parts.values()) == plan["memory"]["neededBytes"]
    assert plan["gpu"] == {"name": "A100-80GB", "memoryBytes": plan["gpu"]["memoryBytes"], "count": 8}


def test_the_table_of_a_user_is_read(capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path) -> None:
    table = tmp_path / "gpus.yaml"
    own = {"name": "Big", "memoryGibibytes": 500, "teraFlops": 900, "memoryBandwidth": 4000, "linkBandwidth": 400}
    table.write_text(yaml.safe_dump([own]), encoding="utf-8")
    code, output, _ = run(capsys, JOB, "--model-config", config, "--gpu-table", table, "--gpu", "Big")
    assert code == 0
    assert "500.0 GiB" in output


def test_a_job_from_the_standard_input(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, JOB.read_bytes())
    assert run(capsys, "-", "--model-config", config)[0] == 0


def test_the_configuration_is_read_from_the_bucket_of_the_job(
    capsys: pytest.CaptureFixture[str], store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.dumps(MODELS["Llama-3.2-1B"]).encode()
    store.client.put_object(BUCKET, "planned/config.json", io.BytesIO(raw), len(raw))
    document = quickstart("resources", {"nodes": 1, "gpusPerNode": 1})
    document["spec"]["model"] = {"s3": {"uri": f"s3://{BUCKET}/planned"}}
    del document["metadata"]["uid"]
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(document), encoding="utf-8")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    code, output, error = run(capsys, file, "--endpoint", store.endpoint, "-o", "json")
    assert error == ""
    assert code == 0
    assert json.loads(output)["parameters"] > 1e9


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((JOB,), "--model-config: must name the file config.json of meta-llama/Llama-2-7b-hf"),
        (("missing.yaml",), "missing.yaml:1: can't be read"),
        ((JOB, "--model-config", "missing.json"), "--model-config: must name a file: missing.json can't be read"),
        ((JOB, "--model-config", "CONFIG", "--gpu", "X1"), "--gpu: must be a type of GPU that the plan knows"),
        (
            (JOB, "--model-config", "BERT"),
            "config.json: model_type: must be one that the plan knows, and 'bert' is none",
        ),
        ((JOB, "--model-config", "LIST"), "must hold a JSON object"),
        ((JOB, "--model-config", "BROKEN"), "--model-config: must name a YAML or JSON file"),
        ((JOB, "--model-config", "CONFIG", "--gpu-table", "LIST"), "[0]: must be another value"),
    ],
)
def test_a_wrong_input_is_named(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path, arguments: tuple[Any, ...], sentence: str
) -> None:
    texts = {"BERT": '{"model_type": "bert"}', "LIST": "[1]", "BROKEN": "{", "CONFIG": config.read_text("utf-8")}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    code, output, error = run(capsys, *(tmp_path / one if one in texts else one for one in arguments))
    assert (code, output) == (2, "")
    assert sentence in error


def test_a_job_in_a_list_and_a_configuration_with_tabs_are_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`kubectl get -o json` prints Lists, and YAML alone refuses the tabs that JSON allows, whatever a file's name."""
    jobs = {"apiVersion": "v1", "kind": "List", "items": [yaml.safe_load(JOB.read_text(encoding="utf-8"))]}
    file = tmp_path / "list.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    for name in ("tabs.json", "tabs"):
        (tmp_path / name).write_text(json.dumps(MODELS["Llama-2-7B"], indent="\t"), encoding="utf-8")
        assert run(capsys, file, "--model-config", tmp_path / name)[0] == 0


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("training", {"globalBatchSize": 8}, "-:1: spec.training: exactly one of `epochs`, `maxSteps` must be set"),
        ("nodes", 3, "-:1: spec.nodes: unknown field"),
        (
            "resources",
            {"gpusPerNode": 8, "gpuProduct": "Tesla-T4"},
            "-:1: spec.training.precision: must be fp32 on Tesla-T4, which has no bf16",
        ),
    ],
)
def test_a_wrong_job_from_the_standard_input_is_refused(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: object,
    sentence: str,
) -> None:
    document = yaml.safe_load(JOB.read_text(encoding="utf-8"))
    document["spec"][field] = value
    give(monkeypatch, json.dumps(document).encode())
    code, output, error = run(capsys, "-", "--model-config", config)
    assert (code, output) == (2, "")
    assert sentence in error


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        pytest.param(
            JOB.read_bytes().replace(b"  method: Full\n", b"  method: LoRA\n  method: Full\n"),
            "spec.method: must not stand twice",
            id="a field twice",
        ),
        pytest.param(JOB.read_bytes() + b"#" * SIZE_LIMIT, "-:1: must be at most 32 MB", id="too large"),
        pytest.param(b"a: \xff", "-:1: must be UTF-8", id="not UTF-8"),
    ],
)
def test_the_standard_input_is_read_as_a_file_is(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, sentence: str
) -> None:
    give(monkeypatch, content)
    code, output, error = run(capsys, "-", "--model-config", config)
    assert (code, output) == (2, "")
    assert sentence in error


def test_a_suggested_change_can_be_written_into_the_file(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    config.write_text(json.dumps(MODELS["Llama-2-13B"]), encoding="utf-8")
    _, output, _ = run(capsys, JOB, "--model-config", config, "--gpu", "A100-40GB", "-o", "json")
    changes = json.loads(output)["changes"]
    assert changes
    document = yaml.safe_load(JOB.read_text(encoding="utf-8"))
    for change in changes:
        file = tmp_path / "changed.json"
        file.write_text(json.dumps(with_lines(document, change["lines"])), encoding="utf-8")
        assert run(capsys, file, "--model-config", config, "--gpu", "A100-40GB")[0] == 0


def test_a_file_must_hold_one_job(capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path) -> None:
    text = JOB.read_text(encoding="utf-8")
    for content, count in ((f"{text}\n---\n{text}", "2"), ("a: 1", "none")):
        file = tmp_path / "jobs.yaml"
        file.write_text(content, encoding="utf-8")
        code, _, error = run(capsys, file, "--model-config", config)
        assert code == 2
        assert f"must hold one FineTuneJob, and holds {count}" in error


@pytest.mark.parametrize(
    "option",
    [
        ("--price", "0"),
        ("--price", "x"),
        ("--rows", "0"),
        ("--rows", "1.5"),
        ("-o", "xml"),
        ("--price", "1e308"),
        ("--rows", "1" + "0" * 400),
    ],
)
def test_a_wrong_option_is_an_error_of_the_command_line(
    capsys: pytest.CaptureFixture[str], config: Path, option: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(JOB), "--model-config", str(config), *option])
    assert caught.value.code == 2
    assert option[0] in capsys.readouterr().err
