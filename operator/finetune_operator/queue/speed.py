"""Training speed and remaining time of a job, measured by the operator from the steps in the trainer's reports.

The operator prefers its own measurement to the trainer's estimates. A resumed trainer starts its estimate anew, and
Kubeflow's client divides the time since its start by all steps, including the steps of earlier runs. Until a new
attempt has reported two steps, the speed of the previous attempt is assumed. After a restart of the operator, the speed
is derived from the remaining time in the stored status.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from finetune_core.api.status import ProgressStatus
from finetune_core.contract.contract_model import LARGEST_NUMBER

WINDOW: Final = 64
"""Number of newest reports with a new step over which the speed is averaged. With a report every three seconds, and
steps that are shorter than that, the window covers about three minutes."""


class StepWindow:
    """Sliding window over the newest reported steps of one job, from which the seconds per step are computed.

    Pauses for evaluations and checkpoints count as training time.
    """

    def __init__(self) -> None:
        """Create an empty window. The speed is not known yet."""
        self._steps: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._previous_seconds_per_step: float | None = None

    def add(self, now: float, step: int) -> None:
        """Add ``step``, reported at monotonic time ``now``.

        A new window starts where ``step`` is lower than before, because training then resumed from a checkpoint.
        """
        if self._steps and step < self._steps[-1][1]:
            self.start_new()
        if not self._steps or step > self._steps[-1][1]:
            self._steps.append((now, step))

    def start_new(self) -> None:
        """Start a new window, so that the time before it, such as between two attempts, does not count as training."""
        self._previous_seconds_per_step = self.seconds_per_step()
        self._steps.clear()

    def seconds_per_step(self) -> float | None:
        """Return the seconds per step in this window.

        Where this window has fewer than two steps yet, the value of the previous window is returned, or None if that
        value is not known either.
        """
        if len(self._steps) < 2:
            return self._previous_seconds_per_step
        (begin, first), (end, last) = self._steps[0], self._steps[-1]
        return (end - begin) / (last - first)


def eta_seconds(step: int, total: int, seconds_per_step: float | None, stored: ProgressStatus | None) -> int | None:
    """Return the estimated seconds from ``step`` to the last step ``total``; None where no speed is known.

    Where ``seconds_per_step`` is None, the speed is taken from ``stored``, the progress in the job's status. The result
    is at most LARGEST_NUMBER, because the trainer chooses the numbers of steps.
    """
    if seconds_per_step is None and stored is not None and stored.eta_seconds and stored.total_steps > stored.step:
        seconds_per_step = stored.eta_seconds / (stored.total_steps - stored.step)
    return None if seconds_per_step is None else round(min(LARGEST_NUMBER, max(0, total - step) * seconds_per_step))
