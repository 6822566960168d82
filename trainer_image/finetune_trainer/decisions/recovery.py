"""Decides what follows an alarm of the stability monitor: record it, roll back to an earlier checkpoint, or end the
run.

The functions are pure; `loop.py` raises the error that `plan_recovery` returns, and `train.py` carries out a rollback.
The rollback follows the literature: restart before the spike and skip the data around it (PaLM, section 5.1), and lower
the learning rate (OPT). Anyscale's study of Llama 2 lowered the rate from 1e-4 to 3e-5, which is the factor 0.3.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune_core.api.training import StabilityAction
from finetune_core.contract import Incident, RunConfig
from finetune_trainer.decisions.stability import NON_FINITE, RECENT, Alarm
from finetune_trainer.pod.errors import Diverged
from finetune_trainer.storage.lineage import Rollback

RATE_FACTOR = 0.3
MAX_ROLLBACKS = 3
SKIPPED_STEPS_AFTER_ALARM = 8
"""How many steps after the alarm a rollback also skips, if the alarm was about a finite loss or gradient norm. Bad rows
often follow each other. PaLM skipped 200 to 500 batches, in a far longer run."""
DIGITS = ".6g"


class RollbackRequired(Exception):  # noqa: N818  (an order, raised on every rank at the same step)
    """Says that the run has to end, and that a new run has to start from an earlier checkpoint. Every rank raises this
    error at the same step."""

    def __init__(self, rollback: Rollback) -> None:
        """``rollback.step`` is the last step whose weights can be trusted."""
        super().__init__(rollback.reason)
        self.rollback = rollback


def recovery_action(alarm: Alarm, config: RunConfig) -> StabilityAction:
    """Return the action that the job's `spec.stability` asks for after ``alarm``."""
    stability = config.stability
    if alarm.kind in NON_FINITE:
        return stability.on_non_finite
    return stability.on_exploding_loss or "Record"


def plan_recovery(
    alarm: Alarm, config: RunConfig, rollbacks: Sequence[Rollback]
) -> tuple[Incident, RollbackRequired | Diverged | None]:
    """Return the incident to report, and the error to raise, which is None where the alarm is only recorded.

    ``rollbacks`` are the earlier rollbacks of the job. Where `spec.stability` asks for a rollback, but the job has made
    MAX_ROLLBACKS rollbacks already, the error is Diverged.
    """
    action = recovery_action(alarm, config)
    sentence = alarm.describe()
    order: RollbackRequired | Diverged | None = None
    if action == "RollBack" and len(rollbacks) >= MAX_ROLLBACKS:
        action = "Fail"
        order = Diverged(f"{sentence}, and {MAX_ROLLBACKS} rollbacks did not help: {_advice(alarm, config)}")
    elif action == "RollBack":
        order = RollbackRequired(
            Rollback(
                step=_last_good(alarm),
                rate_factor=RATE_FACTOR,
                skip_from=_skip_from(alarm),
                skip_to=_skip_to(alarm),
                reason=sentence,
            )
        )
    elif action == "Fail":
        order = Diverged(f"{sentence}: {_advice(alarm, config)}")
    incident = Incident(
        step=alarm.step,
        kind=alarm.kind.value,
        value=format(alarm.value, DIGITS),
        threshold=format(alarm.threshold, DIGITS),
        action=action,
        message=f"{sentence} ({_action(action, alarm)})",
    )
    return incident, order


def is_skipped(step: int, rollbacks: Sequence[Rollback]) -> bool:
    """Return whether a rollback excludes the global batch of ``step`` from training."""
    return any(rollback.skip_from <= step <= rollback.skip_to for rollback in rollbacks)


def _last_good(alarm: Alarm) -> int:
    """Return the last step whose checkpoint can be trusted.

    The loss of a step is computed with the weights that the step before left. The update before the first bad loss may
    therefore be the cause, and is not trusted. After an alarm about a finite loss or gradient, none of the newest
    RECENT steps is trusted either, because the value may have begun to rise before the monitor noticed it.
    """
    last = alarm.first - 2
    return max(0, last if alarm.kind in NON_FINITE else min(last, alarm.step - RECENT))


def _skip_from(alarm: Alarm) -> int:
    """Return the first step to skip, which is the step whose update may have caused the alarm."""
    return max(1, alarm.first - 1)


def _skip_to(alarm: Alarm) -> int:
    """Return the last step to skip. After a loss or gradient that is not finite, no later step is skipped, because such
    a value says nothing about the steps after it."""
    return alarm.step + (0 if alarm.kind in NON_FINITE else SKIPPED_STEPS_AFTER_ALARM)


def _action(action: StabilityAction, alarm: Alarm) -> str:
    if action == "RollBack":
        return (
            f"back to a checkpoint of step {_last_good(alarm)} or before, with {RATE_FACTOR} times the rate and without"
            f" the data of steps {_skip_from(alarm)} to {_skip_to(alarm)}"
        )
    if action == "Fail":
        return "training ends"
    return "its update was not applied" if alarm.kind in NON_FINITE else "recorded"


def _advice(alarm: Alarm, config: RunConfig) -> str:
    rows = f"steps {alarm.first} to {alarm.step}" if alarm.first != alarm.step else "that step"
    return f"lower training.learningRate (it is {config.optimization.learning_rate:g}) or look at the rows of {rows}"
