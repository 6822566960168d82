"""The jobs in examples/data: each takes the rows that its comment shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_cli.main import main
from finetune_core.api import FineTuneJob
from finetune_core.row_templates import parse

FOLDER = Path(__file__).parents[2] / "examples" / "data"
RENDERED = {
    "prompt-completion": ("Sentence: The mill is open.\nMeaning: ", "open(mill)"),
    "alpaca": ("### Instruction:\nAdd the numbers.\n\n### Input:\n1 and 2\n\n### Response:\n", "3"),
    "columns": ("Prime numbers\nIs 91 prime?\n", "91 = 7 * 13\nAnswer: false"),
}


def row_in_comment(path: Path) -> dict[str, Any]:
    """Return the row that the comment of the job at ``path`` shows."""
    (line,) = (line for line in path.read_text().splitlines() if line.startswith("# Rows: {"))
    row: dict[str, Any] = json.loads(line.removeprefix("# Rows: "))
    return row


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_job_is_valid_and_says_in_one_line_what_its_rows_are(path: Path) -> None:
    assert main(["validate", str(path)]) == 0
    (line,) = (line for line in path.read_text().splitlines() if line.strip().startswith("format:"))
    assert yaml.safe_load(line.strip())["format"] == yaml.safe_load(path.read_text())["spec"]["dataset"]["format"]


@pytest.mark.parametrize("name", RENDERED)
def test_the_row_of_the_comment_becomes_prompt_and_completion(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    job = FineTuneJob.model_validate(
        yaml.safe_load(path.read_text()) | {"metadata": {"name": name, "namespace": "a", "uid": "b"}}
    )
    form, row = job.spec.dataset.format.prompt_completion, row_in_comment(path)
    assert form is not None
    texts = (form.template, form.completion or "{completion}")
    found = tuple("".join(piece.text for piece in parse(text, form.aliases).pieces(row)) for text in texts)
    assert found == RENDERED[name]
