"""The FineTuneJob object itself: API group, version, names, and the columns of `kubectl get`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from finetune_core.api.base import JOB_NAME_LENGTH, JOB_NAME_PATTERN, ApiModel
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.api.status import FineTuneJobStatus

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SINGULAR = "finetunejob"
SHORT_NAME = "ftj"
NAME_PATTERN = JOB_NAME_PATTERN
NAME_MAX_LENGTH = JOB_NAME_LENGTH
NAMESPACE_PATTERN = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
"""Pattern that the name of a namespace must match, as in the API server. The name is a DNS label."""
NAME_RULE = (
    f"self.metadata.name.matches('{NAME_PATTERN}') && self.metadata.name.size() <= {NAME_MAX_LENGTH}",
    "`metadata.name` must start with a letter, hold only a-z, 0-9 and '-', and have at most"
    f" {NAME_MAX_LENGTH} characters",
)
"""CEL rule about `metadata.name`, and the message for a name that violates the rule. The rule is stricter than
Kubernetes' rule for names, because the names of the job's Services begin with the job's name. The name of a Service
must begin with a letter and have at most 63 characters."""

OTHER_JOB_RULE = (
    "!has(self.spec) || !has(self.spec.model.adapter) || !has(self.spec.model.adapter.job)"
    " || self.spec.model.adapter.job.name != self.metadata.name",
    "`spec.model.adapter.job.name` must name another job",
)
"""CEL rule that a job must not start from its own artifact, and the message for a job that does."""


class Metadata(BaseModel):
    """The fields of a job's `metadata` that the project reads. All other fields of Kubernetes' ObjectMeta are
    ignored."""

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
    """Fine-tunes a language model: trains either LoRA adapters or every parameter. The status shows the progress and
    the result."""

    api_version: str = API_VERSION
    kind: str = KIND
    metadata: Metadata
    spec: FineTuneJobSpec
    """The base model, the data, the training method, the machines, and the place of the result."""
    status: FineTuneJobStatus | None = None
    """What the operator observed: conditions, attempts, progress, scores and the artifact."""


def printer_columns() -> list[dict[str, Any]]:
    """Return the columns of `kubectl get ftj`. Columns with priority 1 are shown only with `-o wide`."""
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
