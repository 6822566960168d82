"""Judges whether the tuned model reached the scores of `evaluation.require`.

The functions are pure. The trainer derives the job's outcome from the judgements, and the operator shows the judgements
in the status. A judgement depends only on the requirements and the scores. So a later job with other requirements can
judge the scores of a finished run anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from finetune_core.api.evaluation import LOWER_IS_BETTER, RequirementSpec
from finetune_core.contract.records import EvaluationRecord
from finetune_core.contract.result import Outcome, Result


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether the tuned model reached a required score."""

    requirement: RequirementSpec
    base: float | None
    """Score of the base model. None where this score was not measured."""
    tuned: float | None
    """Score of the tuned model. None where this score was not measured."""
    problem: str
    """Why the score was not reached, for example `exact must be at least 0.8 and is 0.75`. Empty where it was
    reached."""

    @property
    def passed(self) -> bool:
        """Whether the score was reached."""
        return not self.problem

    @property
    def difference(self) -> float | None:
        """Score of the tuned model minus the score of the base model. None where one of the two scores was not
        measured."""
        return None if self.base is None or self.tuned is None else self.tuned - self.base


def judge(requirements: Sequence[RequirementSpec] | None, evaluation: EvaluationRecord | None) -> list[Judgement]:
    """Return the judgement of each of ``requirements``.

    Scores are rounded to six significant digits before they are compared, because results and the status contain no
    more digits. A score that was not measured is not reached.
    """
    rounded = evaluation.rounded() if evaluation is not None else None
    found = []
    for requirement in requirements or ():
        base, tuned = (
            record.value_of(requirement.score) if record is not None else None
            for record in ((rounded.base, rounded.tuned) if rounded is not None else (None, None))
        )
        found.append(Judgement(requirement, base, tuned, _problem(requirement, base, tuned)))
    return found


def judged(result: Result, requirements: Sequence[RequirementSpec] | None) -> Result:
    """Return ``result`` unchanged where it names no committed artifact, or where the tuned model reached all of
    ``requirements``. Otherwise return ``result`` with the outcome GateFailed, and with a message that begins with the
    scores that were not reached."""
    failed = [judgement.problem for judgement in judge(requirements, result.evaluation) if not judgement.passed]
    if not failed or result.artifact is None:
        return result
    message = f"evaluation.require: {'; '.join(failed)}; {result.message}"
    return result.model_copy(update={"outcome": Outcome.GATE_FAILED, "message": message})


def _problem(requirement: RequirementSpec, base: float | None, tuned: float | None) -> str:
    name = requirement.score
    if tuned is None:
        return f"{name} was not measured"
    value, problems = Decimal(repr(tuned)), []
    if requirement.at_least is not None and value < Decimal(requirement.at_least):
        problems.append(f"must be at least {requirement.at_least}")
    if requirement.at_most is not None and value > Decimal(requirement.at_most):
        problems.append(f"must be at most {requirement.at_most}")
    if requirement.better_than_base:
        if base is None:
            problems.append("must be better than the base model's, which was not measured,")
        elif not (tuned < base if name in LOWER_IS_BETTER else tuned > base):
            problems.append(f"must be better than the base model's {base:.6g}")
    return f"{name} {' and '.join(problems)} and is {tuned:.6g}" if problems else ""
