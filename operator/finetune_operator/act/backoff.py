"""How long nothing is created after the API server refused an object of a job, for example because of a quota.

`attempt_objects.py`, `preflight_objects.py` and `reconcile.py` share the back-off, which is kept in `JobMemory`.
"""

from __future__ import annotations

from collections.abc import Callable

from finetune_operator.queue.memory import JobMemory
from finetune_operator.queue.retryable import FIRST_RETRY_SECONDS, RetryableError
from finetune_operator.queue.work_queue import backoff_seconds


class CreationBackoff:
    """Keeps what stood in the way of the last creation, and when the operator tries again."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Measure with ``clock``, which returns monotonic seconds."""
        self._clock = clock

    def failed(self, memory: JobMemory, problem: RetryableError) -> None:
        """Keep ``problem``; the next try is due after 10 s, doubled with each further failure up to 300 s."""
        memory.failures += 1
        memory.problem = problem
        memory.retry_at = self._clock() + backoff_seconds(memory.failures, jitter=0, base=FIRST_RETRY_SECONDS)

    def reset(self, memory: JobMemory) -> None:
        """Forget the problem, because a creation succeeded or another attempt begins."""
        memory.problem, memory.failures = None, 0

    def holds(self, memory: JobMemory) -> bool:
        """Return whether nothing is to be created yet."""
        return memory.problem is not None and self._clock() < memory.retry_at

    def seconds_left(self, memory: JobMemory) -> float:
        """Return in how many seconds the next try is due."""
        return max(0.0, memory.retry_at - self._clock())
