"""Counts the grades that name a problem, for `test_tasks_viggo.py`, `test_tasks_sql.py` and `test_tasks_gsm8k.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from finetune_trainer.evaluation.graders import Grade


def left_out(grades: Sequence[Grade]) -> Counter[str]:
    """Count the rows that could not be used for grading, by the problem that the grader names."""
    return Counter(grade.problem for grade in grades if not grade.is_graded)


def unreadable(grades: Sequence[Grade]) -> Counter[str]:
    """Count the answers that were graded although they could not be read, by the problem that the grader names."""
    return Counter(grade.problem for grade in grades if grade.is_graded and grade.problem)
