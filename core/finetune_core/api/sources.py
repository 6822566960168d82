"""Where a job's model and data come from: the members of `model` and of `dataset.train`, `validation`, `test`."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_core.api.base import SET, UNIQUE, ApiModel, ObjectName, S3Uri, SecretKey, exactly_one_of

RepositoryName = Annotated[
    str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][-._A-Za-z0-9]*(/[A-Za-z0-9_][-._A-Za-z0-9]*)?$")
]
Revision = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[-._/A-Za-z0-9]+$")]


class SecretKeyRef(ApiModel):
    """A key of a Secret in the job's namespace."""

    name: ObjectName
    """Name of the Secret."""
    key: SecretKey
    """Key in the Secret."""


class HuggingFaceSource(ApiModel):
    """A model repository on the Hugging Face Hub."""

    repo: RepositoryName
    """Repository, such as `meta-llama/Llama-2-7b-hf`."""
    revision: Revision = "main"
    """Branch, tag or commit. A commit makes the run repeatable."""
    token_secret_ref: SecretKeyRef | None = None
    """Token for a gated repository."""


class HuggingFaceDataSource(ApiModel):
    """A split of a data set on the Hugging Face Hub."""

    repo: RepositoryName
    """Repository, such as `openai/gsm8k`."""
    revision: Revision = "main"
    """Branch, tag or commit. A commit makes the run repeatable."""
    subset: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Name of the configuration, such as `main`; absent where the data set has only one."""
    split: Annotated[str, Field(min_length=1, max_length=200)]
    """Split, such as `train`."""
    token_secret_ref: SecretKeyRef | None = None
    """Token for a gated repository."""


class S3Source(ApiModel):
    """Files in the object store of `storage`."""

    uri: S3Uri
    """`s3://bucket/prefix` of a model, or `s3://bucket/key` of a data file."""


class VolumeSource(ApiModel):
    """Files on a PersistentVolumeClaim, mounted read-only."""

    claim_name: ObjectName
    """Name of the PersistentVolumeClaim."""
    path: Annotated[str, Field(max_length=1024, pattern=r"^[^/\x00-\x1f][^\x00-\x1f]*$")]
    """Path inside the volume, without a leading slash."""


class ModelSpec(ApiModel):
    """The base model, a folder with `config.json`, tokenizer files and safetensors: exactly one source is set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("huggingFace", "s3", "volume"))

    hugging_face: HuggingFaceSource | None = None
    """A repository on the Hugging Face Hub."""
    s3: S3Source | None = None
    """Files in the object store of `storage`."""
    volume: VolumeSource | None = None
    """Files on a PersistentVolumeClaim."""
    added_tokens: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=64, json_schema_extra=SET), UNIQUE
    ] = []
    """Tokens that the tokenizer gets in addition, such as `<START_Q>`. Their new rows follow from `training.seed` and
    the artifact carries them; with LoRA both embeddings get an adapter unless `lora.targetModules` says otherwise."""


class DataSource(ApiModel):
    """One data file (`.jsonl`, `.csv` or `.parquet`) or a split on the Hub: exactly one of the members is set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("huggingFace", "s3", "volume"))

    hugging_face: HuggingFaceDataSource | None = None
    """A split of a data set on the Hugging Face Hub."""
    s3: S3Source | None = None
    """A file in the object store of `storage`."""
    volume: VolumeSource | None = None
    """A file on a PersistentVolumeClaim."""
