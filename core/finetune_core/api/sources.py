"""The places that a job's model and data come from: the sections `model`, `dataset.train`, `dataset.validation` and
`dataset.test`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import (
    ATOMIC,
    SET,
    UNIQUE,
    WEIGHT_PATTERN,
    ApiModel,
    JobName,
    ObjectName,
    S3Uri,
    SecretKey,
    cel,
    exactly_one_of,
    join,
)

RepositoryName = Annotated[
    str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][-._A-Za-z0-9]*(/[A-Za-z0-9_][-._A-Za-z0-9]*)?$")
]
"""Name of a repository on the Hugging Face Hub, for example `openai/gsm8k`."""
Revision = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[-._/A-Za-z0-9]+$")]
"""Branch, tag or commit of a repository on the Hugging Face Hub."""


PATH_PATTERN = r"^[^/\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*$"
"""Regular expression for a path without a leading slash and without control characters."""


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
    """Data files of a data set on the Hugging Face Hub. Exactly one of `split` and `path` must be set."""

    model_config = ConfigDict(
        json_schema_extra=join(
            exactly_one_of("split", "path"),
            cel(("has(self.split) || !has(self.subset)", "`subset` must be absent unless `split` is set")),
        )
    )

    repo: RepositoryName
    """Name of the data set's repository, for example `openai/gsm8k`."""
    revision: Revision | None = None
    """Branch, tag or commit. With a commit every run loads the same rows. Absent: the branch `main`."""
    subset: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Name of the data set's configuration, for example `main`. Absent: the configuration that the data card marks as
    the default, else the one called `default`, else the only one. Where the data card lists no configurations, `subset`
    is the name of a folder that contains the files, and is needed only if the files of the split lie in several
    folders."""
    split: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Name of the split, for example `train`. The split consists of the files that the data card lists for the split,
    as in the viewer of the hub. Where the data card lists no files, the split consists of the data files whose own name
    or folder contains the name of the split as a word. If no data file is named after any split, all data files belong
    to the split `train`."""
    path: Annotated[str, Field(max_length=1024, pattern=PATH_PATTERN)] | None = None
    """A file, folder or glob in the repository instead of a split, for example `data/*.parquet`."""
    token_secret_ref: SecretKeyRef | None = None
    """Access token of the Hugging Face Hub, needed for a gated or private data set."""


class S3Source(ApiModel):
    """Files in the object store that `storage` describes."""

    uri: S3Uri
    """`s3://bucket/prefix` of a model's folder. For data, `s3://bucket/key` of one file, `s3://bucket/prefix` of a
    folder, or a glob such as `s3://bucket/rows/*.jsonl`."""


class VolumeSource(ApiModel):
    """Files on a PersistentVolumeClaim, which the pods mount read-only."""

    claim_name: ObjectName
    """`metadata.name` of the PersistentVolumeClaim in the job's namespace."""
    path: Annotated[str, Field(max_length=1024, pattern=PATH_PATTERN)]
    """Path inside the volume, without a leading slash. For a model this is the path of the model's folder. For data
    this is the path of a file, of a folder with data files, or a glob such as `rows/*.jsonl`."""


AdapterUse = Literal["Continue", "Merge"]
"""What a job does with the adapter that it starts from."""


class JobSource(ApiModel):
    """A FineTuneJob whose committed artifact is taken."""

    name: JobName
    """`metadata.name` of another FineTuneJob in the same namespace. Its artifact must hold an adapter. The job starts
    after the other job has succeeded, and fails where the other job fails. All attempts use the same artifact, even if
    the other job is deleted or created anew after its artifact was found."""


class InitialAdapterSpec(ApiModel):
    """A LoRA adapter in peft's layout that the job starts from: a folder with `adapter_config.json` and
    `adapter_model.safetensors`. Exactly one source must be set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("huggingFace", "s3", "volume", "job"))

    hugging_face: HuggingFaceSource | None = None
    """A repository on the Hugging Face Hub."""
    s3: S3Source | None = None
    """A folder in the object store that `storage` describes."""
    volume: VolumeSource | None = None
    """A folder on a PersistentVolumeClaim."""
    job: JobSource | None = None
    """The artifact of another FineTuneJob of the namespace."""
    use: AdapterUse
    """Continue: the adapter itself is trained further, with `method: LoRA`. In `lora`, the rank, alpha, modules, rsLoRA
    and DoRA must be absent or those of the adapter. Merge: the adapter is merged into the base model first, and the
    training starts from the merged model, with either method. With `method: LoRA`, the new adapter belongs to the
    merged model, so the job publishes the merged model too unless `storage.artifact` is Merged."""


class ModelSpec(ApiModel):
    """The base model: a folder with `config.json`, tokenizer files and safetensors. Exactly one source must be set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("huggingFace", "s3", "volume"))

    hugging_face: HuggingFaceSource | None = None
    """A model repository on the Hugging Face Hub."""
    s3: S3Source | None = None
    """A folder in the object store that `storage` describes."""
    volume: VolumeSource | None = None
    """A folder on a PersistentVolumeClaim."""
    adapter: InitialAdapterSpec | None = None
    """A LoRA adapter that the training starts from, for example the artifact of an earlier job. Absent: the training
    starts from the base model as it is."""
    added_tokens: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=64, json_schema_extra=SET), UNIQUE
    ] = []
    """Tokens that are added to the tokenizer, for example `["<START_Q>"]`. The embedding row of each token begins with
    random values, with the seed `training.seed`. The artifact contains the tokens. With LoRA the input embedding and
    the output head get an adapter unless `lora.targetModules` is set."""


class DataSource(ApiModel):
    """Data files: one file, a folder, or a glob. Exactly one of the fields must be set.

    A file is read by its suffix: `.jsonl`, `.json` (an array of objects, or objects one behind the other), `.csv`,
    `.tsv`, `.parquet` or `.txt` (each line that is not blank is a row with the column `text`), each also with `.gz` or
    `.zst` behind it. The data files of a folder or a glob must be of one kind, and are read in the order of their
    paths. Files that are no data files are left out with a notice. Files and folders whose names begin with `.` or `_`
    are left out without a notice, unless the glob itself has the `.` or `_`. In a glob, `*` stands for any characters
    of one part of the path, `?` for one character, and `**` for any number of parts, also none.
    """

    model_config = ConfigDict(json_schema_extra=exactly_one_of("huggingFace", "s3", "volume"))

    hugging_face: HuggingFaceDataSource | None = None
    """Files of a data set on the Hugging Face Hub."""
    s3: S3Source | None = None
    """Files in the object store that `storage` describes."""
    volume: VolumeSource | None = None
    """Files on a PersistentVolumeClaim."""


MIX_LIMIT = 8
"""Largest number of sources of a mix. `status.metrics` has room for a count of examples for each source."""
Weight = Annotated[str, Field(max_length=16, pattern=WEIGHT_PATTERN)]
"""A decimal number above 0, as a string because Kubernetes' API conventions forbid floats, for example `"0.5"`."""


class WeightedSource(DataSource):
    """A source of a mix. Exactly one of `huggingFace`, `s3` and `volume` must be set."""

    weight: Weight | None = None
    """Share of the examples that come from this source, relative to the weights of the other sources. With the weights
    `"3"` and `"1"`, three of four examples come from the first source. Absent in all sources of the mix: the weight of
    each source is its number of examples, so that each example is used once in an epoch."""


class TrainingSource(DataSource):
    """The training rows: files of one source, or a mix of several sources. Exactly one of the fields must be set."""

    model_config = ConfigDict(
        json_schema_extra=join(
            exactly_one_of("huggingFace", "s3", "volume", "mix"),
            cel(
                (
                    "!has(self.mix) || self.mix.all(part, has(part.weight)) || self.mix.all(part, !has(part.weight))",
                    "`weight` must be set in all sources of `mix` or in none",
                )
            ),
        )
    )

    mix: Annotated[list[WeightedSource], Field(min_length=1, max_length=MIX_LIMIT, json_schema_extra=ATOMIC)] | None = (
        None
    )
    """Several sources, from which the examples of each global batch are taken in fixed shares. An epoch has as many
    examples as all sources have together. Each source has its own random order, and an example is used again only after
    all other examples of its source. Which examples a step takes depends only on the seed and on the number of the
    step. `status.metrics` has, for each source, the number of examples that the training has gone through, for example
    `mix0Examples` for the first source. This number includes the examples of batches that a rollback skips."""
