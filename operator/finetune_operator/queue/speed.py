"""How long a job still takes, from the operator's own observation: a sliding window over the steps that reports told.

A resumed trainer starts its own estimate anew, and Kubeflow's client divides the time since its start by all steps,
also those of earlier runs. Here the speed outlives the attempt: until a new one has made a few steps, it is expected to
be as fast as the one before; after a restart of the operator the status itself tells that.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from finetune_core.api.status import ProgressStatus

WINDOW: Final = 64
"""Reports with a new step over which the speed is taken: about three minutes where steps are short."""


class StepWindow:
    """Seconds per step of one job; pauses for evaluation and checkpoints count."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._seen: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._before: float | None = None
        """Seconds per step of the window that a resume ended."""

    def note(self, now: float, step: int) -> None:
        """Note that ``step`` was told at monotonic time ``now``; a step back is a resume and begins a new window."""
        if self._seen and step < self._seen[-1][1]:
            self.interrupt()
        if not self._seen or step > self._seen[-1][1]:
            self._seen.append((now, step))

    def interrupt(self) -> None:
        """Begin a new window: the time until the next step is not the training's."""
        self._before = self.seconds_per_step()
        self._seen.clear()

    def seconds_per_step(self) -> float | None:
        """Return the seconds a step takes, of an earlier window while this one has no two steps; None at first."""
        if len(self._seen) < 2:
            return self._before
        (begin, first), (end, last) = self._seen[0], self._seen[-1]
        return (end - begin) / (last - first)


def eta_seconds(step: int, total: int, seconds_per_step: float | None, stored: ProgressStatus | None) -> int | None:
    """Return the seconds to the last step; from ``stored``, the progress in the status, where no speed is known yet."""
    if seconds_per_step is None and stored is not None and stored.eta_seconds and stored.total_steps > stored.step:
        seconds_per_step = stored.eta_seconds / (stored.total_steps - stored.step)
    return None if seconds_per_step is None else round(max(0, total - step) * seconds_per_step)
