"""The nodes that the next attempt is to avoid if it can, because they ended the newest attempts.

A pure function on `status.attempts`, called by `reconcile.py` before it creates the objects of an attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from finetune_core.api.attempt_causes import Cause
from finetune_core.api.status import PastAttempt
from finetune_operator.decide.accounting import SUSPENSIONS

NODE_FAULTS: Final = frozenset(
    {Cause.NODE_REFUSED, Cause.NODE_LOST, "DeletionByTaintManager", "DeletionByPodGC", "TerminationByKubelet"}
)
"""Reasons of attempts that a node ended: the node refused a pod, lost the container of a pod, no longer answers, no
longer exists, got a taint that the pod does not tolerate, shut down, or ran out of a resource."""
ATTEMPTS_BACK: Final = 2
"""How many of the newest ended attempts count. The number is small, so that a repaired node is soon used again."""


def nodes_to_avoid(recent: Sequence[PastAttempt]) -> tuple[str, ...]:
    """Return the names of the nodes that ended the newest two attempts in ``recent``, each name once.

    ``recent`` lists ended attempts, the oldest first. Attempts that ended by a suspension say nothing about nodes and
    are skipped.
    """
    looked_at = [past for past in recent if past.reason not in SUSPENSIONS][-ATTEMPTS_BACK:]
    return tuple(sorted({past.node for past in looked_at if past.node and past.reason in NODE_FAULTS}))
