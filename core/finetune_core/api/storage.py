"""`storage`: the object store and the access to it, the checkpoints, the cache of model files, and the form of the
exported artifact."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import (
    HTTP_ADDRESS_PATTERN,
    WORD_PATTERN,
    ApiModel,
    ObjectName,
    S3Uri,
    SecretKey,
    at_most_one_of,
    cel,
    exactly_one_of,
)
from finetune_core.api.resources import VolatileMemory

Addressing = Literal["Path", "VirtualHosted"]
"""Place of the bucket's name in a request to the object store: Path (`https://host/bucket/key`) or VirtualHosted
(`https://bucket.host/key`)."""
Export = Literal["Adapter", "Merged", "Both"]
"""Form of the artifact of a LoRA job: the adapter, the merged model, or both."""


RESERVED_AUDIENCES = ("finetune.dev/", "https://kubernetes.default.svc")
"""Texts with which the audience of a token for the object store must not begin. The audiences of tokens for reports to
the operator begin with the first text. The second text is the audience of the API server in most clusters."""
RunId = Annotated[str, Field(max_length=63, pattern=r"^[a-zA-Z0-9]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?$")]
"""Name of the folder in the bucket that holds all runs of a job, for example `study-1` or a job's uid."""


class CredentialsSecretRef(ApiModel):
    """A Secret with the keys `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and optionally `AWS_SESSION_TOKEN`."""

    name: ObjectName
    """`metadata.name` of the Secret in the job's namespace, for example `storage-credentials`."""


class IdentitySpec(ApiModel):
    """A token of the pods' service account, whose name is `podTemplate.serviceAccountName`. The pods exchange the token
    for a temporary access key with the request AssumeRoleWithWebIdentity."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                f"!{list(RESERVED_AUDIENCES)}.exists(prefix, self.audience.startsWith(prefix))",
                f"`audience` must not begin with {' or '.join(RESERVED_AUDIENCES)}: the token is for the store only",
            )
        )
    )

    audience: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[!-~]+$")]
    """Audience of the token, for example `minio`. The store must be configured to accept this audience. MinIO calls
    that setting client id."""
    sts_endpoint: Annotated[str, Field(max_length=512, pattern=HTTP_ADDRESS_PATTERN)] | None = None
    """Address of the security token service (STS). Absent: the address in `endpoint`, because MinIO is object store and
    token service in one. Where `endpoint` is absent too: Amazon's service in `region`."""
    role_arn: Annotated[str, Field(min_length=20, max_length=2048, pattern=r"^[!-~]+$")] | None = None
    """Role that the pods assume, for example `arn:minio:iam:::role/NAME`. Absent: the claims in the token decide what
    the pods may do, which MinIO supports."""


class ConfigMapKeyRef(ApiModel):
    """A key of a ConfigMap in the job's namespace."""

    name: ObjectName
    """`metadata.name` of the ConfigMap."""
    key: SecretKey
    """Key in the ConfigMap's `data`, for example `ca.crt`."""


class CheckpointSpec(ApiModel):
    """How often checkpoints are saved, and how many of them are kept. A checkpoint is also saved after each evaluation
    that improves the best score, when the pods are told to stop (SIGTERM), and at the end of the training."""

    model_config = ConfigDict(json_schema_extra=at_most_one_of("everySteps", "everyMinutes"))

    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Optimizer steps between two checkpoints. Absent: 100, unless `everyMinutes` is set."""
    every_minutes: Annotated[int, Field(ge=1, le=10_080)] | None = None
    """Minutes between two checkpoints."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 2
    """Number of newest checkpoints that are kept in the bucket. A change takes effect with the next attempt."""
    keep_best: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of best checkpoints that are kept in the bucket even if they are not among the newest. A change takes
    effect with the next attempt."""


class S3ManagedKey(ApiModel):
    """SSE-S3: the object store encrypts with its own keys."""


class KmsKey(ApiModel):
    """SSE-KMS: the object store encrypts with a key of its key management service."""

    key_id: Annotated[str, Field(min_length=1, max_length=2048, pattern=WORD_PATTERN)]
    """Name, id or ARN of the key, for example `alias/finetune`."""


class EncryptionSpec(ApiModel):
    """Server-side encryption of every object that the job writes. Exactly one of the fields must be set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("sseS3", "kms"))

    sse_s3: S3ManagedKey | None = None
    """SSE-S3: the object store encrypts with its own keys."""
    kms: KmsKey | None = None
    """SSE-KMS: the object store encrypts with a key of its key management service."""


class EphemeralVolumeSpec(ApiModel):
    """A volume that is made for each pod and deleted with the pod (a generic ephemeral volume)."""

    size: VolatileMemory
    """Size of the volume, for example `500Gi`."""
    storage_class_name: ObjectName | None = None
    """StorageClass of the volume, for example one with the nodes' own disks. Absent: the cluster's default class."""


class CacheSpec(ApiModel):
    """Where the downloaded files of a model are kept, and with `claimName` also the tokenised rows. Exactly one of the
    fields must be set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("claimName", "ephemeral"))

    claim_name: ObjectName | None = None
    """`metadata.name` of a PersistentVolumeClaim in the job's namespace, on which all jobs that name this claim keep
    the files of models, and tokenised rows. A file that is on the claim already is not fetched again, no matter which
    pod, attempt or job put the file there. Only a file for which the source states no digest of the content, such as an
    object that is encrypted with SSE-KMS, is fetched anew by each job. With several nodes the claim must have the
    access mode ReadWriteMany. Every pod copies the files into its scratch folder, and compares the copies with their
    digests. Tokenised rows are encrypted, are kept only with `storage.credentialsSecretRef`, and take at most a tenth
    of the claim."""
    ephemeral: EphemeralVolumeSpec | None = None
    """A volume of each pod that holds the files of the base model instead of the scratch folder. This volume saves
    space in the scratch folder. Downloads are not saved, because every pod of every attempt has a new volume. The files
    of `model.adapter` stay in the scratch folder."""


class StorageSpec(ApiModel):
    """The object store for checkpoints, metrics and the artifact."""

    model_config = ConfigDict(json_schema_extra=at_most_one_of("credentialsSecretRef", "identity"))

    uri: S3Uri
    """`s3://bucket/prefix`, for example `s3://finetune/runs`. The job writes below `<uri>/<namespace>/<name>/<runId>/`.
    A LoRA job also writes below `<uri>/_bases/` if its adapter needs a changed copy of the base model, for example with
    `model.addedTokens`."""
    endpoint: Annotated[str, Field(max_length=512, pattern=HTTP_ADDRESS_PATTERN)] | None = None
    """Address of MinIO or another S3-compatible store, for example `http://minio.storage.svc:9000`. Absent: Amazon S3
    in `region`."""
    region: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[-a-zA-Z0-9]+$")] = "us-east-1"
    """Region for the signatures of requests."""
    credentials_secret_ref: CredentialsSecretRef | None = None
    """Secret that holds the access key. Absent: the access key comes from `identity` or, without that field, from the
    platform: a web identity such as IRSA, EKS Pod Identity, or the node's role."""
    identity: IdentitySpec | None = None
    """Token that the pods exchange for an access key. MinIO and Amazon S3 support this exchange. Absent: the
    operator mounts no token for the object store."""
    ca_config_map_ref: ConfigMapKeyRef | None = None
    """Name of a ConfigMap, and the key in it that holds the CA certificates (PEM) with which the object store's
    certificate is verified. Absent: the CA certificates in the image."""
    addressing: Addressing | None = None
    """Place of the bucket's name in a request: Path (`https://host/bucket/key`) or VirtualHosted
    (`https://bucket.host/key`). Absent: VirtualHosted for Amazon S3, Path for other stores."""
    encryption: EncryptionSpec | None = None
    """Server-side encryption that is requested for every object. Absent: the bucket's default encryption."""
    run_id: RunId | None = None
    """Name of the folder in the bucket that holds all runs of the job. A new job with the same name, namespace and
    runId resumes from the newest checkpoint, or takes over the artifact that is already there. Absent: the folder of a
    former job with the same name, namespace and training, if the preflight check finds one, else the job's uid. To
    train anew, set a name that no job has used."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """How often checkpoints are saved, and how many of them are kept."""
    cache: CacheSpec | None = None
    """Where the files of a base model from the Hugging Face Hub or the object store are kept: on a claim, so that not
    every pod of every attempt fetches them, or on a volume of each pod. The claim also keeps downloaded files
    of `model.adapter`. Must be absent with `model.volume`, because the files of such a model are used where they lie.
    Absent: each pod fetches the files into its scratch folder."""
    artifact: Export | None = None
    """Form of the exported artifact after LoRA: the adapter, the base model with the adapter merged into it, or both.
    Absent: Adapter. Must be absent with `method: Full`, which exports the whole model."""

    @property
    def endpoint_url(self) -> str:
        """Address of the object store without a slash at its end: `endpoint`, or Amazon S3 in `region`."""
        return (self.endpoint or f"https://s3.{self.region}.amazonaws.com").rstrip("/")
