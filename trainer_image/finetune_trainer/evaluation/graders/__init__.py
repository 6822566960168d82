"""The functions that grade generated answers, one module for each task; `sql_*` are the parts of the SQL grader.

A grader is a pure function without torch: it gets a generated answer and its row of the evaluation set, and returns a
`Grade`. The names, columns and scores of the tasks are declared in `finetune_core.tasks`, not here.
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
    """Grades one generated answer against the row that the prompt came from."""

    def __call__(self, answer: str, row: Mapping[str, object]) -> Grade:
        """Return the scores of ``answer``; never raises because of what the answer or the row holds."""


GRADERS: Mapping[str, Grader] = {"ViGGO": viggo.grade, "GSM8K": gsm8k.grade, "SQL": sql.grade}
"""The grader of each task in `finetune_core.tasks.TASKS`, by the task's name."""


def grader_of(task: str) -> Grader | None:
    """Return the grader of the task that `dataset.task` names, None where the job has no task.

    Raises UserError for a task without a grader, so that a job never trains to the end and reports no score.
    """
    if task == NO_TASK:
        return None
    if task not in GRADERS:
        raise UserError("dataset.task", f"must be one of {', '.join(GRADERS)}: this trainer has no grader for {task}")
    return GRADERS[task]
