"""`finetune validate` names every problem in a file with its line, and does not crash on any input."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from finetune_cli.main import main
from tests.core.jobs import EXAMPLES, quickstart

LinesOf = Callable[[str | bytes], tuple[int, list[str]]]

GOOD = (EXAMPLES / "quickstart.yaml").read_text(encoding="utf-8")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run `finetune validate` with ``arguments``. Return its exit code and its standard output."""
    code = main(["validate", *arguments])
    return code, capsys.readouterr().out


@pytest.fixture
def lines_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> LinesOf:
    """Return a function that runs `finetune validate` on a file with the given text. The function returns the exit code
    and the printed lines. The file name at the beginning of each line is removed."""

    def check(text: str | bytes) -> tuple[int, list[str]]:
        file = tmp_path / "job.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        code, output = run(capsys, str(file))
        return code, [line.removeprefix(f"{file}:") for line in output.splitlines()]

    return check


def test_a_valid_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, output = run(capsys, str(EXAMPLES / "quickstart.yaml"))
    assert code == 0
    assert output.endswith("quickstart.yaml: quickstart valid\n")


def test_all_problems_of_a_file_at_once_with_their_lines(lines_of: LinesOf) -> None:
    text = (
        GOOD.replace("name: quickstart", "name: Quick")
        .replace("lora: {rank: 8, alpha: 16}", "lora:\n    rank: 0\n    alfa: 16")
        .replace("    maxLength: 128", "    maxLength: many")
        .replace("nodes: 2, gpusPerNode: 0, device: CPU", "nodes: 2, gpusPerNode: 0")
    )
    where = dict(enumerate(text.splitlines(), start=1))
    code, lines = lines_of(text)
    assert code == 1
    said = {line.split(": ", 1)[1]: where[int(line.split(":")[0])].strip() for line in lines}
    assert said["spec.lora.rank: must be between 1 and 512"] == "rank: 0"
    assert said["spec.lora.alfa: unknown field; did you mean `alpha`?"] == "alfa: 16"
    assert said["spec.dataset.maxLength: must be a whole number between 8 and 131072"] == "maxLength: many"
    assert said["spec.resources: `gpusPerNode` must be at least 1 unless `device` is CPU"].startswith("resources:")
    assert any(line.startswith("metadata.name: must start with a letter") for line in said)
    assert len(lines) == 5


def test_a_missing_field_is_on_the_line_of_its_section(lines_of: LinesOf) -> None:
    code, lines = lines_of(
        "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata:\n  name: a\nspec:\n  lora: {}\n"
    )
    assert code == 1
    assert "5: spec.model: must be set" in lines


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method: LoRA", "method: LoRA\n  method: Full", "spec.method: must not stand twice"),
        ("  method: LoRA", "\tmethod: LoRA", "must be YAML"),
        ("kind: FineTuneJob", "kind: FinetuneJob", "kind: must be FineTuneJob"),
        ("finetune.dev/v1alpha1", "finetune.dev/v1", "apiVersion: must be finetune.dev/v1alpha1"),
        ('"1e-3"', "1e-3", "spec.training.learningRate: must be a decimal number from 0 on in quotes"),
        ("  method: LoRA", "  deepspeed: {overrides: '{'}\n  method: LoRA", "spec.deepspeed.overrides: must be"),
        ("  method: LoRA", "  deepspeed: {overrides: '{\"bf16\": 1}'}\n  method: LoRA", "must not hold bf16"),
        ("  method: LoRA", "  tracking: {tensorBoard: {}}\n  method: LoRA", "refused by the operator"),
        ("rank: 8", "rank: !!python/object:os.system 8", "must not have the tag"),
        ("rank: 8", "rank: .nan", "must be a finite number"),
        ("rank: 8", "? [a] \n    : 8", "must have a string as key"),
        ("  method: LoRA", "  ? {a: b}\n  : 8\n  method: LoRA", "must have a string as key"),
        ("memory: 6Gi", "memory: 6Gi, scratch: {size: 9}", "spec.resources.scratch.size: must be "),
        ("memory: 6Gi", "memory: 6Gi, scratch: {storageClassName: a}", "spec.resources.scratch.size: must be set"),
        ("  storage:", "  storage:\n    cache: {}", "spec.storage.cache: exactly one of `claimName`, `ephemeral` must"),
        (
            "  storage:",
            "  storage:\n    cache: {path: /x}",
            "spec.storage.cache.path: unknown field; must be one of claimName, ephemeral",
        ),
        (
            "train: {s3: ",
            "train: {csv: ",
            "spec.dataset.train.csv: unknown field; must be one of huggingFace, s3, volume, mix",
        ),
        ("  name: q", "  nom: x\n  name: q", "metadata.nom: unknown field; must be one of name, namespace, labels,"),
        ("spec:", "zzz: 1\nspec:", "zzz: unknown field; must be one of apiVersion, kind, metadata, spec, status"),
        ("spec:", "spek: 1\nspec:", "spek: unknown field; did you mean `spec`?"),
        (
            "s3: {uri: s3://finetune/models/smollm2-135m}",
            "volume: {claimName: a, path: b}",
            "spec: `storage.cache` must be absent with `model.volume`: such a model is used where it lies",
        ),
        ("rank: 8", "rank: *nowhere", "must not refer to the anchor nowhere"),
    ],
)
def test_what_is_wrong_is_said(lines_of: LinesOf, old: str, new: str, message: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new)
    if "model.volume" in message:
        text = text.replace("  storage:", "  storage:\n    cache: {claimName: models}")
    code, lines = lines_of(text)
    assert code == 1
    assert sum(message in line for line in lines) == 1, lines


def test_a_folder_stands_for_its_files_as_in_kubectl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files with another ending and folders are passed over, whatever is in them."""
    (tmp_path / "b.yml").write_text(GOOD.replace("rank: 8", "rank: 0"), encoding="utf-8")
    (tmp_path / "a.yaml").write_text(GOOD, encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps(quickstart()), encoding="utf-8")
    (tmp_path / "notes.txt").write_text("a: [", encoding="utf-8")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "folder.yaml" / "d.yaml").write_text("a: [", encoding="utf-8")
    code, output = run(capsys, str(tmp_path))
    first, second, third = output.splitlines()
    assert code == 1
    assert first == f"{tmp_path}/a.yaml: quickstart valid"
    assert second.startswith(f"{tmp_path}/b.yml:")
    assert second.endswith(": spec.lora.rank: must be between 1 and 512")
    assert third == f"{tmp_path}/c.json: quickstart valid"
    (tmp_path / "b.yml").unlink()
    assert run(capsys, str(tmp_path))[0] == 0


def test_a_folder_without_files_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("a", encoding="utf-8")
    assert run(capsys, str(tmp_path)) == (1, f"{tmp_path}:1: must hold a file that ends in .json, .yaml or .yml\n")


def test_pipes_in_a_folder_are_passed_over_and_links_to_nothing_are_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody may ever write to a pipe."""
    os.mkfifo(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(GOOD, encoding="utf-8")
    assert run(capsys, str(tmp_path)) == (0, f"{tmp_path}/b.yaml: quickstart valid\n")
    (tmp_path / "c.yaml").symlink_to("nothing")
    code, output = run(capsys, str(tmp_path))
    assert code == 1
    assert f"{tmp_path}/c.yaml:1: can't be read" in output


def test_an_empty_name_is_not_the_current_folder(capsys: pytest.CaptureFixture[str]) -> None:
    code, output = run(capsys, "")
    assert code == 1
    assert "can't be read" in output


def test_documents_of_other_kinds_are_passed_over(lines_of: LinesOf) -> None:
    other = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n"
    assert lines_of(f"{other}---\n---\n{GOOD}---\n{other}")[0] == 0
    assert lines_of(other) == (0, [" no FineTuneJob in it"])


def test_lines_count_through_all_documents(lines_of: LinesOf) -> None:
    code, lines = lines_of(GOOD + "---\n" + GOOD.replace("rank: 8", "rank: 0"))
    number = len(GOOD.splitlines()) + 1 + next(n for n, line in enumerate(GOOD.splitlines(), 1) if "rank: 8" in line)
    assert (code, lines) == (1, [f"{number}: spec.lora.rank: must be between 1 and 512"])


def test_the_items_of_a_list_are_jobs(lines_of: LinesOf) -> None:
    bad = quickstart("lora.rank", 0)
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": [quickstart(), bad]}, indent=1)
    code, lines = lines_of(text)
    assert code == 1
    assert lines[0].endswith(": spec.lora.rank: must be between 1 and 512")
    assert '"rank": 0' in text.splitlines()[int(lines[0].split(":")[0]) - 1]


def test_anchors_and_merges_work_as_in_kubectl(lines_of: LinesOf) -> None:
    text = GOOD.replace("lora: {rank: 8, alpha: 16}", "lora: &a {rank: 8, alpha: 16}").replace(
        "resources: {nodes: 2,", "resources: {<<: {nodes: 3}, nodes: 2,"
    )
    assert lines_of(text)[0] == 0


def test_json_for_pipelines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(GOOD.replace("rank: 8", "rank: 0"))
    code, output = run(capsys, "-o", "json", str(file), str(EXAMPLES / "quickstart-full.yaml"))
    result = json.loads(output)
    assert code == 1
    assert (result["valid"], result["files"], result["jobs"]) == (False, 2, 2)
    (problem,) = result["problems"]
    assert problem == {
        "file": str(file),
        "line": problem["line"],
        "job": "quickstart",
        "path": "spec.lora.rank",
        "message": "must be between 1 and 512",
        "refusedBy": "server",
    }


def test_the_documented_output_is_the_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (EXAMPLES.parent / "docs" / "validate.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    console, result = blocks[0][1], next(body for language, body in blocks if language == "json")
    monkeypatch.chdir(tmp_path)
    two_limits = GOOD.replace("maxSteps: 80", "maxSteps: 80\n    epochs: 3")
    Path("job.yaml").write_text(two_limits.replace("rank: 8", "rank: 0"), encoding="utf-8")
    Path("other.yaml").write_text(GOOD.replace("sharedMemory: 256Mi", "sharedMemory: 6Gi"), encoding="utf-8")
    shown = ""
    for file in ("job.yaml", "other.yaml"):
        assert main(["validate", file]) == 1
        output = capsys.readouterr()
        shown += f"$ finetune validate {file}\n{output.out}{output.err}"
    assert shown == console
    assert json.loads(run(capsys, "-o", "json", "job.yaml")[1]) == json.loads(result)


def test_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(GOOD.encode())))
    assert run(capsys, "-") == (0, "-: quickstart valid\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe\xfa", "must be UTF-8"),
        (b"a: \x00", "must be YAML"),
        (GOOD.replace("rank: 8", "rank: " + "[" * 100_000).encode(), "must"),
        (GOOD.replace("rank: 8", "rank: " + "[" * 400 + "]" * 400).encode(), "must not be nested deeper"),
        (GOOD.replace("rank: 8", "rank: " + "[" * 150 + "]" * 150).encode(), "must not be nested deeper"),
        (GOOD.replace("name: quickstart", "name: " + "x" * 1_000_000).encode(), "at most 40 characters"),
        (GOOD.replace("rank: 8", "rank: " + "9" * 10_000).encode(), "must be"),
        (GOOD.replace("rank: 8", 'rank: "\\ud800"').encode(), "must be"),
    ],
    ids=["bytes", "control", "open", "deep flow", "deep", "1 MB", "long number", "surrogate"],
)
def test_strange_files_get_a_sentence(lines_of: LinesOf, text: bytes, message: str) -> None:
    code, lines = lines_of(text)
    assert code == 1
    assert any(message in line for line in lines), [line[:200] for line in lines]


def test_a_billion_laughs_end_quickly(lines_of: LinesOf) -> None:
    laughs = "a0: &a0 ha\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    code, lines = lines_of(GOOD + laughs)
    assert code == 1
    assert any("aliases counted" in line for line in lines)


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, output = run(capsys, str(tmp_path / "no.yaml"), "x" * 300)
    assert code == 1
    assert "no.yaml:1: can't be read: No such file or directory" in output
    assert "xxx:1: can't be read: File name too long" in output


@settings(
    max_examples=150,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(
    cut=st.integers(0, len(GOOD)),
    length=st.integers(0, 30),
    junk=st.one_of(
        st.text(max_size=12),
        st.sampled_from(["{", "[", "- ", ": ", "&a ", "*a", "<<: ", "? ", "|\n", "'", "---\n", "!!x "]),
    ),
)
def test_no_text_makes_it_stumble(tmp_path_factory: pytest.TempPathFactory, cut: int, length: int, junk: str) -> None:
    file = tmp_path_factory.getbasetemp() / "mangled.yaml"
    file.write_bytes((GOOD[:cut] + junk + GOOD[cut + length :]).encode("utf-8", "surrogatepass"))
    assert main(["validate", str(file)]) in (0, 1)


@settings(max_examples=100, derandomize=True)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    )
)
def test_whatever_stands_in_spec_gets_an_answer(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    file = tmp_path_factory.getbasetemp() / "spec.yaml"
    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "a"}, "spec": value}
    file.write_text(yaml.safe_dump(job, allow_unicode=True), encoding="utf-8")
    assert main(["validate", str(file)]) == 1
