"""Notices when training goes wrong without an error: a pure function from the losses and gradient norms of all ranks to
alarms, the same on every rank.

It sees the raw all-reduced loss of each global batch and the norm of its gradient before clipping. An alarm compares
the last 8 steps with the 32 before them by robust statistics (median, and a trimmed mean of the differences of
neighbours, which a falling loss does not widen), so that neither one odd batch nor the course of a good run raises one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from finetune_core.contract import ContractModel

RECENT = 8
"""Steps in which a fault must show."""
BASELINE = 32
LEAST_BASELINE = 12
PERSISTENT = 4
"""Of the recent steps so many must stand out: a spike of fewer heals by itself (llm-foundry's KillLossSpike: 4)."""

SPIKE_DEVIATIONS, SPIKE_LEAST = 5.0, math.log(1.25)
DOUBLED, DOUBLED_DEVIATIONS = math.log(2.0), 3.0
"""Twice the rolling loss is too much also for a run whose batches scatter (llm-foundry's threshold), as long as it is
clearly more than that scatter."""
GRADIENT_DEVIATIONS, GRADIENT_LEAST = 8.0, math.log(4.0)
GRADIENT_LOSS_DEVIATIONS = 1.5
"""A large gradient alone is no fault (adapters start with none); with a loss that rises it announces one."""
DRIFT_DEVIATIONS, DRIFT_LEAST = 6.5, math.log(1.15)
DRIFT_BEGINS = 2.0
"""The first of the recent steps that is so many deviations too high is where the drift is said to begin."""
ABOVE_START = math.log(1.5)
ABOVE_BEST = math.log(1.5)
LEAST_DEVIATION = 0.02
"""Of the log of the loss: below it a run is suspiciously smooth, and any wobble would stand out."""
TRIMMED, TRIMMED_MEAN = 0.9, 0.6574
"""The largest tenth of the differences is left out; the mean size of the others for a normal distribution is
2 (phi(0) - phi(1.645)) / 0.9. As robust as is needed here, and less noisy than the median absolute deviation."""
START_STEPS = 3


class AlarmKind(StrEnum):
    """What went wrong."""

    NON_FINITE_LOSS = "NonFiniteLoss"
    NON_FINITE_GRADIENT = "NonFiniteGradient"
    LOSS_SPIKE = "LossSpike"
    GRADIENT_SPIKE = "GradientSpike"
    LOSS_DRIFT = "LossDrift"
    LOSS_ABOVE_START = "LossAboveStart"


NON_FINITE = frozenset({AlarmKind.NON_FINITE_LOSS, AlarmKind.NON_FINITE_GRADIENT})


class Observation(ContractModel):
    """What a step showed; the logs of loss and gradient norm are what is compared."""

    step: int
    log_loss: float
    log_norm: float


class Watch(ContractModel):
    """Everything that the monitor remembers."""

    recent: tuple[Observation, ...] = ()
    """The newest steps, oldest first: at most RECENT + BASELINE."""
    start: tuple[float, ...] = ()
    """Logs of the first losses of the job."""
    best_level: float | None = None
    """Least median of the log-loss over a full baseline so far."""
    quiet_until: int = 0
    """After an alarm nothing is said until its steps have left the recent ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """Something is wrong since step ``first``, noticed at ``step``."""

    kind: AlarmKind
    step: int
    first: int
    value: float
    threshold: float

    def describe(self) -> str:
        """Return the sentence for people."""
        what = {
            AlarmKind.NON_FINITE_LOSS: "the loss is not a finite number",
            AlarmKind.NON_FINITE_GRADIENT: "the gradient is not finite",
            AlarmKind.LOSS_SPIKE: f"the loss jumped to {self.value:.4g}, above {self.threshold:.4g}",
            AlarmKind.GRADIENT_SPIKE: f"the gradient norm jumped to {self.value:.4g}, above {self.threshold:.4g}, and"
            " the loss rises",
            AlarmKind.LOSS_DRIFT: f"the loss rises: {self.value:.4g} on average, above {self.threshold:.4g}",
            AlarmKind.LOSS_ABOVE_START: f"the loss is {self.value:.4g}, above {self.threshold:.4g}, half more than at"
            " the start",
        }[self.kind]
        since = f" since step {self.first}" if self.first != self.step else ""
        return f"step {self.step}: {what}{since}"


def non_finite(step: int, loss: float, norm: float) -> Alarm | None:
    """Return the alarm of a step whose loss or gradient is not finite: its update must not be applied."""
    if not math.isfinite(loss):
        return Alarm(kind=AlarmKind.NON_FINITE_LOSS, step=step, first=step, value=loss, threshold=math.inf)
    if not math.isfinite(norm):
        return Alarm(kind=AlarmKind.NON_FINITE_GRADIENT, step=step, first=step, value=norm, threshold=math.inf)
    return None


def observe(watch: Watch, step: int, loss: float, norm: float) -> tuple[Watch, Alarm | None]:
    """Return what is remembered after a finite step, and the alarm that it completes."""
    seen = Observation(step=step, log_loss=_log(loss), log_norm=_log(norm))
    steps = (*watch.recent, seen)[-(RECENT + BASELINE) :]
    start = watch.start if len(watch.start) >= START_STEPS else (*watch.start, seen.log_loss)
    baseline = [item.log_loss for item in steps[:-RECENT]]
    level = median(baseline) if len(baseline) == BASELINE else None
    best = min((value for value in (watch.best_level, level) if value is not None), default=None)
    now = watch.model_copy(update={"recent": steps, "start": start, "best_level": best})
    if step < watch.quiet_until:
        return now, None
    alarm = _alarm(now)
    return (now.model_copy(update={"quiet_until": step + RECENT}) if alarm else now), alarm


def replay(rows: Iterable[tuple[int, float | None, float | None]]) -> Watch:
    """Return what is remembered after ``rows`` of step, loss and gradient norm; those without values don't count."""
    watch = Watch()
    for step, loss, norm in rows:
        if loss is not None and norm is not None and math.isfinite(loss) and math.isfinite(norm):
            watch, _ = observe(watch, step, loss, norm)
    return watch.model_copy(update={"quiet_until": 0})


def _alarm(watch: Watch) -> Alarm | None:
    recent, baseline = watch.recent[-RECENT:], watch.recent[:-RECENT]
    above = _above_start(watch, recent)
    if above is not None or len(baseline) < LEAST_BASELINE:
        return above
    losses, norms = [item.log_loss for item in baseline], [item.log_norm for item in baseline]
    level, spread = median(losses), _deviation(losses)
    limit = level + min(max(SPIKE_DEVIATIONS * spread, SPIKE_LEAST), max(DOUBLED, DOUBLED_DEVIATIONS * spread))
    high = [item for item in recent if item.log_loss > limit]
    if len(high) >= PERSISTENT and high[-1] is recent[-1]:
        return _made(AlarmKind.LOSS_SPIKE, recent, high[0].step, high[-1].log_loss, limit)
    norm_limit = median(norms) + max(GRADIENT_DEVIATIONS * _deviation(norms), GRADIENT_LEAST)
    steep = [item for item in recent if item.log_norm > norm_limit]
    # Without the highest and the lowest, so that one odd batch moves nothing.
    middle = sorted(item.log_loss for item in recent)[1:-1]
    mean = sum(middle) / len(middle)
    if len(steep) >= PERSISTENT and steep[-1] is recent[-1] and mean > level + GRADIENT_LOSS_DEVIATIONS * spread:
        return _made(AlarmKind.GRADIENT_SPIKE, recent, steep[0].step, steep[-1].log_norm, norm_limit)
    # The mean of n steps scatters less than one step by the root of n.
    drift_limit = level + max(DRIFT_DEVIATIONS * spread / math.sqrt(len(middle)), DRIFT_LEAST)
    if watch.best_level is not None:
        drift_limit = min(drift_limit, watch.best_level + max(ABOVE_BEST, DRIFT_DEVIATIONS * spread))
    if mean <= drift_limit:
        return None
    first = next((item for item in recent if item.log_loss > level + DRIFT_BEGINS * spread), recent[0])
    return _made(AlarmKind.LOSS_DRIFT, recent, first.step, mean, drift_limit)


def _above_start(watch: Watch, recent: Sequence[Observation]) -> Alarm | None:
    """A rate that is far too high shows before there is anything to compare with but the start."""
    if len(watch.start) < START_STEPS:
        return None
    limit = median(watch.start) + ABOVE_START
    high = [item for item in recent if item.log_loss > limit]
    if len(high) < PERSISTENT or high[-1] is not recent[-1]:
        return None
    return _made(AlarmKind.LOSS_ABOVE_START, recent, high[0].step, high[-1].log_loss, limit)


def _made(kind: AlarmKind, recent: Sequence[Observation], first: int, value: float, threshold: float) -> Alarm:
    return Alarm(kind=kind, step=recent[-1].step, first=first, value=math.exp(value), threshold=math.exp(threshold))


def _deviation(values: Sequence[float]) -> float:
    """Return the robust standard deviation of one value around a slow course, from the differences of neighbours."""
    differences = sorted(abs(after - before) for before, after in itertools.pairwise(values))
    kept = differences[: math.ceil(TRIMMED * len(differences))]
    # The difference of two values scatters more than one of them by the root of 2.
    return max(sum(kept) / len(kept) / TRIMMED_MEAN / math.sqrt(2.0), LEAST_DEVIATION)


def _log(value: float) -> float:
    """Return the logarithm of a loss or a norm; a perfect fit has neither, and is as good as very small."""
    return math.log(max(value, 1e-12))
