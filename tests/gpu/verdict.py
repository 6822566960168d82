"""The verdict of the check: which goals the figures reach, what failed, and the exit status. `__main__.py` prints it.

All functions are pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.gpu.catalogue import Goal
from tests.gpu.report import End, Expectation, Figures, Line, SectionEnd

HIGHEST_STATUS = 125
"""Shells use higher exit statuses for programs that could not be started or that a signal ended."""


class Grade(StrEnum):
    """How a figure stands to its goal."""

    REACHED = "reached"
    MISSED = "missed"
    OPEN = "not judged"
    """The figure was not measured, or on another GPU than the goal is for."""


@dataclass(frozen=True)
class JudgedGoal:
    """A goal with the figure that was found."""

    goal: Goal
    grade: Grade
    figure: float | None
    reason: str = ""
    """Why the goal is not judged."""

    @property
    def bound(self) -> str:
        """The goal as a text, for example `at least 500`."""
        least = self.goal.at_least
        return f"at least {least:,g}" if least is not None else f"at most {self.goal.at_most:,g}"


@dataclass(frozen=True)
class Verdict:
    """What came of the check."""

    ends: Sequence[SectionEnd]
    expectations: Sequence[Expectation]
    goals: Sequence[JudgedGoal]

    @property
    def failures(self) -> list[str]:
        """A sentence for each section that did not end by itself, each expectation that does not hold, and each goal
        that is missed."""
        return [
            *(f"{end.section}: {end.how}: {end.problem}" for end in self.ends if end.how is not End.DONE),
            *(f"{each.section}: does not hold: {each.what}" for each in self.expectations if not each.holds),
            *(
                f"{judged.goal.section}: goal missed: {judged.goal.name}: {judged.figure:,.4g}, {judged.bound}"
                for judged in self.goals
                if judged.grade is Grade.MISSED
            ),
        ]

    @property
    def exit_status(self) -> int:
        """The number of failures, at most HIGHEST_STATUS."""
        return min(len(self.failures), HIGHEST_STATUS)

    def as_values(self) -> Mapping[str, object]:
        """Return the verdict as a mapping for the last JSON line."""
        return {
            "sections": {end.section: end.how.value for end in self.ends},
            "expectations": len(self.expectations),
            "held": sum(each.holds for each in self.expectations),
            "goals": {judged.goal.name: judged.grade.value for judged in self.goals},
            "failures": self.failures,
            "exit_status": self.exit_status,
        }

    def as_table(self) -> str:
        """Return the verdict for people: a row for each section, a row for each goal, and the failures."""
        rows = [("section", "ended", "seconds", "expectations that hold")]
        for end in self.ends:
            own = [each for each in self.expectations if each.section == end.section]
            rows.append(
                (end.section, end.how, f"{end.seconds:.1f}", f"{sum(each.holds for each in own)} of {len(own)}")
            )
        goals = [("goal", "bound", "found", "grade")]
        for judged in self.goals:
            found = f"{judged.figure:,.4g}" if judged.figure is not None else "-"
            grade = f"{judged.grade}: {judged.reason}" if judged.reason else judged.grade
            goals.append((judged.goal.name, judged.bound, found, grade))
        failures = [f"failures: {len(self.failures)}", *(f"  {failure}" for failure in self.failures)]
        return "\n".join([*_aligned(rows), "", *_aligned(goals), "", *failures])


def judge(lines: Sequence[Line], goals: Sequence[Goal], *, dry: bool) -> Verdict:
    """Return the verdict on all ``lines`` of a check."""
    figures = {(line.section, line.case): line.values for line in lines if isinstance(line, Figures)}
    return Verdict(
        ends=[line for line in lines if isinstance(line, SectionEnd)],
        expectations=[line for line in lines if isinstance(line, Expectation)],
        goals=[_judged(goal, figures, dry=dry) for goal in goals],
    )


def _judged(goal: Goal, figures: Mapping[tuple[str, str], Mapping[str, object]], *, dry: bool) -> JudgedGoal:
    values = figures.get((goal.section, goal.case), {})
    figure = values.get(goal.figure)
    if dry:
        return JudgedGoal(goal, Grade.OPEN, None, "a dry run measures nothing")
    if not isinstance(figure, int | float):
        return JudgedGoal(goal, Grade.OPEN, None, "not measured")
    gpu = str(values.get("gpu"))
    if goal.relative_to is not None:
        other = figures.get(goal.relative_to, {}).get(goal.figure)
        if not isinstance(other, int | float):
            return JudgedGoal(goal, Grade.OPEN, None, f"{' '.join(goal.relative_to)} was not measured")
        figure = figure / other
    if goal.gpu not in gpu:
        return JudgedGoal(goal, Grade.OPEN, figure, f"the goal is for {goal.gpu}, and this is {gpu}")
    reached = figure >= goal.at_least if goal.at_least is not None else figure <= (goal.at_most or 0.0)
    return JudgedGoal(goal, Grade.REACHED if reached else Grade.MISSED, figure)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return ``rows`` as lines whose columns begin at the same places."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
