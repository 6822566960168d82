"""`evaluation/<run>.json` in the bucket: what base and tuned model scored, with some answers for people to read.

The base model's score is written before training and found again by every later run of the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_core.contract import ContractModel, EvaluationRecord
from finetune_core.layout import evaluation_key
from finetune_trainer.storage.root import RunRoot


class AnswerRecord(ContractModel):
    """An answer that was generated, and how it was graded."""

    answer: str
    gold: Mapping[str, Any]
    scores: Mapping[str, bool]
    problem: str = ""


class ScoreFile(ContractModel):
    """Content of `evaluation/<run>.json`."""

    version: int = 1
    evaluation: EvaluationRecord
    base_answers: list[AnswerRecord] = []
    tuned_answers: list[AnswerRecord] = []


def write_scores(root: RunRoot, run: int, scores: ScoreFile) -> None:
    """Write what is known so far about ``run``'s scores; the last write has both."""
    root.write(evaluation_key(run), scores.to_json().encode())


def read_scores(root: RunRoot, run: int) -> ScoreFile | None:
    """Return what ``run`` wrote, None where it wrote nothing."""
    data = root.read(evaluation_key(run))
    return ScoreFile.model_validate_json(data) if data is not None else None


def newest_base(root: RunRoot) -> ScoreFile | None:
    """Return the newest file in which the base model's score stands, without what that run's tuned model came to."""
    for entry in sorted(root.list_objects("evaluation/"), key=lambda entry: entry.key, reverse=True):
        data = root.read(entry.key)
        if data is None:
            continue
        scores = ScoreFile.model_validate_json(data)
        if scores.evaluation.base is not None:
            evaluation = scores.evaluation.model_copy(update={"tuned": None, "tuned_step": None})
            return scores.model_copy(update={"evaluation": evaluation, "tuned_answers": []})
    return None
