"""Declares the tasks whose generated answers can be graded. Each value of `dataset.task` except `None` has one
declaration.

The declarations in `TASKS` determine the allowed values of `dataset.task`, the descriptions of API fields, the names of
the scores, the label of the main score in the CLI, and docs/tasks.md. The trainer has a grading function for each task
(`finetune_trainer/evaluation/graders/__init__.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import Field, GetPydanticSchema
from pydantic_core import core_schema

NO_TASK = "None"
"""Value of `dataset.task` with which no answers are generated or graded."""

SCORE_LIMIT = 8
"""Largest number of scores of a task. Lists of scores in `status.evaluation` and in the reports have this bound too."""
SCORE_NAME_LENGTH = 32
"""Largest number of characters of a score's name."""

PERPLEXITY = "perplexity"
"""Label of a model's perplexity in tables of scores. No score of a task may have this name, because the tables show the
perplexity beside the task's scores."""

ScoreName = Annotated[str, Field(max_length=SCORE_NAME_LENGTH)]


class Unit(StrEnum):
    """The two kinds of scores. They differ in what the grader returns for an answer, and therefore in what the reported
    mean over all graded answers is. The value is the text that docs/tasks.md shows for this mean."""

    RIGHT_OR_WRONG = "share of right answers"
    """The grader returns True or False, so that the mean is the share of right answers."""
    PARTIAL_CREDIT = "mean over the answers"
    """The grader returns a number from 0 to 1, for example the share of words that are right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One of the scores that a task's grader gives to every answer."""

    name: str
    """Name in camelCase as the status and the CLI show it, for example ``orderFree``."""
    meaning: str
    """Sentence that says when an answer gets the score."""
    unit: Unit = Unit.RIGHT_OR_WRONG


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the evaluation set that a grader reads, in addition to the generated answer."""

    name: str
    """Name of the column in the data file, for example ``mr``."""
    meaning: str
    """Sentence that says what the column must hold."""
    example: str
    """A value of the column, shown in docs/tasks.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The declaration of a task. Raises ValueError where there is no score or there are too many, where the name of a
    score is too long, forbidden or used twice, or where `main` names no score."""

    name: str
    """Value of `dataset.task`, for example ``GSM8K``."""
    grading: str
    """Verb and object of a sentence whose subject is the task's name, for example ``runs the query``. The description
    of the field `dataset.task` contains the sentence."""
    description: str
    """Sentences for docs/tasks.md: what the prompt asks for, which answers count as right, and which rows are left
    out."""
    columns: tuple[Column, ...]
    scores: tuple[Score, ...]
    main: str
    """Name of the score that the field `taskScore` shows and that `evaluation.bestBy: TaskScore` compares."""
    example_answer: str
    """An answer to the row that is made of the `example` of each column. The grader gives this answer the highest value
    of every score."""

    def __post_init__(self) -> None:
        names = self.score_names
        if not 1 <= len(names) <= SCORE_LIMIT or len(set(names)) < len(names):
            raise ValueError(f"{self.name}: a task must have 1 to {SCORE_LIMIT} scores of different names")
        if any(len(name) > SCORE_NAME_LENGTH for name in names):
            raise ValueError(f"{self.name}: the name of a score must have at most {SCORE_NAME_LENGTH} characters")
        if self.main not in names:
            raise ValueError(f"{self.name}: `main` must name one of the scores, and {self.main} is none of them")
        if PERPLEXITY in names:
            raise ValueError(f"{self.name}: no score may be called {PERPLEXITY}, which tables show beside the scores")

    @property
    def score_names(self) -> tuple[str, ...]:
        """Return the names of the scores in the order in which they are reported."""
        return tuple(score.name for score in self.scores)

    @property
    def main_score(self) -> Score:
        """Return the score that `main` names. It is used where only one number can be shown or compared."""
        return next(score for score in self.scores if score.name == self.main)


VIGGO = Task(
    name="ViGGO",
    grading="compares functional representations",
    description="A sentence about a video game is turned into a functional representation: a function, then attributes,"
    " each with its value or values in square brackets (Juraska et al. 2019). White space says nothing. Of an answer"
    " that is not one functional representation and nothing else, only the function's name can be right. A row whose"
    " own representation does not parse, or has a function or an attribute that the data set does not know, is left"
    " out.",
    columns=(
        Column(
            name="mr",
            meaning="The functional representation that is right.",
            example="inform(name[Dirt: Showdown], genres[driving/racing, sport])",
        ),
    ),
    scores=(
        Score(name="strict", meaning="Function, attributes and values are right, in the order of the row's own."),
        Score(
            name="orderFree",
            meaning="Function, attributes and values are right, whatever the order of attributes, and of values in a"
            " list.",
        ),
        Score(name="function", meaning="The function's name is right."),
        Score(
            name="attributes",
            meaning="The names of the attributes are right, whatever their order; a name too many or twice is wrong.",
        ),
        Score(
            name="values",
            meaning="The attributes with their values are right, whatever their order and the function's name.",
        ),
    ),
    main="strict",
    example_answer="inform(name[Dirt: Showdown], genres[driving/racing, sport])",
)

GSM8K = Task(
    name="GSM8K",
    grading="compares the number after `####`",
    description="A word problem is answered step by step, and only the first number after `####` counts (Cobbe et al."
    " 2021). Commas, currency signs and a unit behind the number are ignored. An answer without such a number is wrong,"
    " a row without one is left out.",
    columns=(
        Column(
            name="answer",
            meaning="An answer that ends in `####` and the number that is right.",
            example="Natalia sold 48/2 = 24 clips in May, and 48+24 = 72 clips altogether.\n#### 72",
        ),
    ),
    scores=(Score(name="exact", meaning="The number is the row's own, compared as decimals (5 = 5.00)."),),
    main="exact",
    example_answer="48+24 = 72 clips.\n#### 72",
)

SQL = Task(
    name="SQL",
    grading="runs the query",
    description="A question about tables is answered by a query. The answer and the row's own query run in sqlite on"
    " the same databases, whose rows are generated so that queries of different meaning return different rows (Zhong"
    " et al. 2020). Rows are compared in their order only where the row's own query orders them, columns by place and"
    " not by name. A row whose tables or query sqlite can't run, or whose query returns nothing on generated rows, is"
    " left out.",
    columns=(
        Column(
            name="context",
            meaning="The tables as 1 to 20 CREATE TABLE statements.",
            example="CREATE TABLE head (age INTEGER)",
        ),
        Column(
            name="answer",
            meaning="A query that is right.",
            example="SELECT COUNT(*) FROM head WHERE age > 56",
        ),
    ),
    scores=(
        Score(
            name="execution",
            meaning="On every generated database the query returns the same rows as the row's own query.",
        ),
    ),
    main="execution",
    example_answer="SELECT COUNT(age) FROM head WHERE age > 56",
)

TASKS: Mapping[str, Task] = {task.name: task for task in (VIGGO, GSM8K, SQL)}
"""Every task that `dataset.task` can name, by its name, in the order in which the API lists the names."""

TaskName = Annotated[str, GetPydanticSchema(lambda _type, _handler: core_schema.literal_schema([NO_TASK, *TASKS]))]
"""Type of `dataset.task`. It behaves as a Literal of the string "None" (`NO_TASK`) and the names of all tasks."""


def task_field_text() -> str:
    """Return the description of the field `dataset.task` in the API."""
    graded = ", ".join(f"{task.name} {task.grading}" for task in TASKS.values())
    return f"What grades generated answers: {graded}. {NO_TASK}: only perplexity is measured."


def score_names_text() -> str:
    """Return the description of the API field that holds a score's name. The description lists the names of each task's
    scores."""
    named = [f"{', '.join(task.score_names)} ({task.name})" for task in TASKS.values()]
    return f"Such as {', '.join(named)}."


def main_score_text(task: str, value: float, *, answers: int | None = None) -> str:
    """Return the main score of ``task`` as part of a sentence, for example ``90.0% of 50 answers right``.

    ``value`` is the mean over the graded answers, from 0 to 1. ``answers`` is the number of graded answers. Where
    ``answers`` is None, the text names no number.
    """
    credit = _partial_credit(task)
    if credit is None:
        return f"{value:.1%} of {'the' if answers is None else answers} answers right"
    return f"{credit.name} {value:.1%}" + (f" (mean of {answers} answers)" if answers is not None else "")


def main_score_label(task: str) -> str | None:
    """Return the label under which a table of scores shows the main score of ``task``, for example ``right answers``.

    Returns None where an answer can be partly right for the main score. Tables then show that score only under its own
    name.
    """
    return "right answers" if _partial_credit(task) is None else None


def _partial_credit(task: str) -> Score | None:
    """Return the main score of ``task`` if an answer can be partly right for that score, else None. Also None where
    ``task`` is the value `None` of `dataset.task`."""
    declared = TASKS.get(task)
    if declared is None or declared.main_score.unit is Unit.RIGHT_OR_WRONG:
        return None
    return declared.main_score
