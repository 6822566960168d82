"""The object store, the checkpoints in it and what is exported: `storage`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ApiModel, ObjectName, S3Uri, SecretKey, at_most_one_of, exactly_one_of

Addressing = Literal["Path", "VirtualHosted"]
Export = Literal["Adapter", "Merged", "Both"]
"""SHORT"""


class CredentialsSecretRef(ApiModel):
    """A Secret with the keys `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and optionally `AWS_SESSION_TOKEN`."""

    name: ObjectName
    """Name of the Secret in the job's namespace."""


class ConfigMapKeyRef(ApiModel):
    """A key of a ConfigMap in the job's namespace."""

    name: ObjectName
    """Name of the ConfigMap."""
    key: SecretKey
    """Key in the ConfigMap."""


class CheckpointSpec(ApiModel):
    """When checkpoints are committed and how many stay."""

    model_config = ConfigDict(json_schema_extra=at_most_one_of("everySteps", "everyMinutes"))

    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Optimizer steps between two checkpoints; default 100 unless `everyMinutes` is set."""
    every_minutes: Annotated[int, Field(ge=1, le=10_080)] | None = None
    """Minutes between two checkpoints."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 2
    """How many of the newest checkpoints stay in the bucket; may change, the next attempt obeys it."""
    keep_best: Annotated[int, Field(ge=1, le=100)] = 1
    """How many of the best checkpoints stay beside them; may change, the next attempt obeys it."""


class S3ManagedKey(ApiModel):
    """SSE-S3: the store encrypts with keys of its own."""


class KmsKey(ApiModel):
    """SSE-KMS: the store encrypts with a key of its key management service."""

    key_id: Annotated[str, Field(min_length=1, max_length=2048, pattern=r"^[^ \t\r\n\f]+$")]
    """Name, id or ARN of the key."""


class EncryptionSpec(ApiModel):
    """Server-side encryption of everything that the job writes: exactly one member."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("sseS3", "kms"))

    sse_s3: S3ManagedKey | None = None
    """SSE-S3: keys of the store."""
    kms: KmsKey | None = None
    """SSE-KMS: a key of the key management service."""


class StorageSpec(ApiModel):
    """The object store that checkpoints, metrics and the artifact go to."""

    uri: S3Uri
    """`s3://bucket/prefix`; the job writes below `<uri>/<namespace>/<name>/<runId>/`."""
    endpoint: Annotated[str, Field(max_length=512, pattern=r"^https?://[^/ \t\r\n\f]+$")] | None = None
    """Address of a MinIO or another S3-compatible store; default: Amazon S3 in `region`."""
    region: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[-a-zA-Z0-9]+$")] = "us-east-1"
    """Region for request signatures."""
    credentials_secret_ref: CredentialsSecretRef | None = None
    """Where the access key lies; absent: the pod's own identity (web identity such as IRSA, EKS Pod Identity, the
    node's role, or `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` in its environment)."""
    ca_config_map_ref: ConfigMapKeyRef | None = None
    """Certificates (PEM) that sign the endpoint's; absent: those of the image."""
    addressing: Addressing | None = None
    """Where the bucket's name goes in a request: into the path (`https://host/bucket/key`) or into the host name
    (`https://bucket.host/key`); default: VirtualHosted at Amazon S3, Path elsewhere."""
    encryption: EncryptionSpec | None = None
    """Server-side encryption that is asked for with each object; absent: what the bucket does by default."""
    run_id: Annotated[str, Field(max_length=63, pattern=r"^[a-zA-Z0-9]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?$")] | None = None
    """Name of the run in the bucket; default: the job's uid. A job created anew with the same runId resumes, or finds
    its artifact and is done."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When checkpoints are committed and how many stay."""
    artifact: Export | None = None
    """What is exported after LoRA: the adapter, the base model with the adapter merged into it, or both; default
    Adapter. Must be absent with `method: Full`, which exports the model."""

    @property
    def endpoint_url(self) -> str:
        """SHORT"""
        return self.endpoint or f"https://s3.{self.region}.amazonaws.com"
