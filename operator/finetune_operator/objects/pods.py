"""Builds the pod template of an attempt: what every backend puts around the training container. Pure.

The pods pass the `restricted` Pod Security Standard, hold no API token but the projected one for reports, and
write only to emptyDirs. Golden files in tests/operator hold the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from finetune_core.api import FineTuneJob
from finetune_core.api.pod_template import Volume
from finetune_core.api.sources import SecretKeyRef
from finetune_core.contract import (
    CREDENTIALS_FOLDER,
    HUB_DATA_TOKENS_FOLDER,
    HUB_TOKEN_FILE,
    IDENTITY_VARIABLES,
    MASTER_ADDR_VARIABLE,
    MASTER_PORT,
    MASTER_PORT_VARIABLE,
    RUN_FOLDER,
    SCRATCH_FOLDER,
    STORAGE_CA_FILE,
    TOKEN_FILE,
    VOLUMES_FOLDER,
    report_audience,
)
from finetune_core.contract import stock_reports as kubeflow
from finetune_core.names import worker_name
from finetune_operator.objects.grace import TRAINING_GRACE_SECONDS
from finetune_operator.objects.labels import REPLICA_INDEX, TRAINING_CONTAINER, attempt_labels

GPU_RESOURCE = "nvidia.com/gpu"
GPU_PRODUCT_LABEL = "nvidia.com/gpu.product"
ISTIO_INJECTION = "sidecar.istio.io/inject"
USER = 65532
"""User and group of the pods; volumes get the group."""
UNREACHABLE_SECONDS = 30
TOKEN_SECONDS = 3600
MASTER_PORT_NAME = "pytorchjob-port"
SHARED_READ_ONLY = 0o440
"""Mode of mounted secrets: readable for the pod's group, which fsGroup makes the trainer's."""

Manifest = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptPlan:
    """What an attempt is built from, beside the job itself."""

    number: int
    name: str
    """Name of the child and of its ConfigMap."""
    image: str
    report_base_url: str
    """Address of the report server."""


def pod_template(job: FineTuneJob, plan: AttemptPlan) -> Manifest:
    """Return the template of every pod of the attempt."""
    template = job.spec.pod_template
    labels = dict(template.labels) | attempt_labels(job.metadata.name, job.metadata.uid, plan.number)
    annotations = dict(template.annotations)
    if ISTIO_INJECTION not in {*template.labels, *template.annotations}:
        # A sidecar never ends and holds the network back at the start; newer versions read the label.
        labels[ISTIO_INJECTION] = "false"
        annotations[ISTIO_INJECTION] = "false"
    spec: Manifest = {
        "serviceAccountName": template.service_account_name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": TRAINING_GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": _tolerations(job),
        "containers": [_container(job, plan)],
        "volumes": _volumes(job, plan),
    }
    if node_selector := _node_selector(job):
        spec["nodeSelector"] = node_selector
    if template.affinity is not None:
        spec["affinity"] = template.affinity.to_json()
    if priority_class := job.spec.run_policy.priority_class_name:
        spec["priorityClassName"] = priority_class
    if template.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret.name} for secret in template.image_pull_secrets]
    return {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}


def _container(job: FineTuneJob, plan: AttemptPlan) -> Manifest:
    """The image's own entry point runs: in exec form it is PID 1 and gets SIGTERM."""
    return {
        "name": TRAINING_CONTAINER,
        "image": plan.image,
        "env": _environment(job, plan),
        "ports": [{"name": MASTER_PORT_NAME, "containerPort": MASTER_PORT, "protocol": "TCP"}],
        "resources": _resources(job),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": _mounts(job),
        "terminationMessagePolicy": "File",
    }


def _environment(job: FineTuneJob, plan: AttemptPlan) -> list[Manifest]:
    values = {
        "namespace": {"value": job.metadata.namespace},
        "name": {"value": job.metadata.name},
        "uid": {"value": job.metadata.uid},
        "attempt": {"value": str(plan.number)},
        "pod_name": _from_field("metadata.name"),
        "pod_uid": _from_field("metadata.uid"),
        # A job without a Master gets no node rank from training-operator: the label that it sets is the rank.
        "node_rank": _from_field(f"metadata.labels['{REPLICA_INDEX}']"),
    }
    identity = [{"name": variable} | values[field] for field, variable in IDENTITY_VARIABLES.items()]
    own = {variable.name for variable in job.spec.pod_template.env}
    protocol = kubeflow.environment(plan.report_base_url, job.metadata.namespace, job.metadata.name)
    return [
        *identity,
        # For images with other training code. Who sets one of them reports elsewhere.
        *({"name": name, "value": value} for name, value in protocol.items() if name not in own),
        {"name": MASTER_ADDR_VARIABLE, "value": worker_name(plan.name, 0)},
        {"name": MASTER_PORT_VARIABLE, "value": str(MASTER_PORT)},
        {"name": "HOME", "value": SCRATCH_FOLDER},
        *(variable.to_json() for variable in job.spec.pod_template.env),
    ]


def _from_field(path: str) -> Manifest:
    return {"valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def _resources(job: FineTuneJob) -> Manifest:
    resources = job.spec.resources
    amounts = {"cpu": str(resources.cpu), "memory": str(resources.memory)}
    if resources.gpus_per_node:
        amounts[GPU_RESOURCE] = str(resources.gpus_per_node)
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _node_selector(job: FineTuneJob) -> dict[str, str]:
    resources = job.spec.resources
    product = {GPU_PRODUCT_LABEL: resources.gpu_product} if resources.gpus_per_node and resources.gpu_product else {}
    return product | dict(job.spec.pod_template.node_selector)


def _tolerations(job: FineTuneJob) -> list[Manifest]:
    lost = [
        {
            "key": f"node.kubernetes.io/{taint}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": UNREACHABLE_SECONDS,
        }
        for taint in ("not-ready", "unreachable")
    ]
    return [*lost, *(toleration.to_json() for toleration in job.spec.pod_template.tolerations)]


def _claims(job: FineTuneJob) -> list[str]:
    """Return the claims that model and data come from, each once."""
    dataset = job.spec.dataset
    sources = [job.spec.model, dataset.train, dataset.validation, dataset.test]
    names = [source.volume.claim_name for source in sources if source is not None and source.volume is not None]
    return list(dict.fromkeys(names))


def _mounts(job: FineTuneJob) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "run", "mountPath": RUN_FOLDER, "readOnly": True},
        {"name": "report-token", "mountPath": _folder(TOKEN_FILE), "readOnly": True},
        {"name": "scratch", "mountPath": SCRATCH_FOLDER},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  (an emptyDir of the pod)
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108  (an emptyDir of the pod)
    ]
    if job.spec.storage.credentials_secret_ref:
        mounts.insert(1, {"name": "storage-credentials", "mountPath": CREDENTIALS_FOLDER, "readOnly": True})
    if job.spec.storage.ca_config_map_ref:
        mounts.append({"name": "storage-ca", "mountPath": _folder(STORAGE_CA_FILE), "readOnly": True})
    if _hub_token(job):
        mounts.append({"name": "hub-token", "mountPath": _folder(HUB_TOKEN_FILE), "readOnly": True})
    if _data_tokens(job):
        mounts.append({"name": "hub-data-tokens", "mountPath": HUB_DATA_TOKENS_FOLDER, "readOnly": True})
    mounts += [
        {"name": f"claim-{number}", "mountPath": f"{VOLUMES_FOLDER}/{claim}", "readOnly": True}
        for number, claim in enumerate(_claims(job))
    ]
    mounts += [
        {"name": _own_name(volume), "mountPath": volume.mount_path, "readOnly": bool(volume.read_only)}
        for volume in job.spec.pod_template.volumes
    ]
    return mounts


def _volumes(job: FineTuneJob, plan: AttemptPlan) -> list[Manifest]:
    token = {
        "audience": report_audience(job.metadata.uid),
        "expirationSeconds": TOKEN_SECONDS,
        "path": PurePosixPath(TOKEN_FILE).name,
    }
    volumes: list[Manifest] = [
        {"name": "run", "configMap": {"name": plan.name, "defaultMode": SHARED_READ_ONLY}},
        {
            "name": "report-token",
            "projected": {"defaultMode": SHARED_READ_ONLY, "sources": [{"serviceAccountToken": token}]},
        },
        {"name": "scratch", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {
            "name": "shared-memory",
            "emptyDir": {"medium": "Memory", "sizeLimit": str(job.spec.resources.shared_memory)},
        },
    ]
    if credentials := job.spec.storage.credentials_secret_ref:
        secret = {"secretName": credentials.name, "defaultMode": SHARED_READ_ONLY}
        volumes.insert(1, {"name": "storage-credentials", "secret": secret})
    if authority := job.spec.storage.ca_config_map_ref:
        item = {"key": authority.key, "path": PurePosixPath(STORAGE_CA_FILE).name}
        certificates = {"name": authority.name, "defaultMode": SHARED_READ_ONLY, "items": [item]}
        volumes.append({"name": "storage-ca", "configMap": certificates})
    if reference := _hub_token(job):
        item = {"key": reference.key, "path": PurePosixPath(HUB_TOKEN_FILE).name}
        volumes.append(
            {
                "name": "hub-token",
                "secret": {"secretName": reference.name, "defaultMode": SHARED_READ_ONLY, "items": [item]},
            }
        )
    if tokens := _data_tokens(job):
        sources = [
            {"secret": {"name": reference.name, "items": [{"key": reference.key, "path": path}]}}
            for path, reference in tokens.items()
        ]
        volumes.append({"name": "hub-data-tokens", "projected": {"defaultMode": SHARED_READ_ONLY, "sources": sources}})
    volumes += [
        {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        for number, claim in enumerate(_claims(job))
    ]
    volumes += [{"name": _own_name(volume)} | _volume_kind(volume) for volume in job.spec.pod_template.volumes]
    return volumes


def _own_name(volume: Volume) -> str:
    """Return the name in the pod of a volume that a person named: it can't collide with the template's own."""
    return f"extra-{volume.name}"


def _volume_kind(volume: Volume) -> Manifest:
    """Return the member of core/v1's volume union that is set."""
    kinds = volume.to_json()
    for key in ("name", "mountPath", "readOnly"):
        kinds.pop(key, None)
    return kinds


def _hub_token(job: FineTuneJob) -> SecretKeyRef | None:
    source = job.spec.model.hugging_face
    return source.token_secret_ref if source else None


def _data_tokens(job: FineTuneJob) -> dict[str, SecretKeyRef]:
    """Return the tokens of gated data sets by the field path of their source."""
    dataset = job.spec.dataset
    sources = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {
        f"dataset.{name}": source.hugging_face.token_secret_ref
        for name, source in sources.items()
        if source is not None and source.hugging_face is not None and source.hugging_face.token_secret_ref is not None
    }


def _folder(path: str) -> str:
    return str(PurePosixPath(path).parent)
