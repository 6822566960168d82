"""The interface of a backend, which runs the pods of an attempt by a child object such as a PyTorchJob.

`act/`, `observe/` and `settled.py` call the methods. A new backend implements `Backend` in a module of its own, and
`application.py` passes an instance to `Reconciler`. docs/extending.md lists all the other files that a new backend
changes, because some facts about PyTorchJob still lie outside of this interface.
"""

from __future__ import annotations

from typing import Protocol

from finetune_core.api import FineTuneJob
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.observations import ChildObservation
from finetune_operator.objects.pod_template import AttemptSpec


class Backend(Protocol):
    """Builds, creates, observes and deletes the child object of an attempt. A child is never updated."""

    kind: str
    """Kind of the child object as messages and `status.child` show it, for example ``"PyTorchJob"``."""
    api_version: str
    """`apiVersion` of the child object, for example ``"kubeflow.org/v1"``."""

    def pod_name(self, child: str, index: int) -> str:
        """Return the name of the pod with ``index`` of the child object named ``child``."""

    def build(self, job: FineTuneJob, attempt: AttemptSpec) -> Manifest:
        """Return the manifest of the child of ``attempt``.

        The method is pure, so that a retry after a crash builds the same object.
        """

    async def create(self, manifest: Manifest) -> ChildObservation:
        """Create the child ``manifest`` and return it, or return the child that an earlier reconcile has created.

        Raises RetryableError where the child can't be created for a cause outside the job's spec, such as a quota.
        """

    async def observe(self, namespace: str, name: str) -> ChildObservation | None:
        """Return the child ``namespace/name`` as the API server has it, or None where it does not exist."""

    async def delete(self, namespace: str, child: ChildObservation) -> None:
        """Delete ``child``, identified by name and uid. The pods of the child are deleted afterwards."""
