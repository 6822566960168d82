"""Reads and writes `evaluation/<run>.json` in the bucket: the scores of base model and tuned model, and some answers.

`evaluation/comparison.py` writes the base model's scores before training, and every later run of the job reuses these
scores. `artifact.py` reads the scores of the run that made the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_core.contract import ContractModel, EvaluationRecord
from finetune_core.layout import evaluation_key
from finetune_trainer.storage.root import RunRoot


class AnswerRecord(ContractModel):
    """A generated answer and its grade."""

    answer: str
    gold: Mapping[str, Any]
    """The whole row of the evaluation set that the prompt came from. It contains the reference answer."""
    scores: Mapping[str, bool | float]
    """Value of each score of the task for this answer, for example ``{"exact": true}``. Empty if the row can't be
    graded."""
    problem: str = ""
    """Why the answer could not be read, or why the row can't be graded. Otherwise empty."""


class EvaluationFile(ContractModel):
    """Content of `evaluation/<run>.json`: the scores of base model and tuned model, and some answers of each."""

    version: int = 1
    evaluation: EvaluationRecord
    base_answers: list[AnswerRecord] = []
    tuned_answers: list[AnswerRecord] = []


def write_evaluation(root: RunRoot, run: int, file: EvaluationFile) -> None:
    """Write the scores of ``run``. A second call, with the tuned model's scores too, replaces the file."""
    root.write(evaluation_key(run), file.to_json().encode())


def read_evaluation(root: RunRoot, run: int) -> EvaluationFile | None:
    """Return the scores of ``run``, or None if the run wrote none."""
    data = root.read(evaluation_key(run))
    return EvaluationFile.model_validate_json(data) if data is not None else None


def newest_base_evaluation(root: RunRoot) -> EvaluationFile | None:
    """Return the base model's scores and answers from the newest run that wrote them, without those of the tuned model.
    Return None if no run wrote any."""
    for entry in sorted(root.list_objects("evaluation/"), key=lambda entry: entry.key, reverse=True):
        data = root.read(entry.key)
        if data is None:
            continue
        file = EvaluationFile.model_validate_json(data)
        if file.evaluation.base is not None:
            evaluation = file.evaluation.model_copy(update={"tuned": None, "tuned_step": None})
            return file.model_copy(update={"evaluation": evaluation, "tuned_answers": []})
    return None
