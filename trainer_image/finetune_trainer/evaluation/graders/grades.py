"""The grade of one answer, and the scores over many answers.

Every grader returns a `Grade`. `scorer.py` joins the grades of all ranks with `GradeList`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_core.task_declaration import UNGRADED_LIMIT, UNGRADED_REASON_LENGTH, Task, Unit

OTHER_REASONS = "other reasons"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """The scores of one answer. Graders make a grade with `Grade.of`, or with `Grade.left_out` if the row can't be
    used."""

    scores: Mapping[str, bool | float] = field(default_factory=dict)
    """The value of each score of the task, where True counts as 1. Empty if the row can't be used."""
    problem: str = ""
    """Why the answer could not be read, or why the row can't be used. Graders use only a few different texts, so that
    equal problems can be counted."""

    @classmethod
    def of(cls, task: Task, scores: Mapping[str, bool | float], *, problem: str = "") -> Grade:
        """Return the grade of an answer. A score of ``task`` that is not in ``scores`` becomes False, or 0 if the score
        has another unit than RIGHT_OR_WRONG.

        Raises ValueError for a score that ``task`` does not have, and for a value of the wrong kind: scores with the
        unit RIGHT_OR_WRONG are True or False, scores with the unit PARTIAL_CREDIT are numbers from 0 to 1, and scores
        with the unit VALUE are finite numbers.
        """
        if not scores.keys() <= set(task.score_names):
            raise ValueError(f"{task.name} declares no score {', '.join(scores.keys() - set(task.score_names))}")
        whole: dict[str, bool | float] = {}
        for score in task.scores:
            wrong: bool | float = False if score.unit is Unit.RIGHT_OR_WRONG else 0.0
            value = scores.get(score.name, wrong)
            is_allowed = math.isfinite(value) if score.unit is Unit.VALUE else 0 <= value <= 1
            if isinstance(value, bool) is not isinstance(wrong, bool) or not is_allowed:
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
class GradeList:
    """The values of the scores of many answers, and why answers were left out. The ranks join their lists before the
    reported values are computed, so that no value depends on the number of ranks."""

    values: Mapping[str, Sequence[float]]
    """For each score of the task its values for the graded answers. All lists have the same length."""
    reasons: Mapping[str, int]
    """For each reason, the number of answers that were left out."""

    @classmethod
    def of(cls, task: Task, grades: Iterable[Grade]) -> GradeList:
        """Return the list of the values and reasons in ``grades``, which all belong to ``task``."""
        every = list(grades)
        graded = [grade for grade in every if grade.is_graded]
        return cls(
            values={name: [float(grade.scores[name]) for grade in graded] for name in task.score_names},
            reasons=Counter(grade.problem[:UNGRADED_REASON_LENGTH] for grade in every if not grade.is_graded),
        )

    @classmethod
    def joined(cls, task: Task, lists: Iterable[GradeList]) -> GradeList:
        """Return one list with the values and reasons of all ``lists``, which several ranks made."""
        every = list(lists)
        reasons: Counter[str] = Counter()
        for part in every:
            reasons.update(part.reasons)
        values = {name: [value for part in every for value in part.values[name]] for name in task.score_names}
        return cls(values=values, reasons=reasons)

    def to_json(self) -> object:
        """Return the list as a value that JSON can hold."""
        return {"values": {name: list(values) for name, values in self.values.items()}, "reasons": dict(self.reasons)}

    @classmethod
    def from_json(cls, value: Any) -> GradeList:
        """Return the list from which `to_json` made ``value``."""
        return cls(values=value["values"], reasons=value["reasons"])

    @property
    def graded(self) -> int:
        """Number of graded answers."""
        return len(next(iter(self.values.values()), ()))

    @property
    def not_graded(self) -> int:
        """Number of answers that were left out."""
        return sum(self.reasons.values())

    def reported(self, task: Task) -> dict[str, float]:
        """Return for each score the mean of its values for the graded answers, or the other aggregation that ``task``
        declares for the score. Empty if no answer was graded."""
        return {score.name: score.aggregation.of(self.values[score.name]) for score in task.scores if self.graded}

    @property
    def main_reasons(self) -> dict[str, int]:
        """Number of answers that were left out, by the reason, the most frequent reasons first. If there are more than
        UNGRADED_LIMIT reasons, the last entry counts the answers of all remaining reasons."""
        ordered = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        if len(ordered) <= UNGRADED_LIMIT:
            return dict(ordered)
        shown = {reason: count for reason, count in ordered[: UNGRADED_LIMIT - 1] if reason != OTHER_REASONS}
        return shown | {OTHER_REASONS: self.not_graded - sum(shown.values())}
