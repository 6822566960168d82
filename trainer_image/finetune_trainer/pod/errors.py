"""The exceptions that end a run early. Each class stands for one outcome of `finetune_core.contract.Outcome`, and its
message is the sentence that users see in the job's status.

Every room of the trainer raises these exceptions, and `pod/outcomes.py` turns them into outcomes. Errors that a user
can correct are raised as `finetune_core.errors.UserError` instead (exit code 64).
"""

from __future__ import annotations


class OutsideFailure(Exception):  # noqa: N818  (named after the outcome, not after Python's errors)
    """A service outside the pod (object store, network, driver) failed for longer than its time budget (code 75)."""


class PeerLost(OutsideFailure):
    """Another rank exited or stopped answering (exit code 75). The result of the pod ignores this error whenever some
    worker reported a cause of its own, because losing a peer is only a consequence.
    """


class Diverged(Exception):  # noqa: N818
    """The loss or the gradient is no longer a finite number (exit code 65)."""


class OutOfMemory(Exception):  # noqa: N818
    """The device or the pod has no memory left (exit code 66)."""


class Stopped(Exception):  # noqa: N818
    """The process received SIGTERM, and all finished steps, if any, are committed in a checkpoint (exit code 143)."""


class StopAgreed(Exception):  # noqa: N818
    """All ranks have agreed to stop because one of them received SIGTERM. The training loop then saves a checkpoint and
    raises `Stopped`.
    """


class NewerRun(OutsideFailure):
    """A newer run of the same job has claimed a higher run number in the bucket, so this run must not write any more
    (exit code 75).
    """


def first_line(error: BaseException, *, limit: int = 300) -> str:
    """Return the first line of another library's error message, at most ``limit`` characters, for use in a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]
