"""Builds the ConfigMap of an attempt: the run file that the trainer reads, the CA of the report server, and a nonce.

The ConfigMap is immutable and owned by the job. `act/config_maps.py` creates the ConfigMap before the child object, and
deletes it right before the child or, where the child is gone already, before the next attempt gets its ConfigMap.
`settled.py` removes the last ConfigMap of an ended job.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final

from finetune_core.api import FineTuneJob
from finetune_core.contract import CA_FILE, NONCE_FILE, RUN_FILE, RunConfig
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.labels import attempt_labels, owner_reference
from finetune_operator.objects.pod_template import AttemptSpec

RUN_FILE_KEY: Final = PurePosixPath(RUN_FILE).name
"""Key of the run file in the ConfigMaps of attempts and preflight checks: the file name ``"run.json"``."""


def build_config_map(
    job: FineTuneJob, attempt: AttemptSpec, config: RunConfig, *, ca_bundle: str, nonce: str
) -> Manifest:
    """Return the ConfigMap of an attempt.

    The ConfigMap holds ``config`` as the run file, ``ca_bundle`` as a PEM file, and ``nonce``, a random text by which
    the pods of the attempt recognise each other.
    """
    return run_config_map(
        job,
        name=attempt.name,
        labels=attempt_labels(job.metadata.name, job.metadata.uid, attempt.number),
        data={
            RUN_FILE_KEY: config.to_json(),
            PurePosixPath(CA_FILE).name: ca_bundle,
            PurePosixPath(NONCE_FILE).name: nonce,
        },
    )


def run_config_map(job: FineTuneJob, *, name: str, labels: dict[str, str], data: dict[str, str]) -> Manifest:
    """Return the manifest of an immutable ConfigMap that ``job`` owns; ``data`` is its content by key."""
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
