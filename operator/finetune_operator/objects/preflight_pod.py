"""Builds the pod of a preflight check and the ConfigMap of that pod. The functions are pure.

The pod is made from the pod template of attempt 1, so that the check sees the same mounts and may run on the same nodes
as the attempt. Parts that only training needs are left out. `act/preflight_objects.py` creates both objects.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_core.api import FineTuneJob
from finetune_core.api.resources import GPU_RESOURCE
from finetune_core.contract import IDENTITY_VARIABLES, RunConfig
from finetune_core.contract.preflight_result import PREFLIGHT_COMMAND
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.config_map import RUN_FILE_KEY, run_config_map
from finetune_operator.objects.disk_space import EPHEMERAL_STORAGE
from finetune_operator.objects.labels import ATTEMPT, owner_reference, preflight_labels
from finetune_operator.objects.pod_template import (
    REPORT_TOKEN_VOLUME,
    SHARED_MEMORY_VOLUME,
    AttemptSpec,
    claims,
    pod_template,
    web_identity,
)

RESOURCES = {
    "requests": {"cpu": "100m", "memory": "256Mi", EPHEMERAL_STORAGE: "256Mi"},
    "limits": {"cpu": "1", "memory": "1Gi", EPHEMERAL_STORAGE: "4Gi"},
}
"""Requests and limits of the preflight container. The checks of the data take about 150 MiB of memory. The checks of
the model take 750 MiB, and 300 MiB of that are mapped files of torch. The limit leaves room for a large tokenizer. On
disk the pod has the small files of the model, the headers of its weight files and the first rows of the data files."""
PREFLIGHT_GRACE_SECONDS = 2
"""terminationGracePeriodSeconds of the preflight pod. This time is short, because the pod has no checkpoint to save."""
PREFLIGHT_POD_SECONDS = 1800
"""activeDeadlineSeconds of the preflight pod; the time to pull the image counts too. The deadline ends the pod even
while no operator works. A working operator ends a long check much earlier (`decide/preflight.py`)."""
GPU_TOLERATION = {"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}
"""The toleration that the admission plugin ExtendedResourceToleration gives to pods that ask for GPUs. The preflight
pod asks for no GPU. So the operator adds the toleration itself where the pod may have to run on a node with GPUs."""
ONLY_FOR_TRAINING = (REPORT_TOKEN_VOLUME, SHARED_MEMORY_VOLUME)
"""Names of the volumes of a training pod that the preflight pod does not need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightSpec:
    """What the builders of a preflight pod and its ConfigMap need to know besides the job."""

    number: int
    """Number of the try, from 1."""
    name: str
    """Name of the pod and of its ConfigMap."""
    image: str


def build_preflight_pod(job: FineTuneJob, preflight: PreflightSpec) -> Manifest:
    """Return the pod of one try of the preflight check.

    The pod may run wherever `podTemplate` allows, also on nodes without GPUs. No GPU and no `gpuProduct` is asked for,
    because no GPU is to be held while the job is checked. Other devices and capabilities are not asked for either,
    because the check needs none. The ephemeral volumes of `resources.scratch` and `storage.cache` are left out too,
    because the check has little to write.
    """
    resources, storage, template = job.spec.resources, job.spec.storage, job.spec.pod_template
    is_for_each_pod = storage.cache is not None and storage.cache.ephemeral is not None
    without_gpus = job.spec.model_copy(
        update={
            "resources": resources.model_copy(update={"gpus_per_node": 0, "gpu_product": None, "scratch": None}),
            "storage": storage.model_copy(update={"cache": None}) if is_for_each_pod else storage,
            "pod_template": template.model_copy(update={"security_context": None}),
        }
    )
    attempt = AttemptSpec(number=1, name=preflight.name, image=preflight.image, report_base_url="")
    built = pod_template(job.model_copy(update={"spec": without_gpus}), attempt)
    metadata, spec = built["metadata"], built["spec"]
    labels = {name: value for name, value in metadata["labels"].items() if name != ATTEMPT}
    (container,) = spec["containers"]
    own = {"HOME", IDENTITY_VARIABLES["uid"]}
    kept_variables = {*own, *web_identity(job), *(variable.name for variable in job.spec.pod_template.env)}
    container |= {
        "args": [PREFLIGHT_COMMAND],
        "env": [item for item in container["env"] if item["name"] in kept_variables],
        "resources": RESOURCES,
        "volumeMounts": [item for item in container["volumeMounts"] if item["name"] not in ONLY_FOR_TRAINING],
        # Where the program fails before it writes a termination message, the kubelet takes the end of the log instead.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    container.pop("ports")
    if _is_bound_to_gpu_nodes(job):
        spec["tolerations"].append(GPU_TOLERATION)
    spec |= {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": PREFLIGHT_POD_SECONDS,
        "terminationGracePeriodSeconds": PREFLIGHT_GRACE_SECONDS,
        "volumes": [item for item in spec["volumes"] if item["name"] not in ONLY_FOR_TRAINING],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": preflight.name,
            "namespace": job.metadata.namespace,
            "labels": labels | _labels(job, preflight),
            "annotations": metadata["annotations"],
            "ownerReferences": [owner_reference(job)],
        },
        "spec": spec,
    }


def _is_bound_to_gpu_nodes(job: FineTuneJob) -> bool:
    """Return whether the preflight pod of a job with GPUs may have to run on a node with GPUs.

    The reason may be `podTemplate`'s node selector or required node affinity, or a volume that exists only on such a
    node. Nodes with GPUs often have a taint that keeps away pods which ask for no GPU.
    """
    template = job.spec.pod_template
    nodes = template.affinity.node_affinity if template.affinity is not None else None
    required = nodes is not None and nodes.required_during_scheduling_ignored_during_execution is not None
    cache = job.spec.storage.cache
    is_cached = cache is not None and cache.claim_name is not None
    volumes = is_cached or bool(claims(job)) or any(volume.persistent_volume_claim for volume in template.volumes)
    return bool(job.spec.resources.gpus_per_node) and (bool(template.node_selector) or required or volumes)


def build_preflight_config_map(job: FineTuneJob, preflight: PreflightSpec, config: RunConfig) -> Manifest:
    """Return the ConfigMap of one try of the preflight check. ``config`` is the run file that attempt 1 would get."""
    return run_config_map(
        job, name=preflight.name, labels=_labels(job, preflight), data={RUN_FILE_KEY: config.to_json()}
    )


def _labels(job: FineTuneJob, preflight: PreflightSpec) -> dict[str, str]:
    return preflight_labels(job.metadata.name, job.metadata.uid, preflight.number)
