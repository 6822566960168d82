"""`status` of a FineTuneJob: what the operator observed and recorded. The operator writes the status, and users write
`spec`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from finetune_core.api.base import ATOMIC, ApiModel, by_key
from finetune_core.api.conditions import Condition
from finetune_core.api.evaluation import REQUIREMENT_LIMIT, ScoredRows
from finetune_core.api.resources import NODES_LIMIT
from finetune_core.task_declaration import SCORE_LIMIT, UNGRADED_LIMIT, UNGRADED_REASON_LENGTH, ScoreName
from finetune_core.tasks import score_names_text

ATTEMPT_LIMIT = 999
"""Largest number that an attempt can have. The limit is 999, because the names of pods have room for three digits."""
METRIC_LIMIT = 32
"""Largest number of entries in `status.metrics`."""
HISTORY_LIMIT = 60
"""Largest number of points in `status.history`, which holds the curves of training loss and validation perplexity."""
CHECKPOINT_LIMIT = 100
"""Largest number of entries in `status.checkpoints`. The newest checkpoints are kept."""
RECENT_ATTEMPTS_LIMIT = 20
"""Largest number of ended attempts in `status.attempts.recent`. The newest attempts are kept."""
NOTICE_LIMIT = 8
"""Largest number of sentences in `status.notices`. The newest sentences are kept."""
INCIDENT_LIMIT = 20
"""Largest number of entries in `status.incidents`. The newest incidents are kept."""
NOT_OBSERVED = -1
"""`status.observedGeneration` of a job whose status the operator has not written yet. This value is the field's default
in the CRD. Without the field, kstatus (Flux, Argo CD) would treat a new job as finished. With the value -1, kstatus
treats a new job as in progress."""
MOST_HOLDERS = 2 * NODES_LIMIT
"""Largest number of pods of a job that can hold GPUs at the same time: all pods of one attempt, and all pods of the
previous attempt, which may still be terminating."""

Decimal = Annotated[str, Field(max_length=32)]
"""A decimal number, as a string because Kubernetes' API conventions forbid floats, for example `"1.25"`."""
Text = Annotated[str, Field(max_length=1024)]
"""A sentence for people, or an `s3://` address."""
Digest = Annotated[str, Field(max_length=64)]
"""A sha256 in hexadecimal, 64 characters long."""
ADVICE_LENGTH = 256
"""Largest number of characters of the advice of a plan."""
Message = Annotated[Text, Field(description="A sentence for people.")]

AttemptNumber = Annotated[int, Field(ge=1, le=ATTEMPT_LIMIT, description="Number of the attempt, counted from 1.")]
AttemptVerdict = Annotated[
    str,
    Field(
        max_length=32,
        description="How the end counts: Succeeded, Permanent (no retry), Charged (counts against"
        " `runPolicy.maxRetries`) or Free (does not count).",
    ),
]
AttemptReason = Annotated[
    str,
    Field(
        max_length=64,
        description="Reason of the end as a CamelCase word for programs, for example `PodDeleted`.",
    ),
]
AttemptNode = Annotated[str, Field(max_length=253, description="Name of the node whose pod caused the end.")]

Count = Annotated[int, Field(ge=0)]
"""A whole number from 0 on."""


class StatusModel(ApiModel):
    """The base class of the sections of the status, except for `Condition`. Unknown fields are ignored, so that an
    operator that was set back to an older version can read the status that the newer version wrote."""

    model_config = ConfigDict(extra="ignore")

    def to_json(self) -> dict[str, Any]:
        """Return the section as the API server stores it. Pydantic's warnings about unexpected values are switched off,
        because `reading.py` accepts such values from other versions."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, warnings=False)


class PodRecord(StatusModel):
    """The first pod that the operator saw with a given replica index since the current attempt was admitted. A pod with
    another uid under the same index means that the first pod was replaced."""

    index: Count
    """Replica index of the pod in the PyTorchJob, from 0 on."""
    name: Annotated[str, Field(max_length=253)]
    """`metadata.name` of the pod."""
    uid: Annotated[str, Field(max_length=64)]
    """`metadata.uid` of the first pod that was seen with this index."""
    node: Annotated[str, Field(max_length=253)] = ""
    """Name of the pod's node. Empty until the pod is scheduled."""


class AttemptCause(StatusModel):
    """Why the current attempt will end. The operator records the cause at once, because the pods that show the cause
    may be deleted before the attempt has ended."""

    verdict: Annotated[str, Field(max_length=32)]
    """How the end counts: Succeeded, Permanent (no retry), Charged (counts against `runPolicy.maxRetries`) or Free
    (does not count)."""
    reason: AttemptReason
    message: Message = ""
    node: AttemptNode = ""
    time: datetime
    """Time at which the operator first observed the cause."""


class CurrentAttempt(StatusModel):
    """The attempt that exists now."""

    number: AttemptNumber
    start_time: datetime
    """Time at which the attempt was started."""
    admitted_time: datetime | None = None
    """Time at which the attempt was admitted. The attempt is admitted when it is started or, where a queue or a person
    suspends the PyTorchJob, when the PyTorchJob is resumed. Absent while the PyTorchJob is suspended."""
    running_time: datetime | None = None
    """Time at which the operator first saw, after the attempt was admitted, that each pod of the attempt was running or
    had run. Absent until then."""
    pods: Annotated[list[PodRecord], Field(max_length=NODES_LIMIT, json_schema_extra=ATOMIC)] = []
    """For each replica index, the first pod that the operator saw with this index since the attempt was admitted."""
    cause: AttemptCause | None = None
    """Why the attempt will end. Absent while the operator knows no cause for an end."""


class PastAttempt(StatusModel):
    """An attempt that has ended."""

    number: AttemptNumber
    verdict: Annotated[str, Field(max_length=32)]
    """How the end counts: Succeeded, Permanent (no retry), Charged (counts against `runPolicy.maxRetries`) or Free
    (does not count)."""
    reason: AttemptReason
    message: Message = ""
    node: AttemptNode = ""
    start_time: datetime
    """Time at which the attempt was started."""
    end_time: datetime
    """Time at which the operator counted the attempt as ended."""


class AttemptsStatus(StatusModel):
    """The job's attempts: how many there were, and how they ended."""

    started: Count = 0
    """Number of attempts that were started."""
    charged: Count = 0
    """Number of attempts that count against `runPolicy.maxRetries`."""
    free: Count = 0
    """Number of attempts that ended through no fault of the job and do not count against `runPolicy.maxRetries`."""
    current: CurrentAttempt | None = None
    """The attempt that exists now. Absent before the first attempt, between two attempts, and after the last
    attempt."""
    memory_halvings: Count = 0
    """How many attempts ran out of memory and were followed by one with half the micro-batch. The optimisation stays
    the same, because gradient accumulation doubles."""
    recent: Annotated[list[PastAttempt], Field(max_length=RECENT_ATTEMPTS_LIMIT, json_schema_extra=ATOMIC)] = []
    """The newest ended attempts, oldest first."""
    next_start_time: datetime | None = None
    """Earliest time at which the next attempt may start, which is the end of the pause (back-off) after the last
    attempt."""


class TakenOverStatus(StatusModel):
    """The runs of a former job, which had the same name and training, or wrote into the folder that `storage.runId`
    names. This job resumes from the newest checkpoint of these runs, or takes over their artifact."""

    run_id: Annotated[str, Field(max_length=63)]
    """Name of the folder in the bucket that holds the runs of the former job: the last part of
    `<storage.uri>/<namespace>/<name>/<runId>/`. This job writes into the same folder."""
    uid: Annotated[str, Field(max_length=64)] = ""
    """`metadata.uid` of the job that began the newest run in the folder. Empty if the record of this run names no job
    or can't be read."""
    time: datetime
    """Time at which the first run in the folder began, by the clock of the object store."""
    step: Count = 0
    """Optimizer step of the artifact or, without an artifact, of the newest checkpoint."""
    message: Message = ""


class PreflightStatus(StatusModel):
    """The check of object store, model and data before the first attempt."""

    start_time: datetime
    """Time at which the check was started, or started again after a suspension. `runPolicy.pendingDeadlineSeconds` is
    measured from this time."""
    tries: Count = 0
    """Number of ended tries of the check."""
    aborted: Count = 0
    """Number of tries, since the last try with a result, that were killed at their memory limit or did not end in time.
    After three such tries the job ends as failed."""
    verdict: Annotated[str, Field(max_length=32)] = ""
    """Result of the last try: Passed, Impossible (the job can't run), or Waiting (something outside the job is missing,
    or the try broke off; another try follows). Empty until the first try has ended."""
    message: Text = ""
    """What the last try found, as a sentence for people."""
    next_try_time: datetime | None = None
    """Time of the next try. Set only while the verdict is Waiting."""
    taken_over: TakenOverStatus | None = None
    """The runs of a former job that the check found and that this job takes over. Absent where the check found no such
    runs."""
    template_date: Annotated[str, Field(max_length=10)] = ""
    """The day that chat templates got as today's date in the runs that this job continues, for example `2026-11-29`.
    Empty where the check found no runs, or runs that read no conversations."""
    model_bytes: Count | None = None
    """Size of the base model's files in bytes. Absent where the check did not find the size."""
    data_bytes: Count | None = None
    """Size of all data files together in bytes, as they are stored. Absent where the check did not find the size."""


class ProgressStatus(StatusModel):
    """How far the training has come."""

    step: Count = 0
    """Number of global batches that the training has gone through, one for each optimizer step."""
    total_steps: Count = 0
    """Number of global batches of the whole training. Where the trainer reports only a percentage, `totalSteps` is 100
    and `step` is the percentage."""
    epoch: Decimal = "0"
    """Number of completed passes over the training examples, for example `"1.25"`."""
    percentage: Annotated[int, Field(ge=0, le=100)] = 0
    """step / totalSteps in percent, rounded down."""
    eta_seconds: Count | None = None
    """Estimated seconds until the last step."""
    tokens_per_second: Decimal | None = None
    """Recent training speed: tokens of prompts and completions (without padding) per second, summed over all
    processes."""
    mfu: Decimal | None = None
    """Model FLOPs utilisation (MFU) of the newest step that changed the weights, from 0 to 1: the FLOP/s that the model
    itself needs, as a share of the GPUs' peak FLOP/s."""
    checkpoint_age_seconds: Count | None = None
    """Seconds from the newest commit of a checkpoint in the current run (see `checkpoints[].run`) to the last report.
    Before the first commit in this run, the seconds are counted from shortly before the run's first step. A lost pod
    would cost the training of this time, and also the training that went on while the newest checkpoint was
    uploaded."""
    last_update_time: datetime | None = None
    """Time at which the last report arrived. Reports of a trainer that still loads its model do not count."""


class MetricValue(StatusModel):
    """The newest value of a metric."""

    name: Annotated[str, Field(max_length=64)]
    """Name of the metric, for example loss, perplexity, learningRate or gradientNorm."""
    value: Decimal
    """Newest value of the metric."""
    step: Count
    """Optimizer step that the training had reached when the value was reported."""


class HistoryPoint(StatusModel):
    """Training loss and validation perplexity at one optimizer step."""

    step: Count
    """Optimizer step of the point."""
    loss: Decimal | None = None
    """Training loss of the step."""
    perplexity: Decimal | None = None
    """Validation perplexity after the step. Absent where the step was not followed by an evaluation."""


class CheckpointStatus(StatusModel):
    """A committed checkpoint in the bucket."""

    run: Annotated[int, Field(ge=1)]
    """Number of the run that wrote the checkpoint. Every start of the trainer and every rollback takes the next run
    number."""
    step: Count
    """Optimizer step after which the checkpoint was taken."""
    uri: Text
    """Folder of the checkpoint, for example `s3://bucket/runs/demo/job/uid/checkpoints/000001-000000120`."""
    bytes: Count
    """Total size of the files in bytes."""
    manifest_sha256: Digest
    """sha256 of the checkpoint's manifest.json."""
    perplexity: Decimal | None = None
    """Validation perplexity at this step. Absent where no evaluation followed the step."""
    task_score: Decimal | None = None
    """Main score of `dataset.task` at this step. Absent where no evaluation followed the step, and where
    `evaluation.bestBy` compares checkpoints by perplexity."""
    time: datetime
    """Time at which the checkpoint was committed."""
    last: bool = False
    """true for the newest of the checkpoints that are not damaged."""
    best: bool = False
    """true for the best, by `evaluation.bestBy`, of the checkpoints that are not damaged."""
    damaged: Annotated[str, Field(max_length=256)] = ""
    """Why the trainer can't resume from the checkpoint: the name of the damaged object, and how this object differs
    from the manifest. Empty where no damage is known."""


class TrainingChoices(StatusModel):
    """Settings of the training that hold for all attempts. They are chosen by the plan of the preflight check where the
    spec leaves them open, and stay as they are when another version of the operator runs the job."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """ZeRO stage of DeepSpeed. Absent: the only process trains without DeepSpeed."""
    offload_optimizer: bool
    """Whether the optimizer state is in the memory of the node."""
    gradient_checkpointing: bool
    """Whether activations are computed again in the backward pass."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)]
    """Examples (with `dataset.packing`: sequences) that one process computes at once, before any attempt ran out of
    memory."""


class PlanStatus(StatusModel):
    """How the job is trained: settings that the spec sets, settings that operator and trainer chose where the spec
    leaves them open, and what follows from these settings."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """ZeRO stage of DeepSpeed. Absent: the only process trains without DeepSpeed."""
    processes: Annotated[int, Field(ge=1)]
    """Number of training processes over all pods."""
    micro_batch_size: Annotated[int, Field(ge=1)]
    """Examples (with `dataset.packing`: sequences) that one process computes at once."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)]
    """Micro-batches of one process per optimizer step."""
    attention: Annotated[str, Field(max_length=32)] | None = None
    """The kernel that computes attention, for example `SDPA`: what `training.attention` asks for, or what the trainer
    chose. Absent: the trainer has not loaded the model yet."""
    adapted_share: Decimal | None = None
    """Share of the weights in the model's layers (without embeddings and output head, unless these are adapted) that
    the LoRA adapters can change, from 0 to 1. Absent: the method is Full, or the trainer has not read the model
    yet."""
    gpu_memory_bytes: Count | None = None
    """Planned peak memory of one GPU in bytes, where every row has `dataset.maxLength` tokens. Absent: the preflight
    check does not know the GPU or the family of the model, or the micro-batch has another size than in the check."""
    memory_bytes: Count | None = None
    """Planned memory of one pod in bytes, which each pod gets where the job does not set `resources.memory`. Absent:
    the preflight check does not know the GPU or the family of the model."""
    cpus: Count | None = None
    """Planned number of CPUs of one pod, which each pod gets where the job does not set `resources.cpu`. Absent in the
    same cases as `memoryBytes`."""
    choices: TrainingChoices | None = None
    """The settings that all attempts have, apart from the micro-batch, which lack of memory halves. Absent: the
    preflight check is not over."""
    advice: Annotated[str, Field(max_length=ADVICE_LENGTH)] = ""
    """The lines of the spec that make the job take less memory where its smallest micro-batch takes too much, as the
    plan knows them, for example `spec.training.gradientCheckpointing: true`. Empty: the plan knows none."""


class NamedScore(StatusModel):
    """A score of a task on the rows of the evaluation set."""

    name: Annotated[ScoreName, Field(description=score_names_text())]
    value: Decimal
    """Value of the score over all graded answers, which is the mean unless the task declares another aggregation. Where
    an answer is either right or wrong for this score, the mean is the share of right answers."""


class UngradedAnswers(StatusModel):
    """Answers that could not be graded, all for the same reason."""

    reason: Annotated[str, Field(max_length=UNGRADED_REASON_LENGTH)]
    """Why the answers could not be graded, for example `the gold row has no number after ####`."""
    answers: Count
    """Number of the answers that could not be graded for this reason."""


class Scores(StatusModel):
    """Scores of one model on the rows of the evaluation set."""

    perplexity: Decimal | None = None
    """Perplexity over supervised tokens, which are the tokens whose loss training minimises. The perplexity is exp of
    the mean loss of these tokens. A lower perplexity is better."""
    all_token_perplexity: Decimal | None = None
    """Perplexity over all tokens of prompts and completions, as Anyscale's study of LoRA (September 2023) reports
    it. This perplexity may rise where a job learns only completions, because the prompts are not trained."""
    task_score: Decimal | None = None
    """Main score of `dataset.task` over the graded answers."""
    scores: Annotated[list[NamedScore], Field(max_length=SCORE_LIMIT, json_schema_extra=ATOMIC)] = []
    """Every score of the task."""
    graded: Count = 0
    """Number of graded answers."""
    not_graded: Count = 0
    """Number of answers that could not be graded, mostly because their row has no right answer that can be used."""
    ungraded: Annotated[list[UngradedAnswers], Field(max_length=UNGRADED_LIMIT, json_schema_extra=ATOMIC)] = []
    """Why answers could not be graded, the most frequent reasons first."""


class RequirementStatus(StatusModel):
    """Whether the tuned model reached a score of `evaluation.require`."""

    score: ScoreName
    """Name of the score."""
    at_least: Decimal | None = None
    """Lowest value that passes."""
    at_most: Decimal | None = None
    """Highest value that passes."""
    better_than_base: bool | None = None
    """Whether the tuned model had to be better than the base model."""
    base: Decimal | None = None
    """Score of the base model. Absent where this score was not measured."""
    tuned: Decimal | None = None
    """Score of the tuned model. Absent where this score was not measured."""
    difference: Decimal | None = None
    """Score of the tuned model minus the score of the base model. Absent where one of the two scores was not
    measured."""
    passed: bool
    """Whether the score was reached."""


class EvaluationStatus(StatusModel):
    """Scores of the base model and of the tuned model on the same rows."""

    rows: ScoredRows
    """Rows on which both models were scored: Test when `dataset.test` is set, else Validation."""
    examples: Count
    """Number of examples in the evaluation set. A row may be several examples. Answers are generated for at most
    `evaluation.generation.maxExamples` of them."""
    base: Scores | None = None
    """Scores of the base model, without `model.addedTokens`."""
    tuned: Scores | None = None
    """Scores of the tuned model, which is the artifact."""
    tuned_step: Count | None = None
    """Optimizer step of the checkpoint that the artifact was made from."""
    passed: bool | None = None
    """Whether the tuned model reached every score of `evaluation.require`. Absent where the job requires none, and
    before the artifact is committed. true means that the job has succeeded."""
    requirements: Annotated[list[RequirementStatus], Field(max_length=REQUIREMENT_LIMIT, json_schema_extra=ATOMIC)] = []
    """The scores of `evaluation.require`, and whether the tuned model reached them."""


class IncidentStatus(StatusModel):
    """A training step whose loss or gradient norm was not finite or far too high, and what the trainer did."""

    step: Count
    """Optimizer step at which the stability monitor noticed the incident."""
    kind: Annotated[str, Field(max_length=32)]
    """Kind of the incident: NonFiniteLoss, NonFiniteGradient, LossSpike, GradientSpike, LossDrift or LossAboveStart."""
    value: Annotated[str, Field(max_length=32)]
    """Measured value, for example `"8.31"` or `"nan"`."""
    threshold: Annotated[str, Field(max_length=32)]
    """Limit that the measured value exceeded. `"inf"` for NonFiniteLoss and NonFiniteGradient, whose value is not
    a finite number."""
    action: Annotated[str, Field(max_length=32)]
    """What the trainer did: Record, RollBack or Fail."""
    message: Message = ""


class UsageStatus(StatusModel):
    """GPU time and running time that the job has used."""

    gpu_seconds: Count = 0
    """GPU seconds until `lastUpdateTime`, summed over the pods of all attempts: the number of GPUs of a pod times the
    seconds for which the pod held them."""
    active_seconds: Count = 0
    """Seconds in which at least one pod ran, summed over all attempts. `runPolicy.activeDeadlineSeconds` limits this
    number."""
    last_update_time: datetime | None = None
    """Time until which `gpuSeconds` and `activeSeconds` are counted."""
    holders: Annotated[
        list[Annotated[str, Field(max_length=64)]], Field(max_length=MOST_HOLDERS, json_schema_extra=ATOMIC)
    ] = []
    """uids of the pods that had a node and had not ended at `lastUpdateTime`. If one of these pods no longer exists at
    the next count, the operator assumes that the pod held its GPUs until that count."""
    running: bool = False
    """Whether at least one of the pods in `holders` ran at `lastUpdateTime`."""


class ArtifactStatus(StatusModel):
    """The committed result of the job."""

    uri: Text
    """Address of the artifact's folder in the bucket. The folder has the files that peft (for an adapter) or
    transformers (for a model) can load."""
    step: Count
    """Optimizer step of the checkpoint that was exported."""
    bytes: Count
    """Total size of the files in bytes."""
    manifest_sha256: Digest
    """sha256 of the artifact's manifest.json."""


class AdapterStatus(StatusModel):
    """The adapter that the training starts from (`model.adapter`)."""

    use: Annotated[str, Field(max_length=32)]
    """Continue or Merge, as in the spec."""
    source: Text = ""
    """Address of the adapter's folder, or the name of its repository on the Hugging Face Hub."""
    revision: Annotated[str, Field(max_length=200)] = ""
    """Commit, tag or branch on the Hugging Face Hub. Empty where the adapter lies elsewhere."""
    job_uid: Annotated[str, Field(max_length=64)] = ""
    """`metadata.uid` of the job that `model.adapter.job` named when the operator looked. Empty without that field."""
    manifest_sha256: Digest = ""
    """sha256 of the manifest.json in the artifact of the job that `model.adapter.job` names. Every attempt verifies it.
    Empty without `model.adapter.job`."""
    sha256: Digest = ""
    """sha256 over the adapter's files, as the trainer has read them. Empty until the trainer has told."""


class ChildStatus(StatusModel):
    """The child object: the PyTorchJob that the operator created for the current attempt or, where the job has ended,
    for its last attempt."""

    kind: Annotated[str, Field(max_length=64)]
    """Kind of the child object: PyTorchJob."""
    name: Annotated[str, Field(max_length=63)]
    """`metadata.name` of the PyTorchJob."""
    uid: Annotated[str, Field(max_length=64)] = ""
    """`metadata.uid` of the PyTorchJob."""


class FineTuneJobStatus(StatusModel):
    """What the operator observed: conditions, attempts, progress, scores and the artifact."""

    observed_generation: Annotated[int, Field(ge=-1)] = NOT_OBSERVED
    """`metadata.generation` of the spec from which the status was computed. -1 until the operator has written the
    status for the first time."""
    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra=by_key("type"))] = []
    """All conditions. Each condition is present as soon as the operator has written the status for the first time."""
    preflight: PreflightStatus | None = None
    """The check of object store, model and data before the first attempt."""
    attempts: AttemptsStatus = AttemptsStatus()
    """The job's attempts: how many there were, and how they ended."""
    image: Annotated[str, Field(max_length=704)] | None = None
    """Trainer image of the preflight check and of all attempts. The operator fixes the image before the check, and adds
    the digest once a node has pulled the image from its registry for an attempt."""
    start_time: datetime | None = None
    """Time at which the first attempt was started."""
    completion_time: datetime | None = None
    """Time at which the job ended."""
    progress: ProgressStatus | None = None
    """How far the training has come."""
    metrics: Annotated[list[MetricValue], Field(max_length=METRIC_LIMIT, json_schema_extra=ATOMIC)] = []
    """Newest value of each metric."""
    history: Annotated[list[HistoryPoint], Field(max_length=HISTORY_LIMIT, json_schema_extra=ATOMIC)] = []
    """Training loss and validation perplexity over the steps. Where there would be more than 60 points, some points
    between the first and the last are dropped."""
    checkpoints: Annotated[list[CheckpointStatus], Field(max_length=CHECKPOINT_LIMIT, json_schema_extra=ATOMIC)] = []
    """Committed checkpoints in the bucket, oldest first. Where there are more than 100, only the newest 100 are
    listed."""
    notices: Annotated[list[Text], Field(max_length=NOTICE_LIMIT, json_schema_extra=ATOMIC)] = []
    """Messages of the trainer that are not failures, oldest first, for example rows that were left out or a checkpoint
    that could not be resumed from. Where there are more than 8, only the newest 8 are listed; the log of the trainer
    has all messages."""
    plan: PlanStatus | None = None
    """How the job is trained: settings that the spec sets, settings that operator and trainer chose where the spec
    leaves them open, and what follows from these settings."""
    incidents: Annotated[list[IncidentStatus], Field(max_length=INCIDENT_LIMIT, json_schema_extra=ATOMIC)] = []
    """Training steps whose loss or gradient norm was not finite or far too high, oldest first. Where there are more
    than 20, only the newest 20 are listed."""
    evaluation: EvaluationStatus | None = None
    """Scores of the base model and of the tuned model on the same rows."""
    adapter: AdapterStatus | None = None
    """The adapter that the training starts from. Absent without `model.adapter`, and before it was found."""
    artifact: ArtifactStatus | None = None
    """The committed result of the job."""
    usage: UsageStatus | None = None
    """GPU time and running time that the job has used."""
    child: ChildStatus | None = None
    """The child object of the current attempt or, where the job has ended, of its last attempt: the PyTorchJob."""
