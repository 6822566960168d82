"""`status` of a FineTuneJob: what the operator observed, never an instruction. Written by the operator alone."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_core.api.base import ATOMIC, ApiModel, by_key
from finetune_core.api.conditions import Condition
from finetune_core.api.evaluation import ScoredRows
from finetune_core.api.resources import NODES_LIMIT

ATTEMPT_LIMIT = 999
"""SHORT"""
METRIC_LIMIT = 32
HISTORY_LIMIT = 60
CHECKPOINT_LIMIT = 100
RECENT_ATTEMPTS_LIMIT = 20
NOTICE_LIMIT = 8
INCIDENT_LIMIT = 20
MOST_HOLDERS = 2 * NODES_LIMIT
"""Pods of one attempt and those of the one before that still end."""

Decimal = Annotated[str, Field(max_length=32)]
Text = Annotated[str, Field(max_length=1024)]
Digest = Annotated[str, Field(max_length=64)]
Count = Annotated[int, Field(ge=0)]


class StatusModel(ApiModel):
    """A part of the status. Unknown fields are dropped: an operator that was rolled back reads a newer one's status."""

    model_config = ConfigDict(extra="ignore")


class PodRecord(StatusModel):
    """The first pod seen for a replica index: another uid later means that the pod was replaced."""

    index: Count
    """Replica index."""
    name: Annotated[str, Field(max_length=253)]
    """Name of the pod."""
    uid: Annotated[str, Field(max_length=64)]
    """uid of the first pod seen."""
    node: Annotated[str, Field(max_length=253)] = ""
    """Node of the pod; empty until it is scheduled."""


class AttemptCause(StatusModel):
    """Why the current attempt will end: recorded at first sight, before the evidence is cleaned up."""

    verdict: Annotated[str, Field(max_length=32)]
    """Succeeded, Permanent, Charged or Free."""
    reason: Annotated[str, Field(max_length=64)]
    """One CamelCase word."""
    message: Text = ""
    """A sentence for people."""
    node: Annotated[str, Field(max_length=253)] = ""
    """Node of the pod that decided."""
    time: datetime
    """When it was first seen."""


class CurrentAttempt(StatusModel):
    """The attempt that exists now."""

    number: Annotated[int, Field(ge=1, le=ATTEMPT_LIMIT)]
    """1 for the first."""
    start_time: datetime
    """When it was started."""
    admitted_time: datetime | None = None
    """When its place was granted: at its start, or when its queue resumed it; absent while a queue holds it."""
    running_time: datetime | None = None
    """When all its pods ran for the first time since then; absent until they do."""
    pods: Annotated[list[PodRecord], Field(max_length=NODES_LIMIT, json_schema_extra=ATOMIC)] = []
    """First pod seen per index."""
    cause: AttemptCause | None = None
    """Set once the attempt is known to end."""


class PastAttempt(StatusModel):
    """An attempt that ended."""

    number: Annotated[int, Field(ge=1, le=ATTEMPT_LIMIT)]
    """1 for the first."""
    verdict: Annotated[str, Field(max_length=32)]
    """Succeeded, Permanent, Charged or Free."""
    reason: Annotated[str, Field(max_length=64)]
    """One CamelCase word."""
    message: Text = ""
    """A sentence for people."""
    node: Annotated[str, Field(max_length=253)] = ""
    """Node of the pod that decided."""
    start_time: datetime
    """When it was started."""
    end_time: datetime
    """When it was accounted."""


class AttemptsStatus(StatusModel):
    """How often the job was started, and how that ended."""

    started: Count = 0
    """Attempts started."""
    charged: Count = 0
    """Attempts that count against `runPolicy.maxRetries`."""
    free: Count = 0
    """Attempts that ended through no fault of the job."""
    current: CurrentAttempt | None = None
    """The attempt that exists now."""
    recent: Annotated[list[PastAttempt], Field(max_length=RECENT_ATTEMPTS_LIMIT, json_schema_extra=ATOMIC)] = []
    """Newest ended attempts, oldest first."""
    next_start_time: datetime | None = None
    """End of the back-off, while the job waits for it."""


class PreflightStatus(StatusModel):
    """The check before the first attempt."""

    start_time: datetime
    """When it was begun, or begun anew after a suspension; `runPolicy.pendingDeadlineSeconds` counts from here."""
    tries: Count = 0
    """Tries that have ended."""
    verdict: Annotated[str, Field(max_length=32)] = ""
    """What the last try came to: Passed, Impossible, or Waiting for something outside; empty before the first."""
    message: Text = ""
    """What it found, for people."""
    next_try_time: datetime | None = None
    """When the next try starts, while something outside is waited for."""


class ProgressStatus(StatusModel):
    """How far the run is."""

    step: Count = 0
    """Global batches consumed."""
    total_steps: Count = 0
    """Global batches of the whole run."""
    epoch: Decimal = "0"
    """Passes over the training rows."""
    percentage: Annotated[int, Field(ge=0, le=100)] = 0
    """step / totalSteps."""
    eta_seconds: Count | None = None
    """Estimated time to the last step."""
    tokens_per_second: Decimal | None = None
    """Supervised and prompt tokens (no padding) per second over all processes."""
    mfu: Decimal | None = None
    """Model FLOPs utilisation: the share of the GPUs' peak that the model's arithmetic takes, from 0 to 1."""
    checkpoint_age_seconds: Count | None = None
    """How much training a lost pod would cost when the trainer last reported: time since the newest commit."""
    last_update_time: datetime | None = None
    """When the trainer last reported."""


class MetricValue(StatusModel):
    """The newest value of a metric."""

    name: Annotated[str, Field(max_length=64)]
    """Such as loss, perplexity, learningRate, gradientNorm."""
    value: Decimal
    """The value."""
    step: Count
    """Step it belongs to."""


class HistoryPoint(StatusModel):
    """A point of the curves."""

    step: Count
    """Global batches consumed."""
    loss: Decimal | None = None
    """Training loss of the step."""
    perplexity: Decimal | None = None
    """Validation perplexity after the step."""


class CheckpointStatus(StatusModel):
    """A committed checkpoint."""

    run: Annotated[int, Field(ge=1)]
    """Run number: every start and every rollback takes the next."""
    step: Count
    """Global batches consumed."""
    uri: Text
    """Folder in the bucket."""
    bytes: Count
    """Size of its files."""
    manifest_sha256: Digest
    """sha256 of manifest.json."""
    perplexity: Decimal | None = None
    """Validation perplexity at this step."""
    task_score: Decimal | None = None
    """Share of right answers at this step, where checkpoints are chosen by it."""
    time: datetime
    """When it was committed."""
    last: bool = False
    """The newest."""
    best: bool = False
    """The best by `evaluation.bestBy`."""
    damaged: Annotated[str, Field(max_length=256)] = ""
    """Why it can't be resumed from: the object and how it differs; empty where nothing is known to be wrong."""


class PlanStatus(StatusModel):
    """What was chosen where the spec leaves it open, and what it is expected to take."""

    zero_stage: Annotated[int, Field(ge=0, le=3)]
    """ZeRO stage."""
    processes: Annotated[int, Field(ge=1)]
    """Training processes over all pods."""
    micro_batch_size: Annotated[int, Field(ge=1)]
    """Examples that one process computes at once."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)]
    """Micro-batches per optimizer step."""
    gpu_memory_bytes: Count | None = None
    """Estimated peak of one GPU."""
    memory_bytes: Count | None = None
    """Estimated peak of one pod."""


class NamedScore(StatusModel):
    """One of the scores of a task."""

    name: Annotated[str, Field(max_length=32)]
    """Such as strict, orderFree, function, attributes, values (ViGGO), exact (GSM8K), execution (SQL)."""
    value: Decimal
    """Share of right answers, from 0 to 1."""


class Scores(StatusModel):
    """How well a model does on the rows that it was scored with."""

    perplexity: Decimal | None = None
    """exp of the mean loss over supervised tokens."""
    all_token_perplexity: Decimal | None = None
    """The same over the tokens of prompts and answers, as in Anyscale's study."""
    task_score: Decimal | None = None
    """Share of answers that the grader of `dataset.task` accepts, from 0 to 1."""
    scores: Annotated[list[NamedScore], Field(max_length=8, json_schema_extra=ATOMIC)] = []
    """Every score of the task."""
    graded: Count = 0
    """Answers that were graded; rows whose own answer can't be graded against are left out."""


class EvaluationStatus(StatusModel):
    """Base model and tuned model on the same rows."""

    rows: ScoredRows
    """Which rows: those of `dataset.test` where there are any."""
    examples: Count
    """How many rows were scored."""
    base: Scores | None = None
    """The base model, without added tokens."""
    tuned: Scores | None = None
    """The artifact."""
    tuned_step: Count | None = None
    """Step of the checkpoint that the artifact was made of."""


class IncidentStatus(StatusModel):
    """Training went wrong without an error."""

    step: Count
    """Step at which it was noticed."""
    kind: Annotated[str, Field(max_length=32)]
    """NonFiniteLoss, NonFiniteGradient, LossSpike, GradientSpike, LossDrift or LossAboveStart."""
    value: Annotated[str, Field(max_length=32)]
    """What was measured."""
    threshold: Annotated[str, Field(max_length=32)]
    """What it had to stay below."""
    action: Annotated[str, Field(max_length=32)]
    """Record, RollBack or Fail."""
    message: Text = ""
    """A sentence for people."""


class UsageStatus(StatusModel):
    """What the job has taken."""

    gpu_seconds: Count = 0
    """GPUs times seconds that pods held them, over all attempts, until `lastUpdateTime`."""
    active_seconds: Count = 0
    """Seconds in which at least one pod ran, over all attempts; `runPolicy.activeDeadlineSeconds` bounds them."""
    last_update_time: datetime | None = None
    """Until when both are counted."""
    holders: Annotated[
        list[Annotated[str, Field(max_length=64)]], Field(max_length=MOST_HOLDERS, json_schema_extra=ATOMIC)
    ] = []
    """uids of the pods that had a node then: what they took since is counted even where they are gone."""
    running: bool = False
    """Whether one of them ran."""


class ArtifactStatus(StatusModel):
    """What came out."""

    uri: Text
    """Folder in the bucket; peft and transformers load what lies there."""
    step: Count
    """Step of the checkpoint that was exported."""
    bytes: Count
    """Size of its files."""
    manifest_sha256: Digest
    """sha256 of manifest.json."""


class ChildStatus(StatusModel):
    """The PyTorchJob of the current attempt."""

    kind: Annotated[str, Field(max_length=64)]
    """PyTorchJob."""
    name: Annotated[str, Field(max_length=63)]
    """Its name."""
    uid: Annotated[str, Field(max_length=64)] = ""
    """Its uid."""


class FineTuneJobStatus(StatusModel):
    """What the operator observed."""

    observed_generation: Count = 0
    """Generation of the spec that the status speaks of."""
    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra=by_key("type"))] = []
    """All known conditions, from the first write on."""
    preflight: PreflightStatus | None = None
    """The check before the first attempt."""
    attempts: AttemptsStatus = AttemptsStatus()
    """How often the job was started."""
    image: Annotated[str, Field(max_length=704)] | None = None
    """Trainer image, with its digest as soon as a node has pulled it: fixed at attempt 1 for every later one."""
    start_time: datetime | None = None
    """When the first attempt was started."""
    completion_time: datetime | None = None
    """When the job was settled."""
    progress: ProgressStatus | None = None
    """How far the run is."""
    metrics: Annotated[list[MetricValue], Field(max_length=METRIC_LIMIT, json_schema_extra=ATOMIC)] = []
    """Newest values."""
    history: Annotated[list[HistoryPoint], Field(max_length=HISTORY_LIMIT, json_schema_extra=ATOMIC)] = []
    """Loss and validation perplexity over steps, thinned as it grows."""
    checkpoints: Annotated[list[CheckpointStatus], Field(max_length=CHECKPOINT_LIMIT, json_schema_extra=ATOMIC)] = []
    """What lies in the bucket."""
    notices: Annotated[list[Text], Field(max_length=NOTICE_LIMIT, json_schema_extra=ATOMIC)] = []
    """What the trainer told that is no failure, oldest first: rows left out, a checkpoint passed over and why."""
    plan: PlanStatus | None = None
    """What was chosen where the spec leaves it open."""
    incidents: Annotated[list[IncidentStatus], Field(max_length=INCIDENT_LIMIT, json_schema_extra=ATOMIC)] = []
    """What the stability monitor noticed, oldest first; the newest ones stay."""
    evaluation: EvaluationStatus | None = None
    """Base model and tuned model on the same rows."""
    artifact: ArtifactStatus | None = None
    """What came out."""
    usage: UsageStatus | None = None
    """What the job has taken."""
    child: ChildStatus | None = None
    """The PyTorchJob of the current attempt."""
