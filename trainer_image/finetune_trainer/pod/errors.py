"""Why a run ends early, as exceptions: each stands for one outcome of the contract and carries the sentence for it.

Raised anywhere in the trainer, turned into an outcome in one place (`outcomes.py`). What a person can put right is
`finetune_core.errors.UserError` (64).
"""

from __future__ import annotations


class OutsideFailure(Exception):  # noqa: N818  (named after the outcome, not after Python's errors)
    """Something outside failed for longer than its budget: store, network, driver (75)."""


class PeerLost(OutsideFailure):
    """Another rank left or fell silent: this rank's end is a consequence and never decides (75)."""


class Diverged(Exception):  # noqa: N818
    """The loss or the gradient is no longer a finite number (65)."""


class OutOfMemory(Exception):  # noqa: N818
    """The device or the pod has no memory left (66)."""


class Stopped(Exception):  # noqa: N818
    """Told to stop; what was trained is committed (143)."""


class StopAgreed(Exception):  # noqa: N818
    """All ranks know that one of them was told to stop: the loop saves, then raises Stopped."""


class NewerRun(OutsideFailure):
    """The fence: a newer run of the same job exists in the bucket, so this one must not write any more (75)."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, for a sentence; at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
