"""Two values by which the trainings of two jobs can be compared: a digest of the settings that define the training, and
the identities of the base model and the data.

The trainer stores both values for each run in the bucket. The preflight check of a new job without `storage.runId`
looks in the bucket for runs of a former job with the same name and namespace, and with equal values. The job takes over
the runs that the check finds. So a job in a cluster that was built anew does not repeat its training.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any

from pydantic import Field

from finetune_core.contract.contract_model import ContractModel
from finetune_core.contract.run_file import RunConfig

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A sha256 in hexadecimal."""

NOT_THE_TRAINING = (
    "version",
    "world",
    "report",
    "template_date",
    "open_choices",
    "adapter_artifact",
    "model.hugging_face.token_secret_ref",
    "model.adapter.hugging_face.token_secret_ref",
    "dataset.train.hugging_face.token_secret_ref",
    "dataset.train.mix.hugging_face.token_secret_ref",
    "dataset.validation.hugging_face.token_secret_ref",
    "dataset.test.hugging_face.token_secret_ref",
    "optimization.micro_batch_size",
    "optimization.gradient_checkpointing",
    "optimization.attention",
    "optimization.zero_stage",
    "optimization.offload_optimizer",
    "optimization.offload_parameters",
    "evaluation.generation.batch_size",
    "evaluation.require",
    "stability.stall_timeout_seconds",
    "storage.uri",
    "storage.folder",
    "storage.endpoint",
    "storage.region",
    "storage.credentials",
    "storage.addressing",
    "storage.encryption",
    "storage.checkpoint_every_steps",
    "storage.checkpoint_every_minutes",
    "storage.keep_last",
    "storage.keep_best",
)
"""Fields of the run file that do not define what is trained. Among them are the machines, the division of the work, the
place of the bucket, the frequency of checkpoints, the scores that the trained model must reach, and the references to
access tokens. `adapter_artifact` is among them, because `TrainingRecord.inputs` has a digest of the adapter's content.
`template_date` is among them, because a job that continues a run takes over the day of that run. All other fields
define what is trained. This includes fields that later versions add. A path through a list means the fields of all its
items."""


class TrainingRecord(ContractModel):
    """The values that define what a run trains. Two runs with equal records train the same model with the same settings
    on the same data."""

    settings_sha256: Sha256
    """`settings_digest` of the run file."""
    inputs: Annotated[dict[str, Sha256], Field(max_length=8)]
    """For the base model, the adapter that the run started from, and each data source: a sha256 that identifies the
    content that the run read when it began. The key is the path in the spec, for example `dataset.train`."""
    template_date: date | None = None
    """`RunConfig.template_date` of the run, which a job that continues the run takes over."""


def settings_digest(config: RunConfig) -> str:
    """Return the sha256 of all settings in ``config`` that define what is trained.

    Fields that are None are left out of the digest. So a later version that adds an optional field computes the same
    digest for the settings of an older run.
    """
    return digest_of_fields(config.model_dump(mode="json", exclude_none=True))


def digest_of_fields(run_file: Mapping[str, Any]) -> str:
    """Return the same digest as `settings_digest`, for a run file in the form of a mapping of JSON values. The keys of
    ``run_file`` are the names of the fields in Python (snake_case), and fields that are None are left out."""
    fields = copy.deepcopy(dict(run_file))
    for path in NOT_THE_TRAINING:
        *sections, name = path.split(".")
        found = [fields]
        for part in sections:
            below = [section.get(part, {}) for section in found]
            found = [item for value in below for item in (value if isinstance(value, list) else [value])]
        for section in found:
            section.pop(name, None)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
