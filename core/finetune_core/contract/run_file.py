"""The run file: all settings of an attempt, with defaults filled in and without secrets.

`resolve.py` makes the run file, and the operator stores the run file in the attempt's ConfigMap. The trainer gets no
settings of the job from any other place.
"""

from __future__ import annotations

from datetime import date
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_core.api.dataset import DatasetSpec
from finetune_core.api.evaluation import ArtifactFrom, BestBy, RequirementSpec
from finetune_core.api.method import LoRASpec, Method
from finetune_core.api.resources import Device
from finetune_core.api.sources import ModelSpec
from finetune_core.api.storage import Addressing, EncryptionSpec, Export
from finetune_core.api.training import Attention, Precision, Schedule, StabilityAction
from finetune_core.contract.contract_model import CONTRACT_VERSION, ContractModel

FOLDER_PATTERN = r"^/[^\x00-\x1f\x7f]*$"
"""Regular expression for the absolute path of a folder, without control characters."""


class OpenChoice(StrEnum):
    """Settings of the training that a job may leave to the plan."""

    ZERO_STAGE = "ZeroStage"
    OFFLOAD_OPTIMIZER = "OffloadOptimizer"
    GRADIENT_CHECKPOINTING = "GradientCheckpointing"
    MICRO_BATCH_SIZE = "MicroBatchSize"


class WorldConfig(ContractModel):
    """Number of training processes, and the kind of device that they compute on."""

    nodes: Annotated[int, Field(ge=1)]
    processes_per_node: Annotated[int, Field(ge=1)]
    device: Device
    gpu_product: Annotated[str, Field(max_length=63)] | None = None
    """`resources.gpuProduct`, from which the preflight check knows the memory of the GPUs. None where the job names
    none, and on CPUs."""
    memory_bytes: Annotated[int, Field(ge=1)] | None = None
    """`resources.memory` in bytes. None where the job does not set it, and on CPUs, where there is no plan."""
    shared_memory_bytes: Annotated[int, Field(ge=1)] | None = None
    """`resources.sharedMemory` in bytes, which the plan of the preflight check adds to the memory of a pod. None on
    CPUs."""

    @property
    def size(self) -> int:
        """Number of training processes over all nodes."""
        return self.nodes * self.processes_per_node


class OptimizationConfig(ContractModel):
    """The `training` and `deepspeed` sections with every default resolved."""

    learning_rate: Annotated[float, Field(gt=0)]
    epochs: int | None = None
    max_steps: int | None = None
    global_batch_size: Annotated[int, Field(ge=1)]
    micro_batch_size: Annotated[int, Field(ge=1)]
    schedule: Schedule
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    gradient_clipping: Annotated[float, Field(ge=0)]
    precision: Precision
    gradient_checkpointing: bool
    attention: Attention = "Auto"
    seed: int
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """ZeRO stage of DeepSpeed. None: the only process trains with the plain engine, without DeepSpeed."""
    offload_optimizer: bool = False
    """Whether the optimizer state is kept in the node's memory instead of the GPU's."""
    offload_parameters: bool = False
    """Whether parameters that are not in use are kept in the node's memory instead of the GPU's. Only with ZeRO stage
    3."""
    overrides: str | None = None
    """A JSON object, as text, that is merged into DeepSpeed's configuration last."""


class GenerationConfig(ContractModel):
    """Limits of generated answers."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    max_examples: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8


class EvaluationConfig(ContractModel):
    """The `evaluation` section with its defaults resolved. Where `every_steps` is None, the trainer uses the number of
    steps in one epoch, because only the trainer can count the rows. `base_prompt` and `patience` are None where the job
    does not set them."""

    every_steps: int | None = None
    generation: GenerationConfig = GenerationConfig()
    base_prompt: str | None = None
    best_by: BestBy = "Perplexity"
    patience: Annotated[int, Field(ge=1)] | None = None
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    artifact_from: ArtifactFrom
    require: list[RequirementSpec] | None = None
    """Scores that the tuned model must reach. None where the job requires none."""


class StabilityConfig(ContractModel):
    """The `stability` section with every default resolved."""

    on_non_finite: StabilityAction = "Fail"
    on_exploding_loss: StabilityAction | None = None
    """What the trainer does about a finite loss that is far too high compared with the steps before or with the job's
    first steps, and about a finite gradient norm that is far too high while the loss rises. None: only values that are
    not finite raise an alarm."""
    stall_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0


class StorageConfig(ContractModel):
    """The settings of the `storage` section that the trainer needs, with every default resolved but that of
    `addressing`. The run file does not contain the credentials. The pod gets the credentials as files, or has an
    identity of its own."""

    uri: str
    """`s3://` address of the folder of all runs of the job: `<storage.uri>/<namespace>/<name>/<runId>`."""
    folder: Annotated[str, Field(max_length=255, pattern=FOLDER_PATTERN)] | None = None
    """A folder of this machine that takes the place of the object store for everything that the run writes. It must
    exist. The buckets are its subfolders, and `uri` names the same bucket and the same keys as in an object store. The
    other fields about access then count only for models and data whose source is `s3`. None, which the operator always
    writes: the runs are in the object store."""
    endpoint: str
    region: str
    credentials: Literal["Secret", "Identity"] = "Secret"
    """Where the access key comes from. Secret: from the files of a mounted Secret. Identity: from the pod's own
    identity, such as the token of `storage.identity` or the node's role."""
    addressing: Addressing | None = None
    """Place of the bucket's name in a request. None: VirtualHosted (in the host name) for Amazon S3, Path for other
    stores."""
    encryption: EncryptionSpec | None = None
    checkpoint_every_steps: Annotated[int, Field(ge=1)] | None = None
    checkpoint_every_minutes: Annotated[int, Field(ge=1)] | None = None
    """Minutes between two checkpoints. Exactly one of this field and `checkpoint_every_steps` is set."""
    keep_last: Annotated[int, Field(ge=1)]
    keep_best: Annotated[int, Field(ge=1)] = 1
    artifact: Export = "Adapter"
    """Form of the artifact of a LoRA job. A job with `method: Full` ignores this field and exports the whole model."""


class ReportConfig(ContractModel):
    """The URL to which rank 0 posts its reports, and the seconds between two reports."""

    url: str
    interval_seconds: Annotated[float, Field(gt=0)] = 3.0


class AdapterArtifact(ContractModel):
    """The committed artifact of the job that `model.adapter.job` names, as the operator found it in the status of that
    job. Every attempt uses this artifact."""

    uri: Annotated[str, Field(max_length=1024)]
    """`s3://` address of the artifact's folder."""
    manifest_sha256: Annotated[str, Field(max_length=64)]
    """sha256 of the artifact's manifest.json, which has the sha256 of every file."""
    job_uid: Annotated[str, Field(max_length=64)]
    """`metadata.uid` of the job that made the artifact."""


class RunConfig(ContractModel):
    """The run file: all settings of an attempt, with defaults filled in and without secrets."""

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
    adapter_artifact: AdapterArtifact | None = None
    """Where the adapter of `model.adapter.job` lies. None where the job names no other job."""
    template_date: date | None = None
    """The day (UTC) that a chat template gets as today's date: the day on which attempt 1 started or, where the job
    continues a run, the day of that run. Every attempt gets the same day, so that every attempt reads the same tokens.
    None where no conversations are read."""
    open_choices: tuple[OpenChoice, ...] | None = None
    """Settings that the job leaves open. The run file has their defaults, and the preflight check answers with those
    that the plan chooses. None where nothing is open, and once the settings are fixed, so in every attempt."""
