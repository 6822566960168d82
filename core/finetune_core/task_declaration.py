"""The parts of a task's declaration: the columns that its grader reads, its scores, and how the scores of single
answers become one value.

`tasks.py` declares the tasks of this project with these classes. An own grader, which an entry point of the trainer
image names, declares its task with the same classes.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from math import fsum
from typing import Annotated

from pydantic import Field

SCORE_LIMIT = 8
"""Largest number of scores of a task. Lists of scores in `status.evaluation` and in the reports have this bound too."""
SCORE_NAME_LENGTH = 32
"""Largest number of characters of a score's name."""
COLUMN_LIMIT = 8
"""Largest number of columns that a grader reads."""

UNGRADED_LIMIT = 4
"""Largest number of reasons that an evaluation reports for answers that could not be graded."""
UNGRADED_REASON_LENGTH = 160
"""Largest number of characters of a reason why an answer could not be graded."""

PERPLEXITY = "perplexity"
"""Name in `evaluation.require` of the perplexity over the supervised tokens, whose loss training minimises."""
ALL_TOKEN_PERPLEXITY = "allTokenPerplexity"  # noqa: S105  (a score, not a secret)
"""Name in `evaluation.require` of the perplexity over all tokens of prompts and completions."""
ALL_TOKENS_LABEL = "perplexity of all tokens"
"""What people read in place of `ALL_TOKEN_PERPLEXITY`."""
ALL_TOKENS_MEANING = (
    "The perplexity of all tokens counts the prompts too, and may rise where a job learns only the answers."
)
"""What `finetune watch` and the model card say about this score, because people take a rise for a fault."""
MEASURED = (PERPLEXITY, ALL_TOKEN_PERPLEXITY)
"""Names of the values that are measured for every model, even without a task. No score of a task may have one of these
names."""

_SCORE_NAME = re.compile(r"[A-Za-z0-9_.-]+")

ScoreName = Annotated[str, Field(max_length=SCORE_NAME_LENGTH)]


class Unit(StrEnum):
    """What kind of value a score has for one answer. The texts of RIGHT_OR_WRONG and PARTIAL_CREDIT say what the mean
    of these values is. docs/tasks.md shows the text for a score whose aggregation is the mean."""

    RIGHT_OR_WRONG = "share of right answers"
    """The grader returns True or False, so that the mean is the share of right answers."""
    PARTIAL_CREDIT = "mean over the answers"
    """The grader returns a number from 0 to 1, for example the share of words that are right."""
    VALUE = "value"
    """The grader returns any finite number, for example a length or a reward. docs/tasks.md shows the aggregation for
    such a score, for example "mean over the answers"."""


class Aggregation(StrEnum):
    """How the values of a score for all graded answers become the value that is reported."""

    MEAN = "Mean"
    MEDIAN = "Median"
    MINIMUM = "Minimum"
    MAXIMUM = "Maximum"

    def of(self, values: Sequence[float]) -> float:
        """Return the reported value for ``values``, which are one or more finite numbers. The result is finite too. The
        order of ``values`` makes no difference."""
        match self:
            case Aggregation.MEAN:
                return _mean(values)
            case Aggregation.MEDIAN:
                return _mean([statistics.median_low(values), statistics.median_high(values)])
            case Aggregation.MINIMUM:
                return min(values)
            case Aggregation.MAXIMUM:
                return max(values)


def _mean(values: Sequence[float]) -> float:
    try:
        return fsum(values) / len(values)
    except OverflowError:  # the sum, or a part of it, is out of the range of floats
        return float(sum(map(Fraction, values)) / len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One of the scores that a task's grader gives to every answer. A higher value is better.

    `unit` and `aggregation` may also be given as texts, which are the values of the enums. Raises ValueError for other
    texts.
    """

    name: str
    """Name in camelCase as the status and the CLI show it, for example ``orderFree``."""
    meaning: str = ""
    """Text for docs/tasks.md that says when an answer gets the score, or what the score is a share of."""
    unit: Unit = Unit.RIGHT_OR_WRONG
    aggregation: Aggregation = Aggregation.MEAN
    """How the values of the graded answers become the reported value."""

    def __post_init__(self) -> None:
        # The class is frozen, so only `object.__setattr__` can replace a text by the member of the enum.
        object.__setattr__(self, "unit", Unit(self.unit))
        object.__setattr__(self, "aggregation", Aggregation(self.aggregation))

    @property
    def reported(self) -> str:
        """What the reported value is, as docs/tasks.md shows it, for example ``share of right answers``."""
        if self.aggregation is Aggregation.MEAN and self.unit is not Unit.VALUE:
            return str(self.unit)
        return f"{self.aggregation.lower()} over the answers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the evaluation set that a grader reads, in addition to the generated answer."""

    name: str
    """Name under which the grader reads the column, for example ``mr``. In `dataset.task.fields` this name is the key
    of the column."""
    meaning: str = ""
    """Sentence that says what the column must hold."""
    example: object = ""
    """A value of the column, shown in docs/tasks.md."""
    is_completion: bool = False
    """Whether the column holds the right answer. Where `dataset.task.fields` has no entry for such a column, the grader
    reads the completion of `dataset.format`: the column that `completionField` names, or the text of the template
    `completion`. Where `dataset.task.fields` has no entry for a column of another kind, the grader reads the column of
    the rows that is called ``name``."""
    optional: bool = False
    """Whether rows may lack the column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The declaration of a task. Raises ValueError where there are no scores or too many, or too many columns. Raises
    ValueError also where the name of a score is empty or too long, has a forbidden character, is one of `MEASURED` or
    is used twice, where a column's name is used twice, and where `main` is not the name of a score."""

    name: str
    """Value of `dataset.task.name`, for example ``GSM8K``; for an own grader the name of its entry point."""
    grading: str = ""
    """Verb and object of a sentence whose subject is the task's name, for example ``runs the query``. The description
    of the field `dataset.task.name` contains the sentence."""
    description: str = ""
    """Sentences for docs/tasks.md: what the prompt asks for, which answers count as right, and which rows are left
    out."""
    columns: tuple[Column, ...] = ()
    scores: tuple[Score, ...]
    main: str
    """Name of the score that the field `taskScore` shows and that `evaluation.bestBy: TaskScore` compares."""
    example_answer: str = ""
    """An answer to the row that is made of the `example` of each column. The grader gives this answer the highest value
    of every score."""
    example_arguments: Mapping[str, object] | None = None
    """Arguments with which the grader grades the example, by the names of the fields of `dataset.task`. None where the
    example needs no arguments."""
    arguments: tuple[str, ...] = ()
    """Names of the fields of `dataset.task`, in camelCase, that a job with this task may set in addition to the fields
    that all tasks have."""
    required_arguments: tuple[str, ...] = ()
    """Those of `arguments` that a job must set."""
    one_line: bool = False
    """Whether every right answer is one line. Then only the first line of the base model's answer counts, because a
    base model often goes on with another example behind its answer. A job can decide otherwise with
    `dataset.task.oneLine`."""

    def __post_init__(self) -> None:
        names = self.score_names
        if not 1 <= len(names) <= SCORE_LIMIT or len(set(names)) < len(names):
            raise ValueError(f"{self.name}: a task must have 1 to {SCORE_LIMIT} scores of different names")
        if any(len(name) > SCORE_NAME_LENGTH or not _SCORE_NAME.fullmatch(name) for name in names):
            raise ValueError(
                f"{self.name}: the name of a score must have at most {SCORE_NAME_LENGTH} characters, which are letters,"
                " digits, -, _ and ."
            )
        if self.main not in names:
            raise ValueError(f"{self.name}: `main` must name one of the scores, and {self.main} is none of them")
        if taken := set(names).intersection(MEASURED):
            raise ValueError(f"{self.name}: no score may be called {min(taken)}, which is measured for every model")
        columns = [column.name for column in self.columns]
        if len(columns) > COLUMN_LIMIT or len(set(columns)) < len(columns):
            raise ValueError(f"{self.name}: a task must have at most {COLUMN_LIMIT} columns of different names")

    @property
    def score_names(self) -> tuple[str, ...]:
        """Return the names of the scores in the order in which they are reported."""
        return tuple(score.name for score in self.scores)

    @property
    def main_score(self) -> Score:
        """Return the score that `main` names. Callers use this score where only one number can be shown or compared."""
        return next(score for score in self.scores if score.name == self.main)

    def columns_of_rows(self, fields: Mapping[str, str], completion: str | None) -> dict[str, str]:
        """Return for each column that the grader reads, by the grader's own name, the column of the rows that holds it.

        ``fields`` is `dataset.task.fields`, and ``completion`` is the column that holds the completion. It is None
        where a template makes the completion of several columns, or of a column and other text. The grader's columns
        that get this completion are then not in the result. An optional column is in the result even where the rows
        lack it.
        """
        found = {
            column.name: fields.get(column.name, completion if column.is_completion else column.name)
            for column in self.columns
        }
        return {name: column for name, column in found.items() if column is not None}
