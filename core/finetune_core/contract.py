"""What operator and trainer say to each other: run file, identity, reports, result and exit codes.

Versioned: a trainer refuses a run file of another version with exit code 64, an operator counts a report of
another version as malformed. Nothing here holds a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from finetune_core.api.dataset import DatasetSpec
from finetune_core.api.method import LoRASpec, Method
from finetune_core.api.sources import ModelSpec
from finetune_core.api.storage import EncryptionSpec
from finetune_core.errors import UserError

CONTRACT_VERSION: Literal[1] = 1

RUN_FOLDER = "/etc/finetune"
RUN_FILE = f"{RUN_FOLDER}/run.json"
CA_FILE = f"{RUN_FOLDER}/ca.crt"
"""CA bundle of the operator's report server: a key of the attempt's ConfigMap."""
CREDENTIALS_FOLDER = "/var/run/secrets/finetune.dev/storage"
"""Files AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and optionally AWS_SESSION_TOKEN, from the job's Secret."""
STORAGE_CA_FILE = "/etc/finetune-storage/ca.crt"
"""Certificates that sign the store's, from `storage.caConfigMapRef`; absent: those of the image."""
HUB_DATA_TOKENS_FOLDER = "/var/run/secrets/finetune.dev/hub-data"
"""Tokens for gated data sets, each in a file with the field path of its source, such as `dataset.train`."""
HUB_TOKEN_FILE = "/var/run/secrets/finetune.dev/hub/token"  # noqa: S105  (a path)
TOKEN_FILE = "/var/run/secrets/finetune.dev/report/token"  # noqa: S105  (a path)
"""Projected service-account token for reports; the kubelet renews it."""
TERMINATION_LOG = "/dev/termination-log"
SCRATCH_FOLDER = "/scratch"
"""Writable emptyDir of the pod: HOME, downloads, snapshots."""
VOLUMES_FOLDER = "/var/run/finetune/volumes"
"""A claim `name` that model or data come from is mounted read-only at `<folder>/<name>`."""

RESULT_LIMIT_BYTES = 1024
REPORT_LIMIT_BYTES = 65536


class ContractModel(BaseModel):
    """Base of everything that crosses the wire: camelCase, immutable, unknown fields refused, NaN refused."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    def to_json(self) -> str:
        """Return the object as one line of JSON, absent instead of null."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class ExitCode(IntEnum):
    """Exit codes of the trainer's PID 1; anything else is an unknown crash."""

    DONE = 0
    """Completed or stopped early, artifact committed."""
    BAD_INPUT = 64
    DIVERGED = 65
    OUT_OF_MEMORY = 66
    OUTSIDE_FAILURE = 75
    """Something outside failed for longer than its budget: store, a lost peer, refused credentials, a stall."""
    STOPPED = 143
    """Told to stop, and a checkpoint was committed after the signal."""


class Outcome(StrEnum):
    """What an attempt came to, in the result."""

    COMPLETED = "Completed"
    EARLY_STOPPED = "EarlyStopped"
    BAD_INPUT = "BadInput"
    DIVERGED = "Diverged"
    OUT_OF_MEMORY = "OutOfMemory"
    OUTSIDE_FAILURE = "OutsideFailure"
    STOPPED = "Stopped"
    CRASHED = "Crashed"


EXIT_CODES: Mapping[Outcome, int] = {
    Outcome.COMPLETED: ExitCode.DONE,
    Outcome.EARLY_STOPPED: ExitCode.DONE,
    Outcome.BAD_INPUT: ExitCode.BAD_INPUT,
    Outcome.DIVERGED: ExitCode.DIVERGED,
    Outcome.OUT_OF_MEMORY: ExitCode.OUT_OF_MEMORY,
    Outcome.OUTSIDE_FAILURE: ExitCode.OUTSIDE_FAILURE,
    Outcome.STOPPED: ExitCode.STOPPED,
    Outcome.CRASHED: 1,
}


class Identity(ContractModel):
    """Which attempt of which job a pod belongs to; from the environment."""

    namespace: str
    name: str
    uid: str
    attempt: Annotated[int, Field(ge=1, le=999)]
    pod_name: str
    pod_uid: str
    node_rank: Annotated[int, Field(ge=0)]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Identity:
        """Read the identity; raises UserError that names a missing or malformed variable."""
        values: dict[str, str] = {}
        for field, variable in IDENTITY_VARIABLES.items():
            value = environment.get(variable)
            if not value:
                raise UserError(f"environment variable {variable}", "must be set (the operator sets it in every pod)")
            values[field] = value
        for number in ("attempt", "node_rank"):
            if not values[number].isdigit():
                raise UserError(f"environment variable {IDENTITY_VARIABLES[number]}", "must be a whole number")
        return cls.model_validate(values)


IDENTITY_VARIABLES: Mapping[str, str] = {
    "namespace": "FTJ_NAMESPACE",
    "name": "FTJ_NAME",
    "uid": "FTJ_UID",
    "attempt": "FTJ_ATTEMPT",
    "pod_name": "FTJ_POD_NAME",
    "pod_uid": "FTJ_POD_UID",
    "node_rank": "PET_NODE_RANK",
}
MASTER_ADDR_VARIABLE = "PET_MASTER_ADDR"
MASTER_PORT_VARIABLE = "PET_MASTER_PORT"
MASTER_PORT = 23456


class WorldConfig(ContractModel):
    """How many processes on what."""

    nodes: Annotated[int, Field(ge=1)]
    processes_per_node: Annotated[int, Field(ge=1)]
    device: Literal["GPU", "CPU"]

    @property
    def size(self) -> int:
        """Number of training processes."""
        return self.nodes * self.processes_per_node


class OptimizationConfig(ContractModel):
    """The `training` and `deepspeed` sections with every default resolved."""

    learning_rate: Annotated[float, Field(gt=0)]
    epochs: int | None = None
    max_steps: int | None = None
    global_batch_size: Annotated[int, Field(ge=1)]
    micro_batch_size: Annotated[int, Field(ge=1)]
    schedule: Literal["Linear", "Cosine", "Constant"]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    gradient_clipping: Annotated[float, Field(ge=0)]
    precision: Literal["bf16", "fp32"]
    gradient_checkpointing: bool
    seed: int
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    offload_optimizer: bool = False
    """Optimizer state lies in the memory of the node."""
    offload_parameters: bool = False
    """Parameters lie there too between uses; stage 3."""
    overrides: str | None = None
    """A JSON object that is merged into DeepSpeed's configuration last."""


class GenerationConfig(ContractModel):
    """Limits of generated answers."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    max_examples: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8


class EvaluationConfig(ContractModel):
    """The `evaluation` section, resolved."""

    every_steps: int | None = None
    generation: GenerationConfig = GenerationConfig()
    base_prompt: str | None = None
    best_by: Literal["Perplexity", "TaskScore"] = "Perplexity"
    patience: Annotated[int, Field(ge=1)] | None = None
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    artifact_from: Literal["Best", "Last"]


Remedy = Literal["Record", "RollBack", "Fail"]


class StabilityConfig(ContractModel):
    """The `stability` section, resolved."""

    on_non_finite: Remedy = "Fail"
    on_exploding_loss: Remedy | None = None
    """None: the loss is not watched."""
    stall_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0


class StorageConfig(ContractModel):
    """The object store; credentials come as files."""

    uri: str
    """Root of this run: `<storage.uri>/<namespace>/<name>/<runId>`."""
    endpoint: str
    region: str
    credentials: Literal["Secret", "Identity"] = "Secret"
    """Where the access key comes from: files of a Secret, or the pod's own identity."""
    addressing: Literal["Path", "VirtualHosted"] | None = None
    """Where the bucket's name goes; None: into the host name at Amazon, into the path elsewhere."""
    encryption: EncryptionSpec | None = None
    checkpoint_every_steps: Annotated[int, Field(ge=1)] | None = None
    checkpoint_every_minutes: Annotated[int, Field(ge=1)] | None = None
    """One of both is set."""
    keep_last: Annotated[int, Field(ge=1)]
    keep_best: Annotated[int, Field(ge=1)] = 1
    artifact: Literal["Adapter", "Merged", "Both"] = "Adapter"
    """What is made of a LoRA run."""


class ReportConfig(ContractModel):
    """Where reports go."""

    url: str
    interval_seconds: Annotated[float, Field(gt=0)] = 3.0


class RunConfig(ContractModel):
    """The run file: everything that an attempt needs to know, resolved, without secrets."""

    version: Literal[1] = CONTRACT_VERSION
    world: WorldConfig
    model: ModelSpec
    dataset: DatasetSpec
    method: Method
    lora: LoRASpec | None = None
    optimization: OptimizationConfig
    evaluation: EvaluationConfig
    stability: StabilityConfig = StabilityConfig()
    storage: StorageConfig
    report: ReportConfig | None = None


class CheckpointRecord(ContractModel):
    """A committed checkpoint, as reports list it."""

    run: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=0)]
    uri: Annotated[str, Field(max_length=1024)]
    bytes: Annotated[int, Field(ge=0)]
    manifest_sha256: Annotated[str, Field(max_length=64)]
    perplexity: float | None = None
    task_score: float | None = None
    time: datetime
    damaged: Annotated[str, Field(max_length=256)] = ""
    """What is wrong with it, where resuming found something: the object's name and how it differs."""


class CheckpointName(ContractModel):
    """Which checkpoint: the run that wrote it and the step that it holds."""

    run: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=0)]


class ArtifactRecord(ContractModel):
    """The committed artifact."""

    uri: Annotated[str, Field(max_length=512)]
    step: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]
    manifest_sha256: Annotated[str, Field(max_length=64)]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


class ScoreRecord(ContractModel):
    """How well a model does on a set of rows."""

    perplexity: Annotated[float, Field(ge=0)]
    """exp of the mean negative log-likelihood over all supervised tokens: those of the answers."""
    all_token_perplexity: Annotated[float, Field(ge=0)] | None = None
    """The same over the tokens of prompts and answers, as in the study that the project repeats."""
    task_score: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of right answers by the task's main score."""
    scores: Annotated[dict[Annotated[str, Field(max_length=32)], float], Field(max_length=8)] = {}
    """Every score of the task, by name."""
    graded: Annotated[int, Field(ge=0)] = 0
    """Answers that were graded; rows whose gold answer can't be graded against are left out."""

    def rounded(self) -> ScoreRecord:
        """Return the record with six significant digits."""
        values = self.model_dump()
        scores = {name: _rounded(value) for name, value in self.scores.items()}
        return ScoreRecord.model_validate(
            {name: _rounded(value) if isinstance(value, float) else value for name, value in values.items()}
            | {"scores": scores}
        )


class EvaluationRecord(ContractModel):
    """Base model and tuned model on the same rows."""

    rows: Literal["Validation", "Test"]
    examples: Annotated[int, Field(ge=0)]
    """Rows of the set; `graded` says how many of them were answered and graded."""
    base: ScoreRecord | None = None
    tuned: ScoreRecord | None = None
    tuned_step: Annotated[int, Field(ge=0)] | None = None
    """Step of the checkpoint that `tuned` speaks of: the one that was exported."""

    def rounded(self) -> EvaluationRecord:
        """Return the record with six significant digits: a termination message has room for no more."""
        base, tuned = (record.rounded() if record is not None else None for record in (self.base, self.tuned))
        return self.model_copy(update={"base": base, "tuned": tuned})


class Incident(ContractModel):
    """Something that went wrong with the numbers of the training, and what was done."""

    step: Annotated[int, Field(ge=0)]
    """Step at which it was noticed."""
    kind: Annotated[str, Field(max_length=32)]
    """Such as NonFiniteLoss, NonFiniteGradient, LossSpike."""
    value: Annotated[str, Field(max_length=32)]
    """What was measured; text, because it may be infinite."""
    threshold: Annotated[str, Field(max_length=32)]
    """What it had to stay below."""
    action: Remedy
    message: Annotated[str, Field(max_length=512)]


class CurvePoint(ContractModel):
    """A point of the curves that the status keeps."""

    step: Annotated[int, Field(ge=0)]
    loss: float | None = None
    perplexity: float | None = None


class Phase(StrEnum):
    """What the trainer is doing."""

    LOADING = "Loading"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    GENERATING = "Generating"
    SAVING = "Saving"
    EXPORTING = "Exporting"
    ENDED = "Ended"


class Result(ContractModel):
    """How an attempt ended: the termination message of every pod, and part of the final report."""

    version: Literal[1] = CONTRACT_VERSION
    outcome: Outcome
    message: str = ""
    step: Annotated[int, Field(ge=0)] = 0
    checkpoint: str | None = None
    artifact: ArtifactRecord | None = None
    evaluation: EvaluationRecord | None = None

    @property
    def exit_code(self) -> int:
        """The code that PID 1 exits with."""
        return int(EXIT_CODES[self.outcome])

    def to_termination_message(self) -> str:
        """Return the result as JSON of at most 1,024 bytes; the message is shortened first, then the address of the
        checkpoint and the scores are left out: the last report has them.

        Kubelet shares 12 KiB among the termination messages of all containers of a pod.
        """
        text = self.to_json()
        excess = len(text.encode()) - RESULT_LIMIT_BYTES
        message = self.message
        while excess > 0 and message:
            # A character takes at most 6 bytes in JSON (\u0000), at least one: shortening by characters converges.
            message = message[: -max(1, excess // 6 + 1)]
            text = self.model_copy(update={"message": message + "…"}).to_json()
            excess = len(text.encode()) - RESULT_LIMIT_BYTES
        for emptied in ({"message": "", "checkpoint": None}, {"message": "", "checkpoint": None, "evaluation": None}):
            if len(text.encode()) > RESULT_LIMIT_BYTES:
                text = self.model_copy(update=emptied).to_json()
        return text

    @classmethod
    def from_termination_message(cls, text: str) -> Result | None:
        """Parse a container's termination message; None where it is not a result (a crash, the end of a log)."""
        try:
            return cls.model_validate_json(text)
        except ValueError:
            return None


class Report(ContractModel):
    """What rank 0 posts every few seconds: complete in itself, so that a lost report loses nothing."""

    version: Literal[1] = CONTRACT_VERSION
    run: Annotated[int, Field(ge=0)]
    """Run number in the bucket; 0 while it is not taken yet."""
    pod_uid: Annotated[str, Field(max_length=64)]
    phase: Phase
    ranks: Annotated[int, Field(ge=1)]
    """Ranks that joined; all of them, because rank 0 reports only after the rendezvous."""
    step: Annotated[int, Field(ge=0)]
    total_steps: Annotated[int, Field(ge=0)]
    epoch: Annotated[float, Field(ge=0)]
    eta_seconds: Annotated[int, Field(ge=0)] | None = None
    tokens_per_second: Annotated[float, Field(ge=0)] | None = None
    """Tokens of prompts and answers, no padding, over all ranks."""
    mfu: Annotated[float, Field(ge=0)] | None = None
    """Model FLOPs utilisation; None where the device's peak is not known."""
    metrics: Annotated[dict[Annotated[str, Field(max_length=64)], float], Field(max_length=32)]
    """Newest values: loss, perplexity, learningRate, gradientNorm, and what `training/progress.py` adds."""
    resumed_from_step: Annotated[int, Field(ge=0)] = 0
    """First step of this run minus one: older history beyond it was left behind."""
    history: Annotated[list[CurvePoint], Field(max_length=60)]
    checkpoints: Annotated[list[CheckpointRecord], Field(max_length=100)]
    """All committed checkpoints in the bucket, oldest first."""
    checkpoint_age_seconds: Annotated[int, Field(ge=0)] | None = None
    """Age of what would be resumed from now: since the newest commit, or since the run's first step."""
    checkpoint_problem: Annotated[str, Field(max_length=512)] = ""
    """Why that age grows beyond what the job asks for; empty while it does not."""
    best: CheckpointName | None = None
    """The best of them by `evaluation.bestBy`, on the way that led to now."""
    notices: Annotated[list[Annotated[str, Field(max_length=512)]], Field(max_length=8)] = []
    """Sentences that a person should know: rows skipped, a checkpoint passed over and why."""
    evaluation: EvaluationRecord | None = None
    incidents: Annotated[list[Incident], Field(max_length=20)] = []
    """What the stability monitor noticed, oldest first."""
    result: Result | None = None


def report_audience(job_uid: str) -> str:
    """Return the audience of the projected token: one per job, so that a token speaks for its own job only."""
    return f"finetune.dev/{job_uid}"


def report_path(namespace: str, name: str, attempt: int) -> str:
    """Return the path of the report server that rank 0 posts to."""
    return f"/v1/namespaces/{namespace}/finetunejobs/{name}/attempts/{attempt}/report"
