"""Counts the problems that graders report; `test_tasks_viggo.py` and its neighbours use the counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from finetune_trainer.evaluation.graders import Grade


def left_out(grades: Sequence[Grade]) -> Counter[str]:
    """Return the problems of rows that could not be used, each with the number of such rows."""
    return Counter(grade.problem for grade in grades if not grade.is_graded)


def unreadable(grades: Sequence[Grade]) -> Counter[str]:
    """Return the problems of graded answers that could not be read, each with the number of such answers."""
    return Counter(grade.problem for grade in grades if grade.is_graded and grade.problem)
