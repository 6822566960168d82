"""The stability monitor: raises an alarm when training goes wrong without an error.

If the job sets `stability.onExplodingLoss`, `loop.py` calls `observe` after every step whose loss and gradient are
finite. The monitor is a pure function of the losses and gradient norms over all ranks, so every rank has the same
alarms. The input of the monitor is the loss of each global batch and the norm of the gradient before clipping. The
monitor compares the last 8 steps with the 32 steps before them (the baseline) by robust statistics: the median, and a
trimmed mean of the differences between neighbouring steps. One odd batch hardly changes these statistics, and the
slowly falling loss of a normal run hardly changes them either. So neither an odd batch nor a falling loss raises an
alarm.
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
"""Number of newest steps that are compared with the steps before them. A fault raises an alarm only while these steps
show it."""
BASELINE = 32
MIN_BASELINE = 12
"""The recent steps are compared with the BASELINE steps before them, or with fewer in a young run, but never with fewer
than MIN_BASELINE."""
PERSISTENT = 4
"""How many of the recent steps, at least, must lie above the limit for an alarm. The newest step must be one of them.
A shorter spike usually passes by itself (KillLossSpike of llm-foundry also waits for 4 steps). The alarm for a drift
does not need this number, because a drift is found in the mean of the recent steps."""

SPIKE_DEVIATIONS, SPIKE_MIN_RISE = 5.0, math.log(1.25)
"""A step is a spike if the logarithm of its loss lies above the median of the baseline by more than SPIKE_DEVIATIONS
standard deviations, and by more than SPIKE_MIN_RISE. A step that meets the condition of DOUBLED is a spike too."""
DOUBLED, DOUBLED_DEVIATIONS = math.log(2.0), 3.0
"""A step is also a spike if its loss is more than twice the median loss of the baseline (the threshold of llm-foundry),
and if the logarithm of its loss lies above the median by more than DOUBLED_DEVIATIONS standard deviations. In a run
with noisy batches this limit is lower than SPIKE_DEVIATIONS standard deviations."""
GRADIENT_DEVIATIONS, GRADIENT_MIN_RISE = 8.0, math.log(4.0)
"""For a gradient alarm, the logarithm of the gradient norm must lie above the median of the baseline by more than
GRADIENT_DEVIATIONS standard deviations, and by more than GRADIENT_MIN_RISE."""
GRADIENT_LOSS_DEVIATIONS = 1.5
"""For a gradient alarm the mean log-loss of the recent steps must lie above the median of the baseline too, by more
than this number of standard deviations. A large gradient alone is no fault: the gradient of a LoRA adapter is small at
first and then grows."""
DRIFT_DEVIATIONS, DRIFT_MIN_RISE = 6.5, math.log(1.15)
"""The recent steps are a drift, which raises an alarm, if their mean log-loss (without the highest and the lowest) lies
above the median of the baseline by more than DRIFT_DEVIATIONS standard deviations of this mean, and by more than
DRIFT_MIN_RISE. A mean above the limit of ABOVE_BEST is a drift too."""
DRIFT_BEGINS = 2.0
"""A drift is reported to begin at the first recent step whose log-loss lies more than this number of standard
deviations above the median of the baseline, or at the oldest recent step where no step lies so high."""
ABOVE_START = math.log(1.5)
"""How far the log-loss may lie above the median log-loss of the first steps without an alarm: the loss may be 1.5 times
as large."""
ABOVE_BEST = math.log(1.5)
"""How far the mean log-loss of the recent steps may lie above the lowest median of any full baseline so far without an
alarm: the loss may be 1.5 times as large. In noisy runs DRIFT_DEVIATIONS standard deviations can be more than this, and
are the limit then."""
MIN_DEVIATION = 0.02
"""Smallest standard deviation that is assumed for the logarithms of losses and of gradient norms. In an unusually
smooth run any small change would otherwise stand out."""
TRIMMED, TRIMMED_MEAN = 0.9, 0.6574
"""The share of the differences between neighbouring steps that is kept, and the mean size of the kept differences if
all differences are normally distributed with standard deviation 1. The largest tenth of the differences is left out.
With the normal density phi the mean size is 2 (phi(0) - phi(1.645)) / 0.9, by which `_deviation` divides. Its estimate
is robust enough here, and less noisy than the median absolute deviation."""
START_STEPS = 3
"""Number of the job's first steps. The median of their log-losses is the level that ABOVE_START refers to."""


class AlarmKind(StrEnum):
    """Kinds of alarms, as they appear in `status.incidents`."""

    NON_FINITE_LOSS = "NonFiniteLoss"
    NON_FINITE_GRADIENT = "NonFiniteGradient"
    LOSS_SPIKE = "LossSpike"
    GRADIENT_SPIKE = "GradientSpike"
    LOSS_DRIFT = "LossDrift"
    LOSS_ABOVE_START = "LossAboveStart"


NON_FINITE = frozenset({AlarmKind.NON_FINITE_LOSS, AlarmKind.NON_FINITE_GRADIENT})


class Observation(ContractModel):
    """The logarithms of loss and gradient norm of one step."""

    step: int
    log_loss: float
    log_norm: float


class MonitorState(ContractModel):
    """Everything that the monitor remembers between two steps."""

    recent: tuple[Observation, ...] = ()
    """The newest steps, oldest first: at most RECENT + BASELINE."""
    start: tuple[float, ...] = ()
    """Logarithms of the losses of the job's first steps."""
    best_level: float | None = None
    """The lowest median of the log-loss over a full baseline so far, None before the first full baseline."""
    muted_until_step: int = 0
    """No alarm about finite losses and gradients is raised before this step, so that the steps of one fault raise only
    one alarm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """Training has gone wrong since step ``first``, and the monitor noticed it at ``step``."""

    kind: AlarmKind
    step: int
    first: int
    value: float
    """The loss or gradient norm that stands out. In the alarm for a drift, the geometric mean of the recent losses
    without the highest and the lowest."""
    threshold: float
    """The largest value that would not have raised the alarm. Infinity in the alarm about a loss or a gradient that is
    not finite."""

    def describe(self) -> str:
        """Return the alarm as a sentence for people."""
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


def non_finite_alarm(step: int, loss: float, norm: float) -> Alarm | None:
    """Return the alarm of a step whose loss or gradient is not finite, else None. The update of such a step must not be
    applied."""
    if not math.isfinite(loss):
        return Alarm(kind=AlarmKind.NON_FINITE_LOSS, step=step, first=step, value=loss, threshold=math.inf)
    if not math.isfinite(norm):
        return Alarm(kind=AlarmKind.NON_FINITE_GRADIENT, step=step, first=step, value=norm, threshold=math.inf)
    return None


def observe(state: MonitorState, step: int, loss: float, norm: float) -> tuple[MonitorState, Alarm | None]:
    """Return the monitor's state after a step with finite loss and gradient, and the alarm that the step raises, if
    any."""
    seen = Observation(step=step, log_loss=_log(loss), log_norm=_log(norm))
    steps = (*state.recent, seen)[-(RECENT + BASELINE) :]
    start = state.start if len(state.start) >= START_STEPS else (*state.start, seen.log_loss)
    baseline = [item.log_loss for item in steps[:-RECENT]]
    level = median(baseline) if len(baseline) == BASELINE else None
    best = min((value for value in (state.best_level, level) if value is not None), default=None)
    now = state.model_copy(update={"recent": steps, "start": start, "best_level": best})
    if step < state.muted_until_step:
        return now, None
    alarm = _alarm(now)
    return (now.model_copy(update={"muted_until_step": step + RECENT}) if alarm else now), alarm


def monitor_after(rows: Iterable[tuple[int, float | None, float | None]]) -> MonitorState:
    """Return the monitor's state after ``rows`` of (step, loss, gradient norm). Rows without finite values are left
    out. Alarms that the rows raise are ignored, and do not mute alarms of the steps after ``rows``."""
    state = MonitorState()
    for step, loss, norm in rows:
        if loss is not None and norm is not None and math.isfinite(loss) and math.isfinite(norm):
            state, _ = observe(state, step, loss, norm)
    return state.model_copy(update={"muted_until_step": 0})


def _alarm(state: MonitorState) -> Alarm | None:
    recent, baseline = state.recent[-RECENT:], state.recent[:-RECENT]
    above = _above_start(state, recent)
    if above is not None or len(baseline) < MIN_BASELINE:
        return above
    losses, norms = [item.log_loss for item in baseline], [item.log_norm for item in baseline]
    level, spread = median(losses), _deviation(losses)
    limit = level + min(max(SPIKE_DEVIATIONS * spread, SPIKE_MIN_RISE), max(DOUBLED, DOUBLED_DEVIATIONS * spread))
    high = [item for item in recent if item.log_loss > limit]
    if len(high) >= PERSISTENT and high[-1] is recent[-1]:
        return _made(AlarmKind.LOSS_SPIKE, recent, high[0].step, high[-1].log_loss, limit)
    norm_limit = median(norms) + max(GRADIENT_DEVIATIONS * _deviation(norms), GRADIENT_MIN_RISE)
    steep = [item for item in recent if item.log_norm > norm_limit]
    # The mean leaves out the highest and the lowest loss, so that one odd batch hardly changes it.
    middle = sorted(item.log_loss for item in recent)[1:-1]
    mean = sum(middle) / len(middle)
    if len(steep) >= PERSISTENT and steep[-1] is recent[-1] and mean > level + GRADIENT_LOSS_DEVIATIONS * spread:
        return _made(AlarmKind.GRADIENT_SPIKE, recent, steep[0].step, steep[-1].log_norm, norm_limit)
    # The standard deviation of a mean over n steps is that of one step divided by the square root of n.
    drift_limit = level + max(DRIFT_DEVIATIONS * spread / math.sqrt(len(middle)), DRIFT_MIN_RISE)
    if state.best_level is not None:
        drift_limit = min(drift_limit, state.best_level + max(ABOVE_BEST, DRIFT_DEVIATIONS * spread))
    if mean <= drift_limit:
        return None
    first = next((item for item in recent if item.log_loss > level + DRIFT_BEGINS * spread), recent[0])
    return _made(AlarmKind.LOSS_DRIFT, recent, first.step, mean, drift_limit)


def _above_start(state: MonitorState, recent: Sequence[Observation]) -> Alarm | None:
    """Return the alarm for a loss far above the losses of the job's first steps, if there is one. This alarm reports a
    learning rate that is far too high, even before there is a baseline to compare with."""
    if len(state.start) < START_STEPS:
        return None
    limit = median(state.start) + ABOVE_START
    high = [item for item in recent if item.log_loss > limit]
    if len(high) < PERSISTENT or high[-1] is not recent[-1]:
        return None
    return _made(AlarmKind.LOSS_ABOVE_START, recent, high[0].step, high[-1].log_loss, limit)


def _made(kind: AlarmKind, recent: Sequence[Observation], first: int, value: float, threshold: float) -> Alarm:
    return Alarm(kind=kind, step=recent[-1].step, first=first, value=math.exp(value), threshold=math.exp(threshold))


def _deviation(values: Sequence[float]) -> float:
    """Estimate the standard deviation of single values around their slowly changing course, from the differences
    between neighbouring values. A few outliers hardly change the result."""
    differences = sorted(abs(after - before) for before, after in itertools.pairwise(values))
    kept = differences[: math.ceil(TRIMMED * len(differences))]
    # The difference of two values has the standard deviation of one value times the square root of 2.
    return max(sum(kept) / len(kept) / TRIMMED_MEAN / math.sqrt(2.0), MIN_DEVIATION)


def _log(value: float) -> float:
    """Return the logarithm of a loss or a norm. A value below 1e-12, such as the zero of a perfect fit, is treated as
    1e-12."""
    return math.log(max(value, 1e-12))
