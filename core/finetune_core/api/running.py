"""Where and how the pods run: `resources`, `storage`, `runPolicy` and `podTemplate`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ApiModel, LabelKey, LabelValue, ObjectName, Quantity, S3Uri, cel


class ResourcesSpec(ApiModel):
    """Machines: `nodes` pods with `gpusPerNode` GPUs each; one training process a GPU (one a pod without)."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.device == 'CPU' || self.gpusPerNode >= 1",
                "`gpusPerNode` must be at least 1 unless `device` is CPU",
            ),
        )
    )

    nodes: Annotated[int, Field(ge=1, le=99)] = 1
    """Number of pods, each on the GPUs of one machine."""
    gpus_per_node: Annotated[int, Field(ge=0, le=16)] = 1
    """`nvidia.com/gpu` of each pod; 0 only with `device: CPU`."""
    device: Literal["GPU", "CPU"] = "GPU"
    """What the trainer computes on. With GPU it never falls back to the CPU."""
    gpu_product: Annotated[str, Field(max_length=63)] = "NVIDIA-A100-SXM4-80GB"
    """Node label `nvidia.com/gpu.product` that pods with GPUs are bound to; empty means any."""
    cpu: Quantity = "8"
    """CPU request and limit of each pod."""
    memory: Quantity = "64Gi"
    """Memory request and limit of each pod."""
    shared_memory: Quantity = "16Gi"
    """Size of /dev/shm, which NCCL and data loading use; it counts towards `memory`."""


class CredentialsSecretRef(ApiModel):
    """A Secret with the keys `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and optionally `AWS_SESSION_TOKEN`."""

    name: ObjectName
    """Name of the Secret in the job's namespace."""


class CheckpointSpec(ApiModel):
    """When checkpoints are committed and how many stay."""

    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """Optimizer steps between two checkpoints."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 2
    """How many of the newest checkpoints stay in the bucket; the best one stays in any case."""


class StorageSpec(ApiModel):
    """The object store that checkpoints, metrics and the artifact go to."""

    uri: S3Uri
    """`s3://bucket/prefix`; the job writes below `<uri>/<namespace>/<name>/<runId>/`."""
    endpoint: Annotated[str, Field(max_length=512, pattern=r"^https?://[^/\s]+$")] | None = None
    """Address of a MinIO or another S3-compatible store; default: Amazon S3."""
    region: Annotated[str, Field(max_length=64)] = "us-east-1"
    """Region for request signatures."""
    credentials_secret_ref: CredentialsSecretRef
    """Where the access key lies."""
    run_id: Annotated[str, Field(max_length=63, pattern=r"^[a-zA-Z0-9]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?$")] | None = None
    """Name of the run in the bucket; default: the job's uid. A job created anew with the same runId resumes."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When checkpoints are committed and how many stay."""


class RunPolicySpec(ApiModel):
    """What the operator does around attempts."""

    max_retries: Annotated[int, Field(ge=0, le=100)] = 3
    """Retries after failures that count; lost pods and nodes are retried without being counted."""


class Toleration(ApiModel):
    """A toleration of the pods, as in core/v1."""

    key: Annotated[str, Field(max_length=317)] | None = None
    """Taint key; absent matches all."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How key and value are compared."""
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


class PodTemplateSpec(ApiModel):
    """The parts of the pods that people need to set."""

    image: Annotated[str, Field(max_length=512, pattern=r"^\S+$")] | None = None
    """Trainer image; default: the one that the operator was installed with."""
    image_pull_secrets: Annotated[list[LocalObjectReference], Field(max_length=8)] = []
    """Secrets for the registry."""
    service_account_name: ObjectName = "default"
    """ServiceAccount of the pods; its token is not mounted."""
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] = {}
    """Node labels that the pods need, beside `resources.gpuProduct`."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = []
    """Taints that the pods tolerate."""
    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=32)] = {}
    """Labels of the pods."""
    annotations: Annotated[dict[LabelKey, Annotated[str, Field(max_length=4096)]], Field(max_length=32)] = {}
    """Annotations of the pods."""
