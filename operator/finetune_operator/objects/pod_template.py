"""Builds the pod template of an attempt, which is the same for every backend. The functions are pure.

The pods satisfy the `restricted` Pod Security Standard, unless the job asks for a capability. They mount no service
account token except projected ones: one for reports and, with `storage.identity`, one for the object store. The
writable folders are emptyDirs, the volumes that `disk_space.py` builds for `resources.scratch` and `storage.cache`, and
writable volumes of `podTemplate`.
Golden files in tests/operator/golden hold the expected templates. The backends and `preflight_pod.py` call
`pod_template`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from finetune_core.api import FineTuneJob
from finetune_core.api.pod_template import Volume
from finetune_core.api.resources import DEFAULT_CPU, DEFAULT_MEMORY, GPU_RESOURCE, ResourcesSpec
from finetune_core.api.sources import SecretKeyRef
from finetune_core.api.status import PlanStatus
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
from finetune_core.contract.pod import (
    CPU_REQUEST_VARIABLE,
    ROLE_ARN_VARIABLE,
    STS_ENDPOINT_VARIABLE,
    WEB_IDENTITY_FILE,
    WEB_IDENTITY_FILE_VARIABLE,
)
from finetune_core.contract.preflight_result import InputSizes
from finetune_core.contract.stock_reports import client_environment
from finetune_core.names import worker_name
from finetune_core.planning.host_resources import host_resources
from finetune_core.planning.scratch import GIBIBYTE
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.disk_space import SCRATCH_VOLUME, cache_mounts, disk_amounts, disk_volumes
from finetune_operator.objects.grace import TRAINING_GRACE_SECONDS
from finetune_operator.objects.labels import REPLICA_INDEX, TRAINING_CONTAINER, attempt_labels

GPU_PRODUCT_LABEL = "nvidia.com/gpu.product"
ISTIO_INJECTION = "sidecar.istio.io/inject"
USER = 65532
"""User id and group id of the pod's processes, and fsGroup of its volumes."""
UNREACHABLE_SECONDS = 30
"""tolerationSeconds of the pods for the taints of nodes that are not ready or unreachable."""
TOKEN_SECONDS = 3600
"""Lifetime in seconds of each projected service account token. The kubelet renews the tokens in time."""
AVOIDED_NODE_WEIGHT = 100
"""Weight (1 to 100) of the preference against nodes that ended the newest attempts."""
PREFERRED: Final = "preferredDuringSchedulingIgnoredDuringExecution"
MASTER_PORT_NAME = "pytorchjob-port"
"""Name of the container port on which rank 0 listens. training-operator looks for a port of this name."""
CPU_REQUEST: Final = {"containerName": TRAINING_CONTAINER, "resource": "requests.cpu", "divisor": "1m"}
"""Selects the CPU request of the training container, in thousandths of a CPU."""
SHARED_READ_ONLY = 0o440
"""File mode of mounted Secrets, ConfigMaps and tokens. The trainer can read them, because fsGroup is its group."""

RUN_VOLUME: Final = "run"
REPORT_TOKEN_VOLUME: Final = "report-token"  # noqa: S105  (the name of a volume)
CREDENTIALS_VOLUME: Final = "storage-credentials"
IDENTITY_VOLUME: Final = "storage-identity"
STORAGE_CA_VOLUME: Final = "storage-ca"
HUB_TOKEN_VOLUME: Final = "hub-token"  # noqa: S105  (the name of a volume)
HUB_DATA_TOKENS_VOLUME: Final = "hub-data-tokens"
TMP_VOLUME: Final = "tmp"
SHARED_MEMORY_VOLUME: Final = "shared-memory"


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptSpec:
    """The facts about an attempt, besides the job, from which its child object, ConfigMap and NetworkPolicy are built.
    The ConfigMap also needs the run file, the CA certificate and a nonce. A preflight pod is built from an AttemptSpec
    too."""

    number: int
    """Number of the attempt, from 1."""
    name: str
    """Name of the child object, the ConfigMap and the NetworkPolicy of the attempt."""
    image: str
    report_base_url: str
    """Address of the report server, for example ``"https://finetune-operator.finetune-system.svc:8443"``."""
    avoided_nodes: tuple[str, ...] = ()
    """Names of nodes that the scheduler is asked to avoid. This is a preference, which preferences of `podTemplate` may
    outweigh."""
    sizes: InputSizes | None = None
    """Sizes of model and data, from which the scratch space is computed. None where the preflight check did not record
    these sizes."""
    plan: PlanStatus | None = None
    """`status.plan` of the job, which fills in the memory and the CPUs of a pod that the job does not set."""


def pod_template(job: FineTuneJob, attempt: AttemptSpec) -> Manifest:
    """Return the template (metadata and spec) of every pod of the attempt."""
    template = job.spec.pod_template
    labels = dict(template.labels) | attempt_labels(job.metadata.name, job.metadata.uid, attempt.number)
    annotations = dict(template.annotations)
    if ISTIO_INJECTION not in {*template.labels, *template.annotations}:
        # Istio must inject no sidecar, because a sidecar never ends and blocks the network until it has started.
        # Newer versions of Istio read the label, older versions read the annotation.
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
        "containers": [_container(job, attempt)],
        "volumes": _volumes(job, attempt),
    }
    if node_selector := _node_selector(job):
        spec["nodeSelector"] = node_selector
    if affinity := _affinity(job, attempt):
        spec["affinity"] = affinity
    if priority_class := job.spec.run_policy.priority_class_name:
        spec["priorityClassName"] = priority_class
    if template.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret.name} for secret in template.image_pull_secrets]
    return {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}


def _container(job: FineTuneJob, attempt: AttemptSpec) -> Manifest:
    """Return the training container.

    No command is set, so that the image's entry point (in exec form) is PID 1 and receives SIGTERM.
    """
    return {
        "name": TRAINING_CONTAINER,
        "image": attempt.image,
        "env": _environment(job, attempt),
        "ports": [{"name": MASTER_PORT_NAME, "containerPort": MASTER_PORT, "protocol": "TCP"}],
        "resources": _resources(job, attempt),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": _capabilities(job),
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": _mounts(job),
        "terminationMessagePolicy": "File",
    }


def _capabilities(job: FineTuneJob) -> Manifest:
    context = job.spec.pod_template.security_context
    added = context.capabilities.add if context is not None and context.capabilities is not None else []
    return {"drop": ["ALL"]} | ({"add": list(added)} if added else {})


def _environment(job: FineTuneJob, attempt: AttemptSpec) -> list[Manifest]:
    values = {
        "namespace": {"value": job.metadata.namespace},
        "name": {"value": job.metadata.name},
        "uid": {"value": job.metadata.uid},
        "attempt": {"value": str(attempt.number)},
        "pod_name": _from_field("metadata.name"),
        "pod_uid": _from_field("metadata.uid"),
        # The node's rank is read from the index label of the pod, because training-operator sets no environment
        # variable with the rank in a PyTorchJob without a Master.
        "node_rank": _from_field(f"metadata.labels['{REPLICA_INDEX}']"),
    }
    identity = [{"name": variable} | values[field] for field, variable in IDENTITY_VARIABLES.items()]
    user_variables = {variable.name for variable in job.spec.pod_template.env}
    stock_reports = client_environment(attempt.report_base_url, job.metadata.namespace, job.metadata.name)
    return [
        *identity,
        # Images with other training code than this project's find the report server by these variables. A variable
        # that the user sets is kept.
        *({"name": name, "value": value} for name, value in stock_reports.items() if name not in user_variables),
        {"name": MASTER_ADDR_VARIABLE, "value": worker_name(attempt.name, 0)},
        {"name": MASTER_PORT_VARIABLE, "value": str(MASTER_PORT)},
        {"name": CPU_REQUEST_VARIABLE, "valueFrom": {"resourceFieldRef": CPU_REQUEST}},
        {"name": "HOME", "value": SCRATCH_FOLDER},
        *({"name": name, "value": value} for name, value in web_identity(job).items()),
        *(variable.to_json() for variable in job.spec.pod_template.env),
    ]


def web_identity(job: FineTuneJob) -> dict[str, str]:
    """Return the environment variables by which the AWS SDKs and the trainer find the token of `storage.identity`; none
    where the field is absent."""
    storage = job.spec.storage
    if storage.identity is None:
        return {}
    service = (storage.identity.sts_endpoint or storage.endpoint or "").rstrip("/")
    return (
        {WEB_IDENTITY_FILE_VARIABLE: WEB_IDENTITY_FILE}
        | ({STS_ENDPOINT_VARIABLE: service} if service else {})
        | ({ROLE_ARN_VARIABLE: storage.identity.role_arn} if storage.identity.role_arn else {})
    )


def _from_field(path: str) -> Manifest:
    return {"valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def _resources(job: FineTuneJob, attempt: AttemptSpec) -> Manifest:
    resources = job.spec.resources
    disk_request, disk_limit = disk_amounts(job, attempt.sizes)
    gpus = {GPU_RESOURCE: resources.gpus_per_node} if resources.gpus_per_node else {}
    amounts = host_resources(
        cpu=_cpus(resources, attempt.plan),
        memory=_memory(resources, attempt.plan),
        whole=gpus | resources.extended,
        limit_cpu=resources.limit_cpu,
    )
    return {"requests": {**amounts.requests, **disk_request}, "limits": {**amounts.limits, **disk_limit}}


def _cpus(resources: ResourcesSpec, plan: PlanStatus | None) -> str:
    """Return the CPUs of a pod: those of the job, else those of its ``plan``, else the default."""
    if resources.cpu is not None:
        return str(resources.cpu)
    return str(plan.cpus) if plan is not None and plan.cpus else DEFAULT_CPU


def _memory(resources: ResourcesSpec, plan: PlanStatus | None) -> str:
    """Return the memory of a pod: that of the job, else that of its ``plan`` in whole GiB, else the default."""
    if resources.memory is not None:
        return str(resources.memory)
    return f"{-(-plan.memory_bytes // GIBIBYTE)}Gi" if plan is not None and plan.memory_bytes else DEFAULT_MEMORY


def _node_selector(job: FineTuneJob) -> dict[str, str]:
    resources = job.spec.resources
    product = {GPU_PRODUCT_LABEL: resources.gpu_product} if resources.gpus_per_node and resources.gpu_product else {}
    return product | dict(job.spec.pod_template.node_selector)


def _affinity(job: FineTuneJob, attempt: AttemptSpec) -> Manifest:
    """Return the affinity of `podTemplate` with a preference against ``attempt.avoided_nodes``; empty without either.

    The nodes are named by `metadata.name`, because the label `kubernetes.io/hostname` of a node may differ from the
    node's name. A requirement on a field takes one value only. So the preference has one requirement for each avoided
    node, and a node is preferred if it meets all of them.
    """
    template = job.spec.pod_template
    affinity: Manifest = template.affinity.to_json() if template.affinity is not None else {}
    if not attempt.avoided_nodes:
        return affinity
    requirements = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in attempt.avoided_nodes]
    preference = {"weight": AVOIDED_NODE_WEIGHT, "preference": {"matchFields": requirements}}
    nodes = affinity.get("nodeAffinity", {})
    preferred = [*nodes.get(PREFERRED, []), preference]
    return affinity | {"nodeAffinity": nodes | {PREFERRED: preferred}}


def _tolerations(job: FineTuneJob) -> list[Manifest]:
    lost_node = [
        {
            "key": f"node.kubernetes.io/{taint}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": UNREACHABLE_SECONDS,
        }
        for taint in ("not-ready", "unreachable")
    ]
    return [*lost_node, *(toleration.to_json() for toleration in job.spec.pod_template.tolerations)]


def claims(job: FineTuneJob) -> list[str]:
    """Return the names of the PersistentVolumeClaims that hold model, adapter or datasets, each name once."""
    adapter = job.spec.model.adapter
    of_model = (job.spec.model.volume, adapter.volume if adapter is not None else None)
    volumes = [*of_model, *(source.volume for source in job.spec.dataset.sources.values())]
    return list(dict.fromkeys(volume.claim_name for volume in volumes if volume is not None))


def _mounts(job: FineTuneJob) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": RUN_VOLUME, "mountPath": RUN_FOLDER, "readOnly": True},
        {"name": REPORT_TOKEN_VOLUME, "mountPath": _folder(TOKEN_FILE), "readOnly": True},
        {"name": SCRATCH_VOLUME, "mountPath": SCRATCH_FOLDER},
        {"name": TMP_VOLUME, "mountPath": "/tmp"},  # noqa: S108  (an emptyDir of the pod)
        {"name": SHARED_MEMORY_VOLUME, "mountPath": "/dev/shm"},  # noqa: S108  (an emptyDir of the pod)
    ]
    if job.spec.storage.credentials_secret_ref:
        mounts.insert(1, {"name": CREDENTIALS_VOLUME, "mountPath": CREDENTIALS_FOLDER, "readOnly": True})
    if job.spec.storage.identity:
        mounts.append({"name": IDENTITY_VOLUME, "mountPath": _folder(WEB_IDENTITY_FILE), "readOnly": True})
    if job.spec.storage.ca_config_map_ref:
        mounts.append({"name": STORAGE_CA_VOLUME, "mountPath": _folder(STORAGE_CA_FILE), "readOnly": True})
    if _hub_token(job):
        mounts.append({"name": HUB_TOKEN_VOLUME, "mountPath": _folder(HUB_TOKEN_FILE), "readOnly": True})
    if _data_tokens(job):
        mounts.append({"name": HUB_DATA_TOKENS_VOLUME, "mountPath": HUB_DATA_TOKENS_FOLDER, "readOnly": True})
    mounts += cache_mounts(job)
    mounts += [
        {"name": _claim_volume(number), "mountPath": f"{VOLUMES_FOLDER}/{claim}", "readOnly": True}
        for number, claim in enumerate(claims(job))
    ]
    mounts += [
        {"name": _user_volume(volume), "mountPath": volume.mount_path, "readOnly": bool(volume.read_only)}
        for volume in job.spec.pod_template.volumes
    ]
    return mounts


def _volumes(job: FineTuneJob, attempt: AttemptSpec) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": RUN_VOLUME, "configMap": {"name": attempt.name, "defaultMode": SHARED_READ_ONLY}},
        _token_volume(REPORT_TOKEN_VOLUME, report_audience(job.metadata.uid), TOKEN_FILE),
        *disk_volumes(job, attempt.sizes),
        {"name": TMP_VOLUME, "emptyDir": {}},
        {
            "name": SHARED_MEMORY_VOLUME,
            "emptyDir": {"medium": "Memory", "sizeLimit": str(job.spec.resources.shared_memory)},
        },
    ]
    if credentials := job.spec.storage.credentials_secret_ref:
        secret = {"secretName": credentials.name, "defaultMode": SHARED_READ_ONLY}
        volumes.insert(1, {"name": CREDENTIALS_VOLUME, "secret": secret})
    if identity := job.spec.storage.identity:
        volumes.append(_token_volume(IDENTITY_VOLUME, identity.audience, WEB_IDENTITY_FILE))
    if authority := job.spec.storage.ca_config_map_ref:
        item = {"key": authority.key, "path": PurePosixPath(STORAGE_CA_FILE).name}
        certificates = {"name": authority.name, "defaultMode": SHARED_READ_ONLY, "items": [item]}
        volumes.append({"name": STORAGE_CA_VOLUME, "configMap": certificates})
    if reference := _hub_token(job):
        item = {"key": reference.key, "path": PurePosixPath(HUB_TOKEN_FILE).name}
        volumes.append(
            {
                "name": HUB_TOKEN_VOLUME,
                "secret": {"secretName": reference.name, "defaultMode": SHARED_READ_ONLY, "items": [item]},
            }
        )
    if tokens := _data_tokens(job):
        sources = [
            {"secret": {"name": reference.name, "items": [{"key": reference.key, "path": path}]}}
            for path, reference in tokens.items()
        ]
        volumes.append(
            {"name": HUB_DATA_TOKENS_VOLUME, "projected": {"defaultMode": SHARED_READ_ONLY, "sources": sources}}
        )
    volumes += [
        {"name": _claim_volume(number), "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        for number, claim in enumerate(claims(job))
    ]
    volumes += [{"name": _user_volume(volume)} | _volume_source(volume) for volume in job.spec.pod_template.volumes]
    return volumes


def _token_volume(name: str, audience: str, file: str) -> Manifest:
    """Return a volume with a token of the pod's service account for ``audience``, to be mounted at the folder of
    ``file``."""
    token = {"audience": audience, "expirationSeconds": TOKEN_SECONDS, "path": PurePosixPath(file).name}
    return {
        "name": name,
        "projected": {"defaultMode": SHARED_READ_ONLY, "sources": [{"serviceAccountToken": token}]},
    }


def _claim_volume(number: int) -> str:
    return f"claim-{number}"


def _user_volume(volume: Volume) -> str:
    """Return the name that a volume of `podTemplate.volumes` gets in the pod.

    The prefix keeps the name apart from the names of the volumes that the operator adds.
    """
    return f"extra-{volume.name}"


def _volume_source(volume: Volume) -> Manifest:
    """Return the source of ``volume`` as a pod's spec writes it, for example ``{"persistentVolumeClaim": {...}}``."""
    kinds = volume.to_json()
    for key in ("name", "mountPath", "readOnly"):
        kinds.pop(key, None)
    return kinds


def _hub_token(job: FineTuneJob) -> SecretKeyRef | None:
    source = job.spec.model.hugging_face
    return source.token_secret_ref if source else None


def _data_tokens(job: FineTuneJob) -> dict[str, SecretKeyRef]:
    """Return which Secrets hold the tokens for a gated adapter and for gated datasets on the Hugging Face Hub, by field
    path such as "dataset.train"."""
    adapter = job.spec.model.adapter
    found = {"model.adapter": adapter.hugging_face if adapter is not None else None}
    hub = {**found, **{field: source.hugging_face for field, source in job.spec.dataset.sources.items()}}
    return {
        field: source.token_secret_ref
        for field, source in hub.items()
        if source is not None and source.token_secret_ref is not None
    }


def _folder(path: str) -> str:
    return str(PurePosixPath(path).parent)
