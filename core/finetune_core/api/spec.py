"""`spec` of a FineTuneJob: its sections, the rules between the sections, and the fields that must not change."""

from __future__ import annotations

from pydantic import ConfigDict

from finetune_core.api.base import ApiModel, cel
from finetune_core.api.dataset import DatasetSpec
from finetune_core.api.evaluation import LOWER_IS_BETTER, EvaluationSpec
from finetune_core.api.method import LoRASpec, Method
from finetune_core.api.pod_template import PodTemplateSpec
from finetune_core.api.resources import ResourcesSpec
from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.sources import ModelSpec
from finetune_core.api.storage import StorageSpec
from finetune_core.api.tracking import TrackingSpec
from finetune_core.api.training import DeepSpeedSpec, StabilitySpec, TrainingSpec
from finetune_core.tasks import TASKS

_SCORES = " || ".join(
    f"self.dataset.task.name == '{task.name}' && required.score in {list(task.score_names)}" for task in TASKS.values()
)
_SCORE_EXISTS = (
    f"required.score in {list(LOWER_IS_BETTER)} || has(self.dataset.task)"
    f" && (has(self.dataset.task.entryPoint) || has(self.dataset.task.name) && ({_SCORES}))"
)
"""CEL expression: the evaluation measures the score `required.score`. For a job with a grader of its own the expression
accepts any name, and the trainer checks the name."""
SCORE_RULE_MESSAGE = (
    "`evaluation.require` must only name scores that the job has:"
    f" {', '.join(LOWER_IS_BETTER)}, or a score of `dataset.task`"
)
"""Message of the rule that the evaluation must measure every score of `evaluation.require`."""
_PROCESSES = "self.resources.nodes * (self.resources.gpusPerNode > 0 ? self.resources.gpusPerNode : 1)"
_ACCUMULATED = f"(self.training.gradientAccumulationSteps * {_PROCESSES})"


def _immutable(section: str, *, optional: bool = False) -> tuple[str, str]:
    """Return a CEL rule and its message: ``section``, the path of a field or a section of the spec, must not change
    after the job is created.

    For an optional field the rule first compares whether the field is set in the old and in the new spec. Without this
    comparison the rule could not be evaluated where the field is absent, and the API server counts a rule that can't be
    evaluated as violated.
    """
    rule = f"self.{section} == oldSelf.{section}"
    if optional:
        old, new = f"has(oldSelf.{section})", f"has(self.{section})"
        rule = f"{new} == {old} && (!{new} || {rule})"
    return rule, f"`{section}` must not change after creation; create a new FineTuneJob"


_BETWEEN_SECTIONS = (
    ("self.method == 'LoRA' || !has(self.lora)", "`lora` must be absent unless `method` is LoRA"),
    (
        "self.method == 'LoRA' || !has(self.storage.artifact)",
        "`storage.artifact` must be absent unless `method` is LoRA",
    ),
    (
        "self.method == 'LoRA' || !has(self.model.adapter) || self.model.adapter.use == 'Merge'",
        "`model.adapter.use` must be Merge unless `method` is LoRA",
    ),
    (
        "!has(self.lora) || !has(self.lora.quantization) || type(self.deepspeed.zeroStage) != int ||"
        " self.deepspeed.zeroStage == 1 || self.deepspeed.zeroStage == 2",
        "`deepspeed.zeroStage` must be 1, 2, None or Auto with `lora.quantization`",
    ),
    (
        "!has(self.lora) || !has(self.lora.quantization) || !has(self.storage.artifact) ||"
        " self.storage.artifact == 'Adapter'",
        "`storage.artifact` must be Adapter with `lora.quantization`, because the adapter belongs to the quantized base"
        " model",
    ),
    (
        "!has(self.storage.cache) || !has(self.model.volume)",
        "`storage.cache` must be absent with `model.volume`: such a model is used where it lies",
    ),
    (
        "type(self.deepspeed.zeroStage) != int || self.deepspeed.zeroStage != 0 || self.training.precision == 'fp32'",
        "`deepspeed.zeroStage` must be 1, 2, 3, None or Auto unless `training.precision` is fp32",
    ),
    (
        f"type(self.deepspeed.zeroStage) == int || self.deepspeed.zeroStage == 'Auto' || {_PROCESSES} == 1",
        "`deepspeed.zeroStage` must be 1, 2, 3 or Auto with several processes (`resources.nodes` x"
        " `resources.gpusPerNode`)",
    ),
    (
        "!has(self.training.gradientAccumulationSteps) || self.training.globalBatchSize =="
        f" {_ACCUMULATED} * (has(self.training.microBatchSize) ? self.training.microBatchSize"
        f" : self.training.globalBatchSize / {_ACCUMULATED})",
        "`training.globalBatchSize` must be `training.microBatchSize` x `training.gradientAccumulationSteps` x the"
        " number of processes (`resources.nodes` x `resources.gpusPerNode`)",
    ),
    (
        "!has(self.evaluation.artifactFrom) || self.evaluation.artifactFrom != 'Best' || has(self.dataset.validation)",
        "`evaluation.artifactFrom` must be Last unless `dataset.validation` is set",
    ),
    (
        "!has(self.evaluation.patience) || has(self.dataset.validation)",
        "`evaluation.patience` must be absent unless `dataset.validation` is set",
    ),
    (
        "self.evaluation.bestBy == 'Perplexity' || has(self.dataset.validation) && has(self.dataset.task)",
        "`evaluation.bestBy` must be Perplexity unless `dataset.validation` and `dataset.task` are set",
    ),
    (
        "!has(self.evaluation.generation) || has(self.dataset.task)",
        "`evaluation.generation` must be absent unless `dataset.task` is set",
    ),
    (
        "!has(self.evaluation.basePrompt) || has(self.dataset.task)",
        "`evaluation.basePrompt` must be absent unless `dataset.task` is set",
    ),
    (
        "!has(self.evaluation.require) || has(self.dataset.validation) || has(self.dataset.test)",
        "`evaluation.require` must be absent unless `dataset.validation` or `dataset.test` is set",
    ),
    (
        f"!has(self.evaluation.require) || self.evaluation.require.all(required, {_SCORE_EXISTS})",
        SCORE_RULE_MESSAGE,
    ),
)

_UNCHANGEABLE = (
    _immutable("model"),
    _immutable("dataset"),
    _immutable("method"),
    _immutable("lora", optional=True),
    _immutable("training"),
    _immutable("deepspeed"),
    _immutable("evaluation"),
    _immutable("stability"),
    _immutable("resources"),
    _immutable("storage.uri"),
    _immutable("storage.endpoint", optional=True),
    _immutable("storage.region"),
    _immutable("storage.credentialsSecretRef", optional=True),
    _immutable("storage.identity", optional=True),
    _immutable("storage.caConfigMapRef", optional=True),
    _immutable("storage.addressing", optional=True),
    _immutable("storage.encryption", optional=True),
    _immutable("storage.runId", optional=True),
    _immutable("storage.checkpoint.everySteps", optional=True),
    _immutable("storage.checkpoint.everyMinutes", optional=True),
    _immutable("storage.cache", optional=True),
    _immutable("storage.artifact", optional=True),
    _immutable("tracking", optional=True),
    _immutable("podTemplate"),
)


class FineTuneJobSpec(ApiModel):
    """The base model, the data, the training method, the machines, and the place of the result."""

    model_config = ConfigDict(json_schema_extra=cel(*_BETWEEN_SECTIONS, *_UNCHANGEABLE))

    model: ModelSpec
    """The base model: a folder with `config.json`, tokenizer files and safetensors. Used are `model.safetensors`, or
    else the weight files that `model.safetensors.index.json` names; adapters and other checkpoints beside them are left
    out. Quantised weights are refused."""
    dataset: DatasetSpec
    """The training, validation and test rows, and how a row becomes an example."""
    method: Method
    """What is trained: LoRA trains low-rank adapters, Full trains every parameter."""
    lora: LoRASpec | None = None
    """Shape of the adapters. Only with `method: LoRA`."""
    training: TrainingSpec
    """Learning rate, batch sizes, length and numerics of the optimisation."""
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    """How DeepSpeed shards the training state over the processes."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """When the validation rows are scored, how answers are generated, which checkpoint becomes the artifact, and which
    scores the tuned model must reach."""
    stability: StabilitySpec = StabilitySpec()
    """What the trainer does when the loss is not finite or explodes, or when a step hangs."""
    resources: ResourcesSpec = ResourcesSpec()
    """Number of pods, and the GPUs, CPUs and memory of each pod."""
    storage: StorageSpec
    """The object store for checkpoints, metrics and the artifact."""
    tracking: TrackingSpec | None = None
    """Experiment tracker that also gets the metrics."""
    run_policy: RunPolicySpec = RunPolicySpec()
    """How the operator starts, stops, retries and cleans up attempts. Users may edit this section at any time, also
    while the job runs."""
    pod_template: PodTemplateSpec = PodTemplateSpec()
    """The parts of the training pods that users may set."""
