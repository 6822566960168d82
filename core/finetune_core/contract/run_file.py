"""The run file: everything that an attempt needs to know, resolved, without secrets.

The operator writes it into the attempt's ConfigMap once; the trainer reads it and nothing else of the job.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_core.api.dataset import DatasetSpec
from finetune_core.api.evaluation import ArtifactFrom, BestBy
from finetune_core.api.method import LoRASpec, Method
from finetune_core.api.resources import Device
from finetune_core.api.sources import ModelSpec
from finetune_core.api.storage import Addressing, EncryptionSpec, Export
from finetune_core.api.training import Precision, Schedule, StabilityAction
from finetune_core.contract.contract_model import CONTRACT_VERSION, ContractModel


class WorldConfig(ContractModel):
    """How many processes on what."""

    nodes: Annotated[int, Field(ge=1)]
    processes_per_node: Annotated[int, Field(ge=1)]
    device: Device

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
    schedule: Schedule
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    gradient_clipping: Annotated[float, Field(ge=0)]
    precision: Precision
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
    best_by: BestBy = "Perplexity"
    patience: Annotated[int, Field(ge=1)] | None = None
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    artifact_from: ArtifactFrom


class StabilityConfig(ContractModel):
    """The `stability` section, resolved."""

    on_non_finite: StabilityAction = "Fail"
    on_exploding_loss: StabilityAction | None = None
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
    addressing: Addressing | None = None
    """Where the bucket's name goes; None: into the host name at Amazon, into the path elsewhere."""
    encryption: EncryptionSpec | None = None
    checkpoint_every_steps: Annotated[int, Field(ge=1)] | None = None
    checkpoint_every_minutes: Annotated[int, Field(ge=1)] | None = None
    """One of both is set."""
    keep_last: Annotated[int, Field(ge=1)]
    keep_best: Annotated[int, Field(ge=1)] = 1
    artifact: Export = "Adapter"
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
