"""The graders: functions that grade generated answers, one module for each task. The modules `sql_*` are parts of the
SQL grader.

A grader is a pure function without torch. It gets a generated answer and its row of the evaluation set, and returns a
`Grade`. The SQL grader runs queries in a child process. `finetune_core.tasks` declares the names, columns and scores of
the tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from finetune_core.errors import UserError
from finetune_core.tasks import NO_TASK
from finetune_trainer.evaluation.graders import gsm8k, sql, viggo
from finetune_trainer.evaluation.graders.grades import Grade

__all__ = ["GRADERS", "Grade", "Grader", "grader_of"]


class Grader(Protocol):
    """A function that grades a generated answer. It compares the answer with the row that the prompt came from."""

    def __call__(self, answer: str, row: Mapping[str, object]) -> Grade:
        """Return the grade of ``answer``. Never raises an exception, whatever the answer and the row contain."""


GRADERS: Mapping[str, Grader] = {"ViGGO": viggo.grade, "GSM8K": gsm8k.grade, "SQL": sql.grade}
"""The grader of each task in `finetune_core.tasks.TASKS`, by the task's name."""


def grader_of(task: str) -> Grader | None:
    """Return the grader of ``task``, the value of `dataset.task`. Return None if the value says that the job has no
    task.

    Raises UserError for a task without a grader. Otherwise the job would train to the end and report no score.
    """
    if task == NO_TASK:
        return None
    if task not in GRADERS:
        raise UserError("dataset.task", f"must be one of {', '.join(GRADERS)}: this trainer has no grader for {task}")
    return GRADERS[task]
