"""What follows an alarm: recorded, a return to an earlier checkpoint, or the end. Pure decisions; `train` carries them
out.

The way back is that of the literature (PaLM, section 5.1: restart before the spike and leave out the data around it;
OPT: a lower rate), with the study's own factor from 1e-4 to 3e-5.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune_core.api.training import StabilityAction
from finetune_core.contract import Incident, RunConfig
from finetune_trainer.decisions.stability import NON_FINITE, RECENT, Alarm
from finetune_trainer.pod.errors import Diverged
from finetune_trainer.storage.lineage import Rollback

RATE_FACTOR = 0.3
MOST_ROLLBACKS = 3
SKIPPED_BEYOND = 8
"""Steps after the alarm whose data is left out too: bad rows come in a row (PaLM left out 200 to 500 batches, of a run
a thousand times as long)."""
DIGITS = ".6g"


class RollBack(Exception):  # noqa: N818  (an order, raised on every rank at the same step)
    """Leave this run for a new one that grows from an earlier checkpoint."""

    def __init__(self, rollback: Rollback) -> None:
        """``rollback.step`` is the last step that is known to be good."""
        super().__init__(rollback.reason)
        self.rollback = rollback


def remedy_of(alarm: Alarm, config: RunConfig) -> StabilityAction:
    """Return what the job says about such an alarm."""
    stability = config.stability
    if alarm.kind in NON_FINITE:
        return stability.on_non_finite
    return stability.on_exploding_loss or "Record"


def react(
    alarm: Alarm, config: RunConfig, rollbacks: Sequence[Rollback]
) -> tuple[Incident, RollBack | Diverged | None]:
    """Return what is told about ``alarm``, and what has to be raised; ``rollbacks`` are those that there were."""
    remedy = remedy_of(alarm, config)
    sentence = alarm.describe()
    order: RollBack | Diverged | None = None
    if remedy == "RollBack" and len(rollbacks) >= MOST_ROLLBACKS:
        remedy = "Fail"
        order = Diverged(f"{sentence}, and {MOST_ROLLBACKS} rollbacks did not help: {_advice(alarm, config)}")
    elif remedy == "RollBack":
        order = RollBack(
            Rollback(
                step=_last_good(alarm),
                rate_factor=RATE_FACTOR,
                skip_from=_skip_from(alarm),
                skip_to=_skip_to(alarm),
                reason=sentence,
            )
        )
    elif remedy == "Fail":
        order = Diverged(f"{sentence}: {_advice(alarm, config)}")
    incident = Incident(
        step=alarm.step,
        kind=alarm.kind.value,
        value=format(alarm.value, DIGITS),
        threshold=format(alarm.threshold, DIGITS),
        action=remedy,
        message=f"{sentence} ({_action(remedy, alarm)})",
    )
    return incident, order


def left_out(step: int, rollbacks: Sequence[Rollback]) -> bool:
    """Return whether the data of ``step`` is skipped because training went wrong there."""
    return any(rollback.skip_from <= step <= rollback.skip_to for rollback in rollbacks)


def _last_good(alarm: Alarm) -> int:
    """Return the last step whose checkpoint can be trusted.

    The loss of a step is that of the weights which the step before it left, so the first bad loss may be the work of
    that one's update. A rising loss may have begun before it stood out: of the recent steps none is trusted.
    """
    last = alarm.first - 2
    return max(0, last if alarm.kind in NON_FINITE else min(last, alarm.step - RECENT))


def _skip_from(alarm: Alarm) -> int:
    """Return the first step whose data is left out: that of the update which may have done it."""
    return max(1, alarm.first - 1)


def _skip_to(alarm: Alarm) -> int:
    """Return the last step whose data is left out; a single gradient says nothing about what follows it."""
    return alarm.step + (0 if alarm.kind in NON_FINITE else SKIPPED_BEYOND)


def _action(remedy: StabilityAction, alarm: Alarm) -> str:
    if remedy == "RollBack":
        return (
            f"back to a checkpoint of step {_last_good(alarm)} or before, with {RATE_FACTOR} times the rate and without"
            f" the data of steps {_skip_from(alarm)} to {_skip_to(alarm)}"
        )
    if remedy == "Fail":
        return "training ends"
    return "its update was not applied" if alarm.kind in NON_FINITE else "recorded"


def _advice(alarm: Alarm, config: RunConfig) -> str:
    rows = f"steps {alarm.first} to {alarm.step}" if alarm.first != alarm.step else "that step"
    return f"lower training.learningRate (it is {config.optimization.learning_rate:g}) or look at the rows of {rows}"
