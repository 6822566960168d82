"""The result of grading one answer, and the means over many answers.

Every grader returns a `Grade`; `scorer.py` adds the grades of all ranks up with `ScoreSums`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from finetune_core.tasks import Task, Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """The scores of one answer, made with `Grade.of` or `Grade.left_out`."""

    scores: Mapping[str, bool | float] = field(default_factory=dict)
    """The value of every score of the task, from 0 to 1; True is 1. Empty where the row itself can't be used."""
    problem: str = ""
    """Why the answer could not be read, or why the row was left out. Graders use few different texts, so that equal
    problems can be counted."""

    @classmethod
    def of(cls, task: Task, scores: Mapping[str, bool | float], *, problem: str = "") -> Grade:
        """Return the grade of an answer; a score of ``task`` that ``scores`` does not have is wrong, or 0.

        Raises ValueError for a value that ``task`` does not allow. A score with the unit RIGHT_OR_WRONG needs True or
        False, a score with the unit PARTIAL_CREDIT needs a number from 0 to 1.
        """
        if not scores.keys() <= set(task.score_names):
            raise ValueError(f"{task.name} declares no score {', '.join(scores.keys() - set(task.score_names))}")
        whole: dict[str, bool | float] = {}
        for score in task.scores:
            wrong: bool | float = False if score.unit is Unit.RIGHT_OR_WRONG else 0.0
            value = scores.get(score.name, wrong)
            if isinstance(value, bool) is not isinstance(wrong, bool) or not 0 <= value <= 1:
                raise ValueError(f"{value} is no value of the score {score.name} of {task.name}, a {score.unit}")
            whole[score.name] = value if isinstance(value, bool) else float(value)
        return cls(scores=whole, problem=problem)

    @classmethod
    def left_out(cls, problem: str) -> Grade:
        """Return the grade of an answer whose row can't be used, for example because the reference can't be parsed."""
        return cls(problem=problem)

    @property
    def is_graded(self) -> bool:
        """Return False for an answer that counts neither as right nor as wrong, because the row can't be used."""
        return bool(self.scores)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSums:
    """The grades of many answers as sums, which ranks can add up before the means are taken."""

    graded: int
    """Number of graded answers."""
    sums: Mapping[str, float]
    """Sum of each score over the graded answers; for a score with True and False, the number of right answers."""

    @classmethod
    def of(cls, task: Task, grades: Iterable[Grade]) -> ScoreSums:
        """Return the sums over ``grades``, all of ``task``."""
        graded = [grade for grade in grades if grade.is_graded]
        sums = {name: float(sum(grade.scores[name] for grade in graded)) for name in task.score_names}
        return cls(graded=len(graded), sums=sums)

    @property
    def means(self) -> dict[str, float]:
        """Return the mean of each score over the graded answers; empty where no answer was graded."""
        return {name: total / self.graded for name, total in self.sums.items()} if self.graded else {}

    def as_vector(self) -> list[float]:
        """Return the count and the sums as a list that ranks can add up elementwise."""
        return [self.graded, *self.sums.values()]

    def with_vector(self, vector: Iterable[float]) -> ScoreSums:
        """Return the sums of all ranks: ``vector`` is the elementwise total of every rank's `as_vector`."""
        graded, *sums = vector
        return ScoreSums(graded=int(graded), sums=dict(zip(self.sums, sums, strict=True)))
