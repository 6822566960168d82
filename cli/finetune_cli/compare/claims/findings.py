"""What a check of a claim gets and returns: the compared runs with their figures, and a finding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from finetune_cli.compare.compared_run import ComparedRun, Tuning
from finetune_cli.compare.figures import Figures, Point, figures_of, is_unstable, points_of
from finetune_cli.compare.intervals import Difference

RATE_TOLERANCE = 0.05
"""Two learning rates count as equal where they differ by at most this share."""
MOST_SENTENCES = 12
"""Most sentences of evidence that a finding shows."""


class Verdict(StrEnum):
    """What the compared runs say about a claim."""

    SEEN = "seen here"
    NOT_SEEN = "not seen here"
    NOT_TESTED = "not tested"


@dataclass(frozen=True, slots=True)
class Finding:
    """What the compared runs say about one claim."""

    verdict: Verdict
    evidence: tuple[str, ...] = ()
    """Sentences with the figures."""
    to_test: str = ""
    """What to run to test the claim, or the rest of it. Empty where nothing is left to test."""


@dataclass(frozen=True, slots=True)
class FiguredRun:
    """A run with its figures."""

    run: ComparedRun
    figures: Figures
    points: tuple[Point, ...]
    """The steps of the run on the axes of the curves. They are computed once, because a run may have many steps."""

    @property
    def label(self) -> str:
        """The name of the run."""
        return self.run.label

    @property
    def rate(self) -> float | None:
        """The peak learning rate of the job, None where its settings are not known."""
        return self.run.number("optimization.learningRate")

    @property
    def unstable(self) -> bool:
        """Whether the training was unstable."""
        return is_unstable(self.run, self.figures)

    @property
    def stability(self) -> str:
        """How stable the training was, as the end of a sentence."""
        found = []
        if self.figures.not_finite:
            found.append(f"{self.figures.not_finite} steps were not finite")
        if self.run.training.rollbacks:
            count = len(self.run.training.rollbacks)
            found.append(f"{count} rollback{'s' if count > 1 else ''}")
        if (explosion := self.figures.explosion) is not None:
            found.append(f"the loss rose from {explosion.before:.4g} to {explosion.level:.4g} at step {explosion.step}")
        return "unstable: " + ", ".join(found) if found else "stable"


@dataclass(frozen=True, slots=True)
class Comparison:
    """All runs of a comparison, in the order in which the command names them."""

    runs: tuple[FiguredRun, ...]

    @classmethod
    def of(cls, runs: Iterable[ComparedRun], price: float | None = None) -> Comparison:
        """Return the comparison of ``runs``. ``price`` is that of one GPU for one hour."""
        return cls(tuple(FiguredRun(run, figures_of(run, price), tuple(points_of(run))) for run in runs))

    def tuned_by(self, tuning: Tuning) -> list[FiguredRun]:
        """Return the runs of one method."""
        return [item for item in self.runs if item.run.tuning is tuning]

    def pairs(self) -> Iterator[tuple[FiguredRun, FiguredRun]]:
        """Yield each LoRA run with each run that trained every parameter of the same base model on the same rows."""
        for lora in self.tuned_by(Tuning.LORA):
            for full in self.tuned_by(Tuning.FULL):
                if same_inputs(lora.run, full.run):
                    yield lora, full


Check = Callable[[Comparison], Finding]


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of the study."""

    number: int
    """Number of the claim in the table of the study's claims."""
    title: str
    sentence: str
    check: Check


def same_inputs(first: ComparedRun, second: ComparedRun) -> bool:
    """Return whether both runs began with the same base model and the same training rows, as far as is known."""
    names = ("model", "dataset.train")
    return all(first.inputs.get(name) == second.inputs.get(name) is not None for name in names)


def has_rate(item: FiguredRun, rate: float) -> bool:
    """Return whether the learning rate of a run is ``rate``."""
    return item.rate is not None and math.isclose(item.rate, rate, rel_tol=RATE_TOLERANCE)


def percent(share: float) -> str:
    """Return ``share`` in percent."""
    return f"{share:.1%}"


def points(difference: Difference) -> str:
    """Return a difference of scores with its interval, for example `+40.0 points (95 % interval 35.1 to 44.2, paired
    over 500 rows)`."""
    interval = difference.interval
    kind = f"paired over {difference.rows} rows" if difference.paired else f"unpaired, {difference.rows} rows"
    chance = f", p {difference.p_value:.2g}" if difference.p_value is not None else ""
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.value:+.1f} points (95 % interval {low:.1f} to {high:.1f}, {kind}{chance})"


def by_pairs(
    comparison: Comparison, judge: Callable[[FiguredRun, FiguredRun], tuple[bool, str] | None], to_test: str
) -> Finding:
    """Return the finding over all pairs of a LoRA run and a run of every parameter. ``judge`` says of a pair whether
    the claim holds, and the evidence; None where the pair says nothing. The claim is seen where it holds in most
    pairs."""
    judged = [found for pair in comparison.pairs() if (found := judge(*pair)) is not None]
    if not judged:
        return Finding(Verdict.NOT_TESTED, to_test=to_test)
    held = sum(holds for holds, _ in judged)
    is_seen = 2 * held > len(judged)
    # The pairs that decide come first.
    evidence = [sentence for _, sentence in sorted(judged, key=lambda item: item[0] is not is_seen)]
    if len(judged) > 1:
        evidence = [*evidence[: MOST_SENTENCES - 1], f"It holds in {held} of {len(judged)} pairs."]
    return Finding(Verdict.SEEN if is_seen else Verdict.NOT_SEEN, tuple(evidence))
