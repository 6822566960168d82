"""The back-off of a job after one of its objects could not be created, for example because of a quota.

`attempt_objects.py`, `preflight_objects.py` and `reconcile.py` share the back-off, which is kept in `JobMemory`.
`reconcile.py` also uses it for a job whose spec or status can't be used at the moment.
"""

from __future__ import annotations

from collections.abc import Callable

from finetune_core.api.conditions import Reason
from finetune_operator.queue.memory import JobMemory
from finetune_operator.queue.retryable import FIRST_RETRY_SECONDS, RetryableError
from finetune_operator.queue.work_queue import backoff_seconds


class CreationBackoff:
    """Keeps, in the memory of a job, the error of the last try to create an object, and when the next try is due."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Measure time with ``clock``, which returns monotonic seconds."""
        self._clock = clock

    def failed(self, memory: JobMemory, problem: RetryableError) -> None:
        """Keep ``problem``. The next try is due after 10 s; each further failure doubles this time, up to 300 s."""
        memory.failures += 1
        memory.problem = problem
        memory.retry_at = self._clock() + backoff_seconds(memory.failures, jitter=0, base=FIRST_RETRY_SECONDS)

    def reset(self, memory: JobMemory) -> None:
        """Forget the problem, because it is solved or because another attempt begins."""
        memory.problem, memory.failures = None, 0

    def forget_refusal(self, memory: JobMemory) -> None:
        """Forget the problem if the spec or the status of the job was the problem (BadInput).

        The caller has found that the job can be read and run now. A person may have corrected the job, and must not
        wait for the back-off of the corrected problem.
        """
        if memory.problem is not None and memory.problem.reason is Reason.BAD_INPUT:
            self.reset(memory)

    def check(self, memory: JobMemory) -> None:
        """Raise the error of the last try to create an object while the back-off after that try lasts."""
        if memory.problem is not None and self.holds(memory):
            raise memory.problem

    def holds(self, memory: JobMemory) -> bool:
        """Return whether the back-off still lasts, so that nothing is to be created yet."""
        return memory.problem is not None and self._clock() < memory.retry_at

    def seconds_left(self, memory: JobMemory) -> float:
        """Return in how many seconds the next try is due; 0.0 where it is due now."""
        return max(0.0, memory.retry_at - self._clock())
