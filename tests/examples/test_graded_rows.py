"""For each job file in examples/study/llama2, a perfect answer to the file's example row gets the full value of every
score from the file's grader, and a wrong answer gets 0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from finetune_core.api.job import FineTuneJob
from finetune_trainer.evaluation.graders import load_grading

FILES = sorted((Path(__file__).parents[2] / "examples" / "study" / "llama2").glob("*.yaml"))


def example_row(text: str) -> dict[str, str]:
    """Return the row in the comment at the top of a job file."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    start = next(number for number, line in enumerate(lines) if line.startswith("{"))
    row: dict[str, str] = json.JSONDecoder().raw_decode(" ".join(lines[start:]))[0]
    return row


def test_there_are_the_files_of_the_study() -> None:
    assert len(FILES) == 21


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_perfect_answer_to_the_example_row_of_a_file_gets_every_score(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    job, row = FineTuneJob.model_validate(yaml.safe_load(text)), example_row(text)
    form, grading = job.spec.dataset.format.prompt_completion, load_grading(job.spec.dataset)
    assert form is not None
    assert grading is not None
    assert {form.prompt_field, *(column.name for column in grading.required_columns)} <= row.keys()
    perfect = grading.grade(row[form.completion_field], row)
    assert perfect.problem == ""
    assert {name: float(value) for name, value in perfect.scores.items()} == dict.fromkeys(
        grading.task.score_names, 1.0
    )
    assert not any(grading.grade("SELECT 1 AS nothing", row).scores.values())
