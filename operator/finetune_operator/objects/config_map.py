"""The ConfigMap of an attempt: the run file that the trainer reads, and the CA certificate of the report server.

The ConfigMap is immutable and owned by the job. `act/` creates it before the child object. It is deleted before the
child is deleted, or at the latest before the ConfigMap of the next attempt is created.
"""

from __future__ import annotations

from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Final

from finetune_core.api import FineTuneJob
from finetune_core.api.conditions import Reason
from finetune_core.contract import CA_FILE, RUN_FILE, RunConfig
from finetune_operator import messages
from finetune_operator.kube.client import ApiError, KubeClient
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.labels import attempt_labels, owner_reference
from finetune_operator.objects.observations import controller_uid
from finetune_operator.objects.pod_template import AttemptSpec
from finetune_operator.queue.retryable import RetryableError

RUN_FILE_KEY: Final = PurePosixPath(RUN_FILE).name
"""Key of the run file in the ConfigMaps of attempts and preflight checks, for example ``"run.json"``."""
_REFUSALS: Final = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.FORBIDDEN, HTTPStatus.UNPROCESSABLE_ENTITY})


def build_config_map(job: FineTuneJob, attempt: AttemptSpec, config: RunConfig, ca_bundle: str) -> Manifest:
    """Return the ConfigMap of an attempt with the run file ``config`` and the PEM text ``ca_bundle``."""
    return run_config_map(
        job,
        name=attempt.name,
        labels=attempt_labels(job.metadata.name, job.metadata.uid, attempt.number),
        data={RUN_FILE_KEY: config.to_json(), PurePosixPath(CA_FILE).name: ca_bundle},
    )


def run_config_map(job: FineTuneJob, *, name: str, labels: dict[str, str], data: dict[str, str]) -> Manifest:
    """Return an immutable ConfigMap that ``job`` owns."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": name,
            "namespace": job.metadata.namespace,
            "labels": labels,
            "ownerReferences": [owner_reference(job)],
        },
        "immutable": True,
        "data": data,
    }


async def create_config_map(client: KubeClient, manifest: Manifest) -> None:
    """Create the ConfigMap, or accept the ConfigMap that an earlier try has created.

    Raises RetryableError where the API server refuses the ConfigMap or where another object has its name.
    """
    metadata = manifest["metadata"]
    try:
        await client.create_config_map(manifest)
    except ApiError as error:
        if not error.is_conflict:
            if error.status in _REFUSALS:
                message = messages.backend_refused("ConfigMap", metadata["name"], error.message)
                raise RetryableError(Reason.BACKEND_UNAVAILABLE, message) from error
            raise
        existing = await client.get_config_map(metadata["namespace"], metadata["name"])
        if existing is not None and controller_uid(existing) != controller_uid(manifest):
            problem = messages.name_conflict("ConfigMap", metadata["name"])
            raise RetryableError(Reason.NAME_CONFLICT, problem) from error


async def delete_config_map(client: KubeClient, namespace: str, name: str, owner_uid: str) -> None:
    """Delete the ConfigMap if it exists and its controller is the job with ``owner_uid``."""
    existing = await client.get_config_map(namespace, name)
    if existing is not None and controller_uid(existing) == owner_uid:
        await client.delete_config_map(namespace, name)
