"""Counts of the problems in grades, for the tests of the graders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from finetune_trainer.evaluation.graders import Grade


def left_out(grades: Sequence[Grade]) -> Counter[str]:
    """Return how often each problem of a row kept an answer from being graded."""
    return Counter(grade.problem for grade in grades if not grade.is_graded)


def unreadable(grades: Sequence[Grade]) -> Counter[str]:
    """Return how often each problem of a graded answer was found."""
    return Counter(grade.problem for grade in grades if grade.is_graded and grade.problem)
