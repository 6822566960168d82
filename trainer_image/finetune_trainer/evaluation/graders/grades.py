"""What a grader says about one answer, and what all grades of a set of examples add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """The named scores of one answer; without any where the gold row itself can't be graded against."""

    scores: Mapping[str, bool] = field(default_factory=dict)
    problem: str = ""
    """Why nothing could be scored, or why the answer could not be read; few different texts, so that they count."""

    @property
    def gradable(self) -> bool:
        """False where the fault is the gold row's: such an example counts neither as right nor as wrong."""
        return bool(self.scores)


def graded(names: Sequence[str], *, right: Iterable[str] = (), problem: str = "") -> Grade:
    """Return a grade with every score of a task, those in ``right`` true."""
    chosen = frozenset(right)
    return Grade(scores={name: name in chosen for name in names}, problem=problem)


def ungradable(problem: str) -> Grade:
    """Return the grade of an example whose gold row is at fault."""
    return Grade(problem=problem)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Grades of a set of examples as counts: shares are made of counts at the end, so parts can be added up."""

    total: int
    graded: int
    right: Mapping[str, int]
    """Examples with this score, of ``graded``."""
    ungradable: Mapping[str, int]
    """Examples left out, by reason."""
    unreadable: Mapping[str, int]
    """Graded examples whose answer could not be read or run, by reason; they are wrong, and counted in ``graded``."""

    def share(self, score: str) -> float | None:
        """Return the share of right answers among the graded ones, None where nothing was graded.

        Raises KeyError for a name that the task has not, if anything was graded.
        """
        return self.right[score] / self.graded if self.graded else None

    def __add__(self, other: Summary) -> Summary:
        """Return the summary of both sets together, for example of two ranks."""
        return Summary(
            total=self.total + other.total,
            graded=self.graded + other.graded,
            right=_added(self.right, other.right),
            ungradable=_added(self.ungradable, other.ungradable),
            unreadable=_added(self.unreadable, other.unreadable),
        )


def summarise(grades: Iterable[Grade]) -> Summary:
    """Return the counts over the grades of one task."""
    total = counted = 0
    right: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    unreadable: Counter[str] = Counter()
    for grade in grades:
        total += 1
        if not grade.gradable:
            left_out[grade.problem] += 1
            continue
        counted += 1
        for name, value in grade.scores.items():
            right[name] = right.get(name, 0) + value
        if grade.problem:
            unreadable[grade.problem] += 1
    return Summary(total=total, graded=counted, right=right, ungradable=dict(left_out), unreadable=dict(unreadable))


def _added(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return {name: left.get(name, 0) + right.get(name, 0) for name in [*left, *(n for n in right if n not in left)]}
