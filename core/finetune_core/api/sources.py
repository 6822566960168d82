"""The places that a job's model and data come from: the sections `model`, `dataset.train`, `dataset.validation` and
`dataset.test`."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_core.api.base import SET, UNIQUE, ApiModel, ObjectName, S3Uri, SecretKey, exactly_one_of

RepositoryName = Annotated[
    str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][-._A-Za-z0-9]*(/[A-Za-z0-9_][-._A-Za-z0-9]*)?$")
]
"""Name of a repository on the Hugging Face Hub, for example `openai/gsm8k`."""
Revision = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[-._/A-Za-z0-9]+$")]
"""Branch, tag or commit of a repository on the Hugging Face Hub."""


class SecretKeyRef(ApiModel):
    """A key of a Secret in the job's namespace."""

    name: ObjectName
    """`metadata.name` of the Secret."""
    key: SecretKey
    """Key in the Secret's `data`, for example `token`."""


class HuggingFaceSource(ApiModel):
    """A model repository on the Hugging Face Hub."""

    repo: RepositoryName
    """Name of the repository, for example `meta-llama/Llama-2-7b-hf`."""
    revision: Revision = "main"
    """Branch, tag or commit. With a commit every run loads the same files."""
    token_secret_ref: SecretKeyRef | None = None
    """Access token of the Hugging Face Hub, needed for a gated or private repository."""


class HuggingFaceDataSource(ApiModel):
    """A split of a data set on the Hugging Face Hub."""

    repo: RepositoryName
    """Name of the data set's repository, for example `openai/gsm8k`."""
    revision: Revision = "main"
    """Branch, tag or commit. With a commit every run loads the same rows."""
    subset: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Name of the data set's configuration, for example `main`. Absent: the configuration `default`, or the only one of
    the data set."""
    split: Annotated[str, Field(min_length=1, max_length=200)]
    """Name of the split, for example `train`."""
    token_secret_ref: SecretKeyRef | None = None
    """Access token of the Hugging Face Hub, needed for a gated or private data set."""


class S3Source(ApiModel):
    """Files in the object store that `storage` describes."""

    uri: S3Uri
    """`s3://bucket/prefix` of a model's folder, or `s3://bucket/key` of one data file."""


class VolumeSource(ApiModel):
    """Files on a PersistentVolumeClaim, which the pods mount read-only."""

    claim_name: ObjectName
    """`metadata.name` of the PersistentVolumeClaim in the job's namespace."""
    path: Annotated[str, Field(max_length=1024, pattern=r"^[^/\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*$")]
    """Path of the model's folder or of the data file inside the volume, without a leading slash."""


class ModelSpec(ApiModel):
    """The base model: a folder with `config.json`, tokenizer files and safetensors. Exactly one source must be set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("huggingFace", "s3", "volume"))

    hugging_face: HuggingFaceSource | None = None
    """A model repository on the Hugging Face Hub."""
    s3: S3Source | None = None
    """A folder in the object store that `storage` describes."""
    volume: VolumeSource | None = None
    """A folder on a PersistentVolumeClaim."""
    added_tokens: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=64, json_schema_extra=SET), UNIQUE
    ] = []
    """Tokens that are added to the tokenizer, for example `["<START_Q>"]`. The initial values of their embedding rows
    are random, with the seed `training.seed`. The artifact contains the tokens. With LoRA the input embedding and the
    output head get an adapter unless `lora.targetModules` is set."""


class DataSource(ApiModel):
    """One data file (`.jsonl`, `.csv` or `.parquet`), or a split of a data set on the Hugging Face Hub. Exactly one of
    the fields must be set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("huggingFace", "s3", "volume"))

    hugging_face: HuggingFaceDataSource | None = None
    """A split of a data set on the Hugging Face Hub."""
    s3: S3Source | None = None
    """A file in the object store that `storage` describes."""
    volume: VolumeSource | None = None
    """A file on a PersistentVolumeClaim."""
