"""What a job trains, in a form in which two jobs can be compared: a digest of the settings that define the training,
and the identities of base model and data.

The trainer records both for each run in the bucket. The preflight check of a job whose status is lost, for example in a
cluster that was built anew, finds a run with equal values there, and the job then takes that run over.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
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
    "model.hugging_face.token_secret_ref",
    "dataset.train.hugging_face.token_secret_ref",
    "dataset.validation.hugging_face.token_secret_ref",
    "dataset.test.hugging_face.token_secret_ref",
    "optimization.micro_batch_size",
    "optimization.gradient_checkpointing",
    "optimization.zero_stage",
    "optimization.offload_optimizer",
    "optimization.offload_parameters",
    "evaluation.generation.batch_size",
    "stability.stall_timeout_seconds",
    "storage.uri",
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
"""Fields of the run file that do not define what is trained: on which machines and how the work is divided, where the
bucket is, and how often checkpoints are written. All other fields do, also those that later versions add."""


class TrainingRecord(ContractModel):
    """What a run trains. Two runs with equal records train the same."""

    settings_sha256: Sha256
    """`settings_digest` of the run file."""
    inputs: Annotated[dict[str, Sha256], Field(max_length=8)]
    """Identity of the base model and of each data source as they were when the run began, by the path in the spec, for
    example `dataset.train`."""


def settings_digest(config: RunConfig) -> str:
    """Return the sha256 of all settings in ``config`` that define what is trained.

    Absent fields are left out. So the digest of an older run stays valid where a later version adds an optional field.
    """
    return digest_of_fields(config.model_dump(mode="json", exclude_none=True))


def digest_of_fields(run_file: Mapping[str, Any]) -> str:
    """Return `settings_digest` of a run file whose fields are given by name, as JSON values and without absent ones."""
    fields = copy.deepcopy(dict(run_file))
    for path in NOT_THE_TRAINING:
        *sections, name = path.split(".")
        section = fields
        for part in sections:
            section = section.get(part, {})
        section.pop(name, None)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
