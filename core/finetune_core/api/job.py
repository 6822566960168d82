"""The FineTuneJob object itself: group, version, names, printer columns."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from finetune_core.api.base import ApiModel
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.api.status import FineTuneJobStatus

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SINGULAR = "finetunejob"
SHORT_NAME = "ftj"
NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
NAME_MAX_LENGTH = 40
NAME_RULE = (
    f"self.metadata.name.matches('{NAME_PATTERN}') && self.metadata.name.size() <= {NAME_MAX_LENGTH}",
    "`metadata.name` must start with a letter, hold only a-z, 0-9 and '-', and have at most"
    f" {NAME_MAX_LENGTH} characters",
)
"""CEL rule and message: the names of pods and Services are made from it."""


class Metadata(BaseModel):
    """The parts of ObjectMeta that the project reads; the rest passes through unread."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    name: str = Field(pattern=NAME_PATTERN, max_length=NAME_MAX_LENGTH)
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class FineTuneJob(ApiModel):
    """A language model is fine-tuned with LoRA or with every parameter; the status shows how far it is."""

    api_version: str = API_VERSION
    kind: str = KIND
    metadata: Metadata
    spec: FineTuneJobSpec
    """What to fine-tune, on what, how, where, and where the result goes."""
    status: FineTuneJobStatus | None = None
    """What the operator observed."""


def printer_columns() -> list[dict[str, Any]]:
    """Return what `kubectl get ftj` shows; columns with priority 1 come with `-o wide`."""
    succeeded = ".status.conditions[?(@.type=='Succeeded')]"
    return [
        {
            "name": "Model",
            "type": "string",
            "jsonPath": ".spec.model['huggingFace','s3','volume']['repo','uri','path']",
        },
        {"name": "Method", "type": "string", "jsonPath": ".spec.method"},
        {"name": "State", "type": "string", "jsonPath": f"{succeeded}.reason"},
        {"name": "Step", "type": "integer", "jsonPath": ".status.progress.step"},
        {"name": "Of", "type": "integer", "jsonPath": ".status.progress.totalSteps"},
        {"name": "Loss", "type": "string", "jsonPath": ".status.metrics[?(@.name=='loss')].value"},
        {
            "name": "Perplexity",
            "type": "string",
            "jsonPath": ".status.metrics[?(@.name=='perplexity')].value",
        },
        {"name": "Checkpoint", "type": "integer", "jsonPath": ".status.checkpoints[?(@.last==true)].step"},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        {"name": "Attempts", "type": "integer", "jsonPath": ".status.attempts.started", "priority": 1},
        {"name": "Artifact", "type": "string", "jsonPath": ".status.artifact.uri", "priority": 1},
        {"name": "Message", "type": "string", "jsonPath": f"{succeeded}.message", "priority": 1},
    ]
