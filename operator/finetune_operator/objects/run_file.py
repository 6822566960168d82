"""The ConfigMap of an attempt: run file and CA bundle. Immutable, created before the child, owned by the job; it goes
before the child does, or before the next attempt's is created."""

from __future__ import annotations

from pathlib import PurePosixPath

from finetune_core.api import FineTuneJob
from finetune_core.contract import CA_FILE, RUN_FILE, RunConfig
from finetune_operator.objects.labels import attempt_labels, owner_reference
from finetune_operator.objects.pods import AttemptPlan, Manifest


def build_config_map(job: FineTuneJob, plan: AttemptPlan, config: RunConfig, ca_bundle: str) -> Manifest:
    """Return the ConfigMap of an attempt."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": plan.name,
            "namespace": job.metadata.namespace,
            "labels": attempt_labels(job.metadata.name, job.metadata.uid, plan.number),
            "ownerReferences": [owner_reference(job)],
        },
        "immutable": True,
        "data": {
            PurePosixPath(RUN_FILE).name: config.to_json(),
            PurePosixPath(CA_FILE).name: ca_bundle,
        },
    }
