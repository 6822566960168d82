"""Reads and writes `evaluation/<run>.json` in the bucket: the scores of base model and tuned model, and some answers.

`evaluation/comparison.py` writes the base model's scores before training, and adds those of the tuned model at the end.
Later runs of the job reuse the base model's scores as long as the rows are the same. `artifact.py` reads the scores of
the run that made the artifact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from finetune_core.contract import ContractModel, EvaluationRecord
from finetune_core.errors import valid_text
from finetune_core.layout import evaluation_key
from finetune_trainer.storage.root import RunRoot

STORED_DEPTH = 32
"""Largest number of objects and lists inside of each other in one value of a stored row. Deeper objects and lists are
replaced by "…", because every JSON parser limits the depth."""
STORED_ROW_CHARACTERS = 50_000
"""A row that has more characters than this as JSON is shortened. A row with many columns may still be longer
afterwards."""
STORED_VALUE_CHARACTERS = 2000
"""If a row is longer than STORED_ROW_CHARACTERS, its values are stored as texts of at most this many characters."""


def stored_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a data file as `AnswerRecord` stores it. A value that JSON can't express becomes text. A row that
    is too deep or too long is shortened."""
    found: dict[str, Any] = {valid_text(name): _stored(value, STORED_DEPTH) for name, value in row.items()}
    if len(json.dumps(found)) <= STORED_ROW_CHARACTERS:
        return found
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
    return {name: text[:STORED_VALUE_CHARACTERS] for name, text in texts.items()}


def _stored(value: Any, depth: int) -> Any:
    if isinstance(value, (Mapping, list, tuple)) and depth == 0:
        return "…"
    if isinstance(value, Mapping):
        return {valid_text(str(key)): _stored(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_stored(inner, depth - 1) for inner in value]
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return valid_text(value if isinstance(value, str) else str(value))


class AnswerRecord(ContractModel):
    """A generated answer and its grade."""

    answer: str
    gold: Mapping[str, Any]
    """The row of the evaluation set that the prompt came from, as `stored_row` returns it. It contains the reference
    answer."""
    scores: Mapping[str, bool | float]
    """Value of each score of the task for this answer, for example ``{"exact": true}``. Empty if the row can't be
    graded."""
    problem: str = ""
    """Why the answer could not be read, or why the row can't be graded. Otherwise empty."""


class EvaluationFile(ContractModel):
    """Content of `evaluation/<run>.json`: the scores of base model and tuned model, and some answers of each."""

    version: int = 1
    rows_sha256: str | None = None
    """sha256 of the rows of the evaluation set, as the tuned model reads them. If a later run has another digest, the
    rows have changed, and the later run's scores can't be compared with the scores in this file."""
    evaluation: EvaluationRecord
    base_answers: list[AnswerRecord] = []
    tuned_answers: list[AnswerRecord] = []
    base_grades: Mapping[str, float] = {}
    """Value of the task's main score for each graded row of the base model, by the name that `scorer.row_name` gives
    the row. With these values two models are compared row by row. Empty without a task, with very many rows, and in
    files of older versions."""
    tuned_grades: Mapping[str, float] = {}


def write_evaluation(root: RunRoot, run: int, file: EvaluationFile) -> None:
    """Write the scores of ``run``. A second call, with the tuned model's scores too, replaces the file."""
    root.write(evaluation_key(run), file.to_json().encode())


def read_evaluation(root: RunRoot, run: int) -> EvaluationFile | None:
    """Return the scores of ``run``, or None if the run wrote none."""
    data = root.read(evaluation_key(run))
    return EvaluationFile.model_validate_json(data) if data is not None else None


def newest_base_evaluation(root: RunRoot, rows_sha256: str) -> EvaluationFile | None:
    """Return the base model's scores and answers from the newest run that wrote them for the rows with the digest
    ``rows_sha256``, without the scores, answers and grades of the tuned model. Return None if no run wrote any."""
    for entry in sorted(root.list_objects("evaluation/"), key=lambda entry: entry.key, reverse=True):
        data = root.read(entry.key)
        if data is None:
            continue
        file = EvaluationFile.model_validate_json(data)
        if file.evaluation.base is not None and file.rows_sha256 == rows_sha256:
            evaluation = file.evaluation.model_copy(update={"tuned": None, "tuned_step": None})
            return file.model_copy(update={"evaluation": evaluation, "tuned_answers": [], "tuned_grades": {}})
    return None
