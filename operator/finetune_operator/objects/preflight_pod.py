"""Builds the pod of a preflight check and its ConfigMap. Pure: the attempt's own template without what only training
needs, so that what is mounted, and where it may run, is what the attempt will get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_core.api import FineTuneJob
from finetune_core.contract import RUN_FILE, RunConfig
from finetune_core.contract.preflight_result import PREFLIGHT_COMMAND
from finetune_operator.objects.labels import ATTEMPT, owner_reference, preflight_labels
from finetune_operator.objects.pods import AttemptPlan, pod_template

RESOURCES = {
    "requests": {"cpu": "100m", "memory": "256Mi"},
    "limits": {"cpu": "1", "memory": "1Gi"},
}
"""The checks take about 150 MiB; the limit leaves room for a large tokenizer."""
GRACE_SECONDS = 2
"""There is nothing to save."""
ONLY_FOR_TRAINING = ("report-token", "shared-memory")
"""Volumes that a check does not need."""

Manifest = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TryPlan:
    """What a try is built from, beside the job itself."""

    number: int
    name: str
    """Name of the pod and of its ConfigMap."""
    image: str


def build_preflight_pod(job: FineTuneJob, plan: TryPlan) -> Manifest:
    """Return the pod of a try.

    It runs where `podTemplate` allows, on any kind of node: `gpuProduct` would make it wait for the GPUs that it is
    there to save.
    """
    whole = job.spec.model_copy(
        update={"resources": job.spec.resources.model_copy(update={"gpus_per_node": 0, "gpu_product": None})}
    )
    attempt = AttemptPlan(number=1, name=plan.name, image=plan.image, report_base_url="")
    template = pod_template(job.model_copy(update={"spec": whole}), attempt)
    metadata, spec = template["metadata"], template["spec"]
    labels = {name: value for name, value in metadata["labels"].items() if name != ATTEMPT}
    (container,) = spec["containers"]
    wanted = {"HOME", *(variable.name for variable in job.spec.pod_template.env)}
    container |= {
        "args": [PREFLIGHT_COMMAND],
        "env": [item for item in container["env"] if item["name"] in wanted],
        "resources": RESOURCES,
        "volumeMounts": [item for item in container["volumeMounts"] if item["name"] not in ONLY_FOR_TRAINING],
        # What broke before it could leave a message is told by the end of its log.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    container.pop("ports")
    spec |= {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "volumes": [item for item in spec["volumes"] if item["name"] not in ONLY_FOR_TRAINING],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _metadata(job, plan)
        | {"labels": labels | _labels(job, plan), "annotations": metadata["annotations"]},
        "spec": spec,
    }


def build_preflight_config_map(job: FineTuneJob, plan: TryPlan, config: RunConfig) -> Manifest:
    """Return the ConfigMap of a try: the run file that attempt 1 would get."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, plan),
        "immutable": True,
        "data": {RUN_FILE.rpartition("/")[2]: config.to_json()},
    }


def _metadata(job: FineTuneJob, plan: TryPlan) -> Manifest:
    return {
        "name": plan.name,
        "namespace": job.metadata.namespace,
        "labels": _labels(job, plan),
        "ownerReferences": [owner_reference(job)],
    }


def _labels(job: FineTuneJob, plan: TryPlan) -> dict[str, str]:
    return preflight_labels(job.metadata.name, job.metadata.uid, plan.number)
