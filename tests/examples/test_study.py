"""`make study` in small: a tiny model and two jobs of a few steps. A finished job is not run again, and a folder with
another study is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from examples.study.__main__ import INTERRUPTED, main
from examples.study.rows import SIZES, Task
from examples.study.study_jobs import FILES, JOBS, StudyJob, chosen, document_of, is_finished, minutes_of, run_folder
from finetune_cli.compare.claims.findings import Comparison, Verdict
from finetune_cli.compare.claims.study import findings_of
from finetune_cli.compare.compared_run import read_run
from finetune_cli.compare.folders import LocalFolder
from finetune_core.api.job import FineTuneJob
from finetune_core.errors import UserError
from finetune_core.resolve import resolve
from tests.trainer import tiny

MOST_MINUTES = 70
PAIRS = (("viggo-lora", "viggo-full"), ("gsm8k-lora", "gsm8k-full"), ("sql-lora", "sql-full"))
OF_A_PAIR = {("metadata", "name"), ("spec", "method"), ("spec", "lora"), ("spec", "training", "learningRate")}
OF_A_PAIR |= {("spec", "storage", "runId")}
"""Fields in which the two jobs of a pair may differ."""


def by_path(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return the fields of ``value`` that are no sections, by their paths. `lora` counts as one field."""
    if not isinstance(value, dict) or path == ("spec", "lora"):
        return {path: value}
    return {key: found for name, below in value.items() for key, found in by_path(below, (*path, name)).items()}


def document(name: str) -> dict[str, Any]:
    (job,) = chosen([name])
    return document_of(job, None)


def changed(first: str, second: str) -> set[tuple[str, ...]]:
    """Return the paths of the fields in which two jobs differ."""
    one, other = by_path(document(first)), by_path(document(second))
    return {path for path in one.keys() | other.keys() if one.get(path) != other.get(path)}


def test_every_job_file_is_a_job_of_the_study_and_the_study_fits_its_time() -> None:
    assert {job.file for job in JOBS} == set(FILES.glob("*.yaml"))
    assert minutes_of(JOBS) <= MOST_MINUTES


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_job_of_the_study_has_the_names_and_the_steps_that_its_file_tells(job: StudyJob) -> None:
    found = document_of(job, None)
    assert found["metadata"]["name"] == f"study-{job.name}"
    assert found["spec"]["storage"]["runId"] == job.name
    training = found["spec"]["training"]
    rows = SIZES[Task(job.name.partition("-")[0])].train
    assert rows is not None
    if "epochs" in training:
        steps = training["epochs"] * rows // training["globalBatchSize"]
        assert f"epochs: 2  # {steps} steps" in job.file.read_text(encoding="utf-8")


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_jobs_of_a_pair_differ_in_the_method_only(pair: tuple[str, str]) -> None:
    assert changed(*pair) == OF_A_PAIR


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("sql-lora-3e-5", ("spec", "training", "learningRate")),
        ("sql-lora-rank-64", ("spec", "lora")),
    ],
)
def test_a_variant_differs_in_one_field(name: str, field: tuple[str, ...]) -> None:
    assert changed("sql-lora", name) == {field, ("metadata", "name"), ("spec", "storage", "runId")}


def test_the_jobs_with_and_without_a_description_of_the_task_differ_in_the_prompts_only() -> None:
    names = {("metadata", "name"), ("spec", "storage", "runId")}
    template = ("spec", "dataset", "format", "promptCompletion", "template")
    assert changed("sql-lora", "sql-lora-plain") == names | {template, ("spec", "evaluation", "basePrompt")}
    # The base model is asked as in sql-lora, so that its scores are comparable.
    form = document("sql-lora")["spec"]["dataset"]["format"]["promptCompletion"]
    assert document("sql-lora-plain")["spec"]["evaluation"]["basePrompt"] == form["template"]


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_shortened_job_is_a_job(job: StudyJob, steps: int) -> None:
    short = document_of(job, steps)
    short["metadata"] |= {"namespace": "default", "uid": "1"}
    config = resolve(FineTuneJob.model_validate(short), report=None)
    assert (config.optimization.max_steps, config.optimization.epochs) == (steps, None)
    assert config.storage.checkpoint_every_steps is not None


def test_an_unknown_job_and_a_wrong_number_of_steps_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="sql-loro is none of: viggo-lora"):
        chosen(["sql-loro"])
    with pytest.raises(SystemExit):
        main(["--steps", "0"])
    assert "--steps must be at least 1" in capsys.readouterr().err


def tiny_model(folder: Path) -> Path:
    """Write a model that is so small that a step takes milliseconds."""
    size = tiny.write_byte_tokenizer(folder)
    return tiny.write_model(folder, vocab_size=size, max_position_embeddings=512)


@pytest.mark.gang
@pytest.mark.timeout(300)
def test_two_jobs_are_run_and_compared_and_are_not_run_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tmp_path / "model")
    tiny.write_byte_tokenizer(model)
    options = ["--output", str(tmp_path / "study"), "--model", str(model), "--only", "sql-lora,sql-full"]
    assert main([*options, "--steps", "6"]) == 0, capfd.readouterr()
    shown = capfd.readouterr().out
    assert shown.startswith("study: 2 jobs of 6 steps, a trial; 2 left\n")
    record = json.loads((tmp_path / "study" / "study.json").read_text())
    assert {name: [part["exitCode"] for part in parts] for name, parts in record["jobs"].items()} == {
        "sql-lora": [0],
        "sql-full": [0],
    }
    page = (tmp_path / "study" / "study.html").read_text()
    assert "sql-lora" in page

    assert main([*options, "--steps", "6"]) == 0
    again = capfd.readouterr().out
    assert "0 left" in again
    assert "finetune run" not in again
    assert main([*options, "--steps", "7"]) == 2
    assert "has a study of other rows, steps or model" in capfd.readouterr().out

    folders = [run_folder(tmp_path / "study" / "store", document(name)) for name in ("sql-lora", "sql-full")]
    assert all(map(is_finished, folders))
    runs = [read_run(LocalFolder(folder), folder.name) for folder in folders if folder is not None]
    assert [run.label for run in runs] == ["sql-lora", "sql-full"]
    verdicts = {claim.number: finding.verdict for claim, finding in findings_of(Comparison.of(runs))}
    # Claim 8 needs a job with another prompt, and claim 9 one with added tokens. Whether claim 13 can be tested depends
    # on the speed: with two evaluations, those of one job may all be earlier than those of the other.
    not_tested = {number for number, verdict in verdicts.items() if verdict is Verdict.NOT_TESTED}
    assert not_tested - {13} == {8, 9}
    assert verdicts[2] is Verdict.SEEN


@pytest.mark.gang
@pytest.mark.timeout(200)
def test_a_stop_ends_the_job_that_runs_and_no_other_begins(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    tiny.write_byte_tokenizer(model)
    output = tmp_path / "study"
    command = [sys.executable, "-m", "examples.study", "--output", str(output), "--model", str(model), "--steps", "500"]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=FILES.parents[2])
    deadline = time.monotonic() + 120
    while b"$ finetune run" not in log.read_bytes():
        assert time.monotonic() < deadline, log.read_text()
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=100) == INTERRUPTED, log.read_text()
    shown = log.read_text()
    assert shown.count("$ finetune run") == 1
    assert shown.rstrip().endswith("interrupted; the same command goes on from here")
    assert not json.loads((output / "study.json").read_text())["jobs"].keys() - {"viggo-lora"}
