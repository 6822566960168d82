"""The grade of one answer, and the mean scores of many answers.

Every grader returns a `Grade`. `scorer.py` adds up the grades of all ranks with `ScoreSums`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from finetune_core.tasks import Task, Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """The scores of one answer. Graders make a grade with `Grade.of`, or with `Grade.left_out` if the row can't be
    used."""

    scores: Mapping[str, bool | float] = field(default_factory=dict)
    """The value of each score of the task, from 0 to 1, where True counts as 1. Empty if the row can't be used."""
    problem: str = ""
    """Why the answer could not be read, or why the row can't be used. Graders use only a few different texts, so that
    equal problems can be counted."""

    @classmethod
    def of(cls, task: Task, scores: Mapping[str, bool | float], *, problem: str = "") -> Grade:
        """Return the grade of an answer. A score of ``task`` that is not in ``scores`` becomes False, or 0 if the score
        gives partial credit.

        Raises ValueError for a score that ``task`` does not have, and for a value of the wrong kind: scores with the
        unit RIGHT_OR_WRONG are True or False, and scores with the unit PARTIAL_CREDIT are numbers from 0 to 1.
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
        """Return the grade of an answer whose row can't be used, for example because the reference answer can't be
        parsed."""
        return cls(problem=problem)

    @property
    def is_graded(self) -> bool:
        """Whether the answer counts in the scores. False if its row can't be used."""
        return bool(self.scores)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSums:
    """The sums of the scores of many answers. The ranks add their sums up before means are taken."""

    graded: int
    """Number of answers in the sums. Answers whose row can't be used are left out."""
    sums: Mapping[str, float]
    """Sum of each score over the answers. For a right-or-wrong score this is the number of right answers."""

    @classmethod
    def of(cls, task: Task, grades: Iterable[Grade]) -> ScoreSums:
        """Add up ``grades``, which all belong to ``task``."""
        graded = [grade for grade in grades if grade.is_graded]
        sums = {name: float(sum(grade.scores[name] for grade in graded)) for name in task.score_names}
        return cls(graded=len(graded), sums=sums)

    @property
    def means(self) -> dict[str, float]:
        """The mean of each score over the graded answers. Empty if no answer was graded."""
        return {name: total / self.graded for name, total in self.sums.items()} if self.graded else {}

    def as_vector(self) -> list[float]:
        """Return the number of answers and the sums as a list of numbers, which the ranks add up element by element."""
        return [self.graded, *self.sums.values()]

    def with_vector(self, vector: Iterable[float]) -> ScoreSums:
        """Return the sums over all ranks. ``vector`` is the sum of the `as_vector` of every rank, element by
        element."""
        graded, *sums = vector
        return ScoreSums(graded=int(graded), sums=dict(zip(self.sums, sums, strict=True)))
