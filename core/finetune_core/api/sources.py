"""Where a job's model and data come from, and how a row becomes an example: `model` and `dataset`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ApiModel, ObjectName, S3Uri, SecretKey, ShortText, cel, exactly_one_of


class SecretKeyRef(ApiModel):
    """A key of a Secret in the job's namespace."""

    name: ObjectName
    """Name of the Secret."""
    key: SecretKey
    """Key in the Secret."""


class HuggingFaceSource(ApiModel):
    """A repository on the Hugging Face Hub."""

    repo: Annotated[str, Field(max_length=200, pattern=r"^[\w.-]+(/[\w.-]+)?$")]
    """Repository, such as `meta-llama/Llama-2-7b-hf`."""
    revision: Annotated[str, Field(max_length=200)] = "main"
    """Branch, tag or commit. A commit makes the run repeatable."""
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
    path: Annotated[str, Field(max_length=1024, pattern=r"^[^/].*$")]
    """Path inside the volume, without a leading slash."""


class Source(ApiModel):
    """One place to read from: exactly one of the members is set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("huggingFace", "s3", "volume"))

    hugging_face: HuggingFaceSource | None = None
    """A repository on the Hugging Face Hub."""
    s3: S3Source | None = None
    """Files in the object store of `storage`."""
    volume: VolumeSource | None = None
    """Files on a PersistentVolumeClaim."""


class DataSource(ApiModel):
    """One data file (`.jsonl` or `.csv`): exactly one of the members is set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("s3", "volume"))

    s3: S3Source | None = None
    """A file in the object store of `storage`."""
    volume: VolumeSource | None = None
    """A file on a PersistentVolumeClaim."""


class ModelSpec(Source):
    """The base model: a folder with `config.json`, tokenizer files and safetensors weights."""


class PromptCompletionFormat(ApiModel):
    """Rows with a prompt and its completion; only the completion (and the end token) is learned."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.template.contains('{prompt}')",
                "`template` must contain `{prompt}`, the place of the prompt",
            ),
            ("self.promptField != self.completionField", "`promptField` and `completionField` must differ"),
        )
    )

    prompt_field: Annotated[str, Field(min_length=1, max_length=128)] = "prompt"
    """Column that holds the prompt."""
    completion_field: Annotated[str, Field(min_length=1, max_length=128)] = "completion"
    """Column that holds the completion."""
    template: Annotated[str, Field(max_length=8192)] = "{prompt}"
    """Text before the completion; `{prompt}` stands for the prompt. The completion follows at once."""


class DatasetFormat(ApiModel):
    """How a row becomes an example: exactly one of the members is set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("promptCompletion"))

    prompt_completion: PromptCompletionFormat | None = None
    """Rows with a prompt and its completion."""


class DatasetSpec(ApiModel):
    """The examples to learn from, and those to validate with."""

    train: DataSource
    """Rows to train on."""
    validation: DataSource | None = None
    """Rows for validation perplexity; they choose the best checkpoint."""
    format: DatasetFormat
    """How a row becomes an example."""
    max_length: Annotated[int, Field(ge=8, le=131072)] = 512
    """Longest example in tokens, prompt and completion together."""
    long_rows: Literal["Fail", "Skip"] = "Fail"
    """What happens to rows longer than `maxLength`: the job fails before training, or they are counted and skipped."""
    bad_rows: Literal["Fail", "Skip"] = "Fail"
    """What happens to rows without a field or with an empty completion."""


__all__ = [
    "DataSource",
    "DatasetFormat",
    "DatasetSpec",
    "HuggingFaceSource",
    "ModelSpec",
    "PromptCompletionFormat",
    "S3Source",
    "SecretKeyRef",
    "ShortText",
    "Source",
    "VolumeSource",
]
