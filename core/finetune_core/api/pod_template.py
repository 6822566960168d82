"""`podTemplate`: the parts of the training pods that users may set, as typed subsets of Kubernetes' core/v1."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.affinity import Affinity
from finetune_core.api.base import (
    ENTRIES,
    SET,
    UNIQUE,
    UNIQUE_NAMES,
    WORD_PATTERN,
    ApiModel,
    DnsLabel,
    LabelKey,
    LabelValue,
    ObjectName,
    QualifiedName,
    by_key,
    cel,
    exactly_one_of,
    join,
)
from finetune_core.api.resources import VolatileMemory
from finetune_core.api.sources import SecretKeyRef
from finetune_core.api.storage import ConfigMapKeyRef

RESERVED_FOLDERS = (
    "/etc/finetune",
    "/etc/finetune-storage",
    "/var/run/finetune",
    "/var/run/secrets",
    "/run",
    "/scratch",
    "/tmp",  # noqa: S108  (a path in the pod)
    "/dev",
    "/proc",
    "/sys",
)
"""Folders at which, and below which, a user's volume must not be mounted (`mountPath`). The operator mounts volumes of
its own at `/etc/finetune`, `/etc/finetune-storage`, `/scratch`, `/tmp` and `/dev/shm`, and below `/var/run/finetune`
and `/var/run/secrets`. `/run` is listed because `/var/run` is a link to `/run` in many images. The container runtime
needs `/dev`, `/proc` and `/sys` to start the container."""
RESERVED_VARIABLE_PREFIXES = ("FTJ_", "PET_", "AWS_")
"""Beginnings of names of environment variables that users must not set. The operator itself sets variables that begin
with `FTJ_` or `PET_`. Variables of users that begin with `AWS_` could override the credentials of the object store."""


LABEL_KEY = r"^([a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?$"
"""Regular expression for the key of a label or of an annotation, for example `team` or, with a DNS prefix,
`example.com/team`."""


def _label_keys(field: str) -> tuple[str, str]:
    """Return a CEL rule and its message: every key of the map ``field`` must be a valid key of a label. The rule is
    written in CEL because a structural schema can't bound the keys of a map."""
    return (
        f"self.{field}.all(key, key.matches('{LABEL_KEY}'))",
        f"`{field}` must have keys such as `team` or `example.com/team`",
    )


class Toleration(ApiModel):
    """A toleration of the training pods, with the fields that a toleration has in Kubernetes' core/v1."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "has(self.key) || has(self.operator) && self.operator == 'Exists'",
                "`operator` must be Exists unless `key` is set",
            ),
            (
                "!has(self.value) || !has(self.operator) || self.operator == 'Equal'",
                "`value` must be absent unless `operator` is Equal",
            ),
            (
                "!has(self.tolerationSeconds) || has(self.effect) && self.effect == 'NoExecute'",
                "`tolerationSeconds` must be absent unless `effect` is NoExecute",
            ),
        )
    )

    key: QualifiedName | None = None
    """Key of the tolerated taint, for example `nvidia.com/gpu`. Absent: taints with any key."""
    operator: Literal["Exists", "Equal"] | None = None
    """How the taint's value is compared with `value`. Absent: Equal."""
    value: LabelValue | None = None
    """Value of the tolerated taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the tolerated taint. Absent: any effect."""
    toleration_seconds: Annotated[int, Field(ge=0, le=86400)] | None = None
    """Seconds for which a NoExecute taint is tolerated before the pod is evicted. Absent: without limit."""


class LocalObjectReference(ApiModel):
    """A reference to an object in the job's namespace."""

    name: ObjectName
    """`metadata.name` of the object."""


class EnvVarSource(ApiModel):
    """Source of an environment variable's value. Exactly one of the fields must be set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("secretKeyRef", "configMapKeyRef"))

    secret_key_ref: SecretKeyRef | None = None
    """The key of a Secret under which the value is stored."""
    config_map_key_ref: ConfigMapKeyRef | None = None
    """The key of a ConfigMap under which the value is stored."""


class EnvVar(ApiModel):
    """An environment variable of the trainer. Exactly one of `value` and `valueFrom` must be set."""

    model_config = ConfigDict(
        json_schema_extra=join(
            exactly_one_of("value", "valueFrom"),
            cel(
                (
                    f"!{list(RESERVED_VARIABLE_PREFIXES)}.exists(prefix, self.name.startsWith(prefix))"
                    " && self.name != 'HOME'",
                    f"`name` must not be HOME or begin with {', '.join(RESERVED_VARIABLE_PREFIXES)}:"
                    " the operator has these",
                )
            ),
        )
    )

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """Name of the variable, for example `NCCL_DEBUG`."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Value of the variable."""
    value_from: EnvVarSource | None = None
    """Secret or ConfigMap that holds the variable's value."""


class ClaimVolume(ApiModel):
    """A volume that a PersistentVolumeClaim provides."""

    claim_name: ObjectName
    """`metadata.name` of the PersistentVolumeClaim in the job's namespace."""


class ConfigMapVolume(ApiModel):
    """A ConfigMap whose keys are mounted as files."""

    name: ObjectName
    """`metadata.name` of the ConfigMap in the job's namespace."""


class SecretVolume(ApiModel):
    """A Secret whose keys are mounted as files."""

    secret_name: ObjectName
    """`metadata.name` of the Secret in the job's namespace."""


class EmptyDirVolume(ApiModel):
    """A folder that is empty at first and is deleted with the pod."""

    medium: Literal["Memory"] | None = None
    """Memory: the folder is in memory, and its content counts towards `resources.memory`. Absent: the folder is on the
    node's disk."""
    size_limit: VolatileMemory | None = None
    """Largest size of the folder's content, for example `10Gi`. Absent: no limit."""


class CsiVolume(ApiModel):
    """An ephemeral inline volume of a CSI driver."""

    driver: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([-.A-Za-z0-9]*[A-Za-z0-9])?$")]
    """Name of the CSI driver, for example `secrets-store.csi.k8s.io`."""
    volume_attributes: (
        Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=32), ENTRIES] | None
    ) = None
    """Parameters of the driver; the driver's documentation lists them."""


class Volume(ApiModel):
    """A volume of the pods, and the path where it is mounted. Exactly one kind of volume must be set."""

    model_config = ConfigDict(
        json_schema_extra=join(
            exactly_one_of("persistentVolumeClaim", "configMap", "secret", "emptyDir", "csi"),
            cel(
                (
                    f"!{list(RESERVED_FOLDERS)}"
                    ".exists(own, self.mountPath == own || self.mountPath.startsWith(own + '/'))",
                    f"`mountPath` must not be {', '.join(RESERVED_FOLDERS)} or below: the pods need these themselves",
                )
            ),
        )
    )

    name: Annotated[DnsLabel, Field(max_length=56)]
    """Name of the volume."""
    mount_path: Annotated[str, Field(max_length=512, pattern=r"^(/[A-Za-z0-9_][-._A-Za-z0-9]*)+$")]
    """Absolute path in the trainer's container, for example `/cache`."""
    read_only: bool | None = None
    """true mounts the volume read-only. Absent: the volume is writable, except for a ConfigMap or a Secret, which
    Kubernetes always mounts read-only."""
    persistent_volume_claim: ClaimVolume | None = None
    """A volume that a PersistentVolumeClaim provides."""
    config_map: ConfigMapVolume | None = None
    """A ConfigMap whose keys are mounted as files."""
    secret: SecretVolume | None = None
    """A Secret whose keys are mounted as files."""
    empty_dir: EmptyDirVolume | None = None
    """A folder that is empty at first and is deleted with the pod."""
    csi: CsiVolume | None = None
    """An ephemeral inline volume of a CSI driver."""


class Capabilities(ApiModel):
    """Capabilities of the trainer's container. All others are dropped."""

    add: Annotated[list[Literal["IPC_LOCK"]], Field(max_length=1, json_schema_extra=SET), UNIQUE] = []
    """Capabilities that the container gets. IPC_LOCK lets the ranks lock any amount of memory, which RDMA needs where
    the limit of the node's container runtime is low. The interpreter in the image must carry the capability too, as in
    the image for clusters with RDMA. The Pod Security Standards `baseline` and `restricted` forbid the capability, so
    the namespace must allow `privileged`."""


class SecurityContext(ApiModel):
    """The parts of the security context of the trainer's container that users may set."""

    capabilities: Capabilities | None = None
    """Capabilities of the container. Absent: none."""


class PodTemplateSpec(ApiModel):
    """The parts of the training pods that users may set."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.volumes.all(one, self.volumes.exists_one(other, one.mountPath == other.mountPath))",
                "`volumes` must have different `mountPath`s",
            ),
            _label_keys("labels"),
            _label_keys("annotations"),
            _label_keys("nodeSelector"),
        )
    )

    image: Annotated[str, Field(min_length=1, max_length=512, pattern=WORD_PATTERN)] | None = None
    """Trainer image, for example `registry.example.com/finetune-trainer:0.1.0`. Absent: the image that the operator was
    installed with."""
    image_pull_secrets: Annotated[
        list[LocalObjectReference], Field(max_length=8, json_schema_extra=by_key("name")), UNIQUE_NAMES
    ] = []
    """Secrets of type `kubernetes.io/dockerconfigjson` that are used to pull the image."""
    service_account_name: ObjectName = "default"
    """ServiceAccount of the pods. No token for the API server is mounted into the pods."""
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16), ENTRIES] = {}
    """Node labels that the pods need, in addition to `resources.gpuProduct`."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = []
    """Additional tolerations of the pods. The operator itself tolerates, for a limited time, that the node of a pod is
    not ready or unreachable."""
    affinity: Affinity | None = None
    """Rules about the nodes that the pods run on, and about their distance to other pods."""
    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=32), ENTRIES] = {}
    """Additional labels of the pods."""
    annotations: Annotated[dict[LabelKey, Annotated[str, Field(max_length=4096)]], Field(max_length=32), ENTRIES] = {}
    """Additional annotations of the pods."""
    env: Annotated[list[EnvVar], Field(max_length=64, json_schema_extra=by_key("name")), UNIQUE_NAMES] = []
    """Additional environment variables of the trainer."""
    volumes: Annotated[list[Volume], Field(max_length=16, json_schema_extra=by_key("name")), UNIQUE_NAMES] = []
    """Additional volumes, each mounted into the trainer's container."""
    security_context: SecurityContext | None = None
    """Security context of the trainer's container. Absent: the pods satisfy the Pod Security Standard `restricted`. The
    pods of the preflight check always do."""
