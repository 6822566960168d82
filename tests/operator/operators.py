"""The operator's reconciler with a fake API server and a fake clock, for tests that need no cluster."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Protocol

from finetune_operator.objects.backends.pytorchjob import PyTorchJobBackend
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import Memory
from finetune_operator.reconcile import Reconciler

KEY = Key("team", "quickstart")
"""Namespace and name of the job of `builders.job_manifest`."""


class Clock:
    """A fake monotonic clock whose time the test sets."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class HasTime(Protocol):
    """A fake API server that also has the time of the test."""

    @property
    def now(self) -> datetime: ...


def reconciler(server: HasTime, memory: Memory | None = None, **options: Any) -> Reconciler:
    """Return the reconciler of an operator that has just started, with the fake API server ``server`` and its time.

    The reconciler's memory is empty where ``memory`` is None. ``options`` are arguments of `Reconciler` that differ
    from those of a plain operator without preflight checks.
    """
    arguments: dict[str, Any] = {
        "cluster": server,
        "backend": PyTorchJobBackend(server),  # type: ignore[arg-type]
        "memory": memory if memory is not None else Memory(),
        "metrics": Metrics(),
        "trainer_image": "trainer:1",
        "report_base_url": "https://operator:8443",
        "ca_bundle": lambda: "CA",
        "instance": "test",
        "preflight": "Skip",
        "now": lambda: server.now,
        "clock": lambda: server.now.timestamp(),
    }
    return Reconciler(**(arguments | options))
