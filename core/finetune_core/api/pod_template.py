"""The parts of the pods that people need to set: `podTemplate`, typed subsets of core/v1."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.affinity import Affinity
from finetune_core.api.base import (
    ENTRIES,
    UNIQUE_NAMES,
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

OWN_FOLDERS = (
    "/etc/finetune",
    "/var/run/finetune",
    "/var/run/secrets",
    "/run",
    "/scratch",
    "/tmp",  # noqa: S108  (a path in the pod)
    "/dev",
    "/proc",
    "/sys",
)
"""What the pods mount themselves, or could not start without."""
OWN_VARIABLE_PREFIXES = ("FTJ_", "PET_", "AWS_")
"""Environment variables that the operator sets or the store's credentials would be confused by."""


LABEL_KEY = r"^([a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?$"


def _label_keys(field: str) -> tuple[str, str]:
    """Return the CEL rule about the keys of a map of labels: a schema can't bound them."""
    return (
        f"self.{field}.all(key, key.matches('{LABEL_KEY}'))",
        f"`{field}` must have keys such as `team` or `example.com/team`",
    )


class Toleration(ApiModel):
    """A toleration of the pods, as in core/v1."""

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
    """Taint key; absent matches all."""
    operator: Literal["Exists", "Equal"] | None = None
    """How key and value are compared; absent: Equal."""
    value: LabelValue | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; absent matches all."""
    toleration_seconds: Annotated[int, Field(ge=0, le=86400)] | None = None
    """How long a NoExecute taint is tolerated."""


class LocalObjectReference(ApiModel):
    """The name of an object in the job's namespace."""

    name: ObjectName
    """Name of the object."""


class EnvVarSource(ApiModel):
    """Where the value of a variable comes from: exactly one of the members is set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("secretKeyRef", "configMapKeyRef"))

    secret_key_ref: SecretKeyRef | None = None
    """A key of a Secret."""
    config_map_key_ref: ConfigMapKeyRef | None = None
    """A key of a ConfigMap."""


class EnvVar(ApiModel):
    """An environment variable of the trainer: exactly one of `value`, `valueFrom` is set."""

    model_config = ConfigDict(
        json_schema_extra=join(
            exactly_one_of("value", "valueFrom"),
            cel(
                (
                    f"!{list(OWN_VARIABLE_PREFIXES)}.exists(prefix, self.name.startsWith(prefix))"
                    " && self.name != 'HOME'",
                    f"`name` must not be HOME or begin with {', '.join(OWN_VARIABLE_PREFIXES)}: the operator has these",
                )
            ),
        )
    )

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value."""
    value_from: EnvVarSource | None = None
    """Where its value comes from."""


class ClaimVolume(ApiModel):
    """A PersistentVolumeClaim."""

    claim_name: ObjectName
    """Name of the claim."""


class ConfigMapVolume(ApiModel):
    """The keys of a ConfigMap as files."""

    name: ObjectName
    """Name of the ConfigMap."""


class SecretVolume(ApiModel):
    """The keys of a Secret as files."""

    secret_name: ObjectName
    """Name of the Secret."""


class EmptyDirVolume(ApiModel):
    """An empty folder that lives as long as the pod."""

    medium: Literal["Memory"] | None = None
    """Memory: it lies in memory and counts towards `resources.memory`."""
    size_limit: VolatileMemory | None = None
    """Largest size."""


class CsiVolume(ApiModel):
    """An ephemeral volume of a CSI driver."""

    driver: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([-.A-Za-z0-9]*[A-Za-z0-9])?$")]
    """Name of the driver."""
    volume_attributes: (
        Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=32), ENTRIES] | None
    ) = None
    """What the driver needs to know."""


class Volume(ApiModel):
    """A volume and where it is mounted: exactly one kind of volume is set."""

    model_config = ConfigDict(
        json_schema_extra=join(
            exactly_one_of("persistentVolumeClaim", "configMap", "secret", "emptyDir", "csi"),
            cel(
                (
                    f"!{list(OWN_FOLDERS)}.exists(own, self.mountPath == own || self.mountPath.startsWith(own + '/'))",
                    f"`mountPath` must not be {', '.join(OWN_FOLDERS)} or below: the pods need these themselves",
                )
            ),
        )
    )

    name: Annotated[DnsLabel, Field(max_length=56)]
    """Name of the volume."""
    mount_path: Annotated[str, Field(max_length=512, pattern=r"^(/[A-Za-z0-9_][-._A-Za-z0-9]*)+$")]
    """Absolute path in the container."""
    read_only: bool | None = None
    """Mount it read-only; absent: writable."""
    persistent_volume_claim: ClaimVolume | None = None
    """A PersistentVolumeClaim."""
    config_map: ConfigMapVolume | None = None
    """The keys of a ConfigMap as files."""
    secret: SecretVolume | None = None
    """The keys of a Secret as files."""
    empty_dir: EmptyDirVolume | None = None
    """An empty folder that lives as long as the pod."""
    csi: CsiVolume | None = None
    """An ephemeral volume of a CSI driver."""


class PodTemplateSpec(ApiModel):
    """The parts of the pods that people need to set."""

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

    image: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^ \t\r\n\f]+$")] | None = None
    """Trainer image; default: the one that the operator was installed with."""
    image_pull_secrets: Annotated[
        list[LocalObjectReference], Field(max_length=8, json_schema_extra=by_key("name")), UNIQUE_NAMES
    ] = []
    """Secrets for the registry."""
    service_account_name: ObjectName = "default"
    """ServiceAccount of the pods; its token is not mounted."""
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16), ENTRIES] = {}
    """Node labels that the pods need, beside `resources.gpuProduct`."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = []
    """Taints that the pods tolerate."""
    affinity: Affinity | None = None
    """Which nodes the pods need or prefer, and which pods they go to or stay away from."""
    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=32), ENTRIES] = {}
    """Labels of the pods."""
    annotations: Annotated[dict[LabelKey, Annotated[str, Field(max_length=4096)]], Field(max_length=32), ENTRIES] = {}
    """Annotations of the pods."""
    env: Annotated[list[EnvVar], Field(max_length=64, json_schema_extra=by_key("name")), UNIQUE_NAMES] = []
    """Environment variables of the trainer."""
    volumes: Annotated[list[Volume], Field(max_length=16, json_schema_extra=by_key("name")), UNIQUE_NAMES] = []
    """Volumes of the pods, each mounted into the trainer."""
