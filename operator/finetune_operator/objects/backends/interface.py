"""The one interface between the reconciler and what runs the pods: PyTorchJob now, others later."""

from __future__ import annotations

from typing import Protocol

from finetune_core.api import FineTuneJob
from finetune_operator.kube.client import Manifest
from finetune_operator.objects.observations import ChildObservation
from finetune_operator.objects.pod_template import AttemptSpec


class Backend(Protocol):
    """Builds, creates, observes and deletes the object of an attempt; it never changes one."""

    kind: str
    """Kind of the object, for people."""

    def build(self, job: FineTuneJob, plan: AttemptSpec) -> Manifest:
        """Return the object of an attempt; a pure function, so that a retry after a crash makes the same one."""

    async def create(self, manifest: Manifest) -> ChildObservation:
        """Create the object, or return the one of an earlier try; raises RetryableError where it can't be."""

    async def observe(self, namespace: str, name: str) -> ChildObservation | None:
        """Return the object as it is, or None where it does not exist."""

    async def delete(self, namespace: str, child: ChildObservation) -> None:
        """Delete exactly this object; its pods follow."""
