"""Tests of the parts of examples/demo that need no cluster: its job files, its generated answers, and its
measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.demo import answers, steps
from examples.demo.measurements import JobTimes, Measurements
from finetune_core.api.job import FineTuneJob
from tests.cli.stored import job
from tests.cluster import Cluster
from tests.trainer import tiny


@pytest.mark.parametrize("method", steps.QUICKSTARTS)
def test_the_job_files_are_valid_and_ask_as_the_demo_asks(method: str) -> None:
    quickstart = FineTuneJob.model_validate(steps.manifest_of(steps.QUICKSTARTS[method]))
    form = quickstart.spec.dataset.format.prompt_completion
    assert quickstart.spec.method == method
    assert form is not None
    assert form.template == answers.TEMPLATE.replace("{sentence}", "{prompt}")
    assert (form.prompt_field, form.completion_field) == ("sentence", "meaning")


def test_a_job_file_is_changed_by_paths_and_the_file_stays() -> None:
    path = steps.QUICKSTARTS["LoRA"]
    changed = steps.manifest_of(path, metadata__name="other", spec__training__maxSteps=7, spec__runPolicy__maxRetries=0)
    assert changed["metadata"]["name"] == "other"
    assert changed["spec"]["training"]["maxSteps"] == 7
    assert changed["spec"]["runPolicy"] == {"maxRetries": 0}
    assert steps.manifest_of(path)["spec"]["training"]["maxSteps"] != 7


def test_base_and_tuned_are_asked_the_same(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    rows = [{"sentence": f"a sentence {number}", "meaning": "inform(name[x])"} for number in range(5)]
    found = answers.compare(model, model, rows)
    assert [row["base"] for row in found["rows"]] == [row["tuned"] for row in found["rows"]]
    assert found["exactMatch"] == {"base": 0.0, "tuned": 0.0}


def test_an_answer_is_one_line_whatever_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.write_model(tmp_path / "model")
    model, tokenizer = answers.load(folder), answers.load_tokenizer(folder)
    sentences = ["short", "a sentence that is longer than the others", "another"]
    together = answers.answers(model, tokenizer, sentences)
    monkeypatch.setattr(answers, "BATCH", 1)
    assert answers.answers(model, tokenizer, sentences) == together
    assert all("\n" not in answer for answer in together)


def test_times_of_the_job_are_taken_once_and_in_order() -> None:
    def states() -> Iterator[FineTuneJob]:
        yield job()
        yield job("unschedulable")
        yield job("running")
        yield job("succeeded")

    times = JobTimes(cluster=Cluster.__new__(Cluster), namespace="demo", pods=2)
    assert len(list(times.observe(states()))) == 4
    assert list(times.seconds) == ["firstStatus", "firstReport", "firstStep", "firstCheckpoint", "ended"]


def test_measurements_are_written_with_date_and_machine(tmp_path: Path) -> None:
    measured = Measurements("make demo")
    with measured.phase("cluster"):
        pass
    measured.write(tmp_path / "measurements.json")
    written = json.loads((tmp_path / "measurements.json").read_text())
    assert written["command"] == "make demo"
    assert written["phaseSeconds"].keys() == {"cluster"}
    assert written["machine"]["cores"] >= 1
