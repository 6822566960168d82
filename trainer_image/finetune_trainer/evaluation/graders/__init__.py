"""ViGGO, GSM8K and SQL: text that a model generated and the gold row come in, named scores come out.

The tasks of Anyscale's study of LoRA against full fine-tuning (September 2023). Pure functions, free of torch;
evaluation calls them through `TASKS`, by the name that stands in `dataset.task`. One module per task holds its grader
and the sources of its rules; `sql_*` are the parts of the SQL grader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from finetune_trainer.evaluation.graders import gsm8k, sql, viggo
from finetune_trainer.evaluation.graders.grades import Grade, Summary, summarise

__all__ = ["TASKS", "Grade", "Grader", "Summary", "Task", "summarise"]


class Grader(Protocol):
    """Grades one generated answer against the row that it was generated for."""

    def __call__(self, answer: str, gold_row: Mapping[str, object]) -> Grade:
        """Return the scores; never raises because of what the answer or the row holds."""


class Task(NamedTuple):
    """A task: its grader, its scores, and the one that is compared where a single number is asked for."""

    grade: Grader
    scores: tuple[str, ...]
    main_score: str


TASKS: Mapping[str, Task] = {
    "ViGGO": Task(viggo.grade, viggo.SCORES, viggo.STRICT),
    "GSM8K": Task(gsm8k.grade, gsm8k.SCORES, gsm8k.EXACT),
    "SQL": Task(sql.grade, sql.SCORES, sql.EXECUTION),
}
