"""`spec` of a FineTuneJob: its sections, the rules between them, and what may change after creation."""

from __future__ import annotations

from pydantic import ConfigDict

from finetune_core.api.base import ApiModel, cel
from finetune_core.api.method import DeepSpeedSpec, EvaluationSpec, LoRASpec, Method, TrainingSpec
from finetune_core.api.running import PodTemplateSpec, ResourcesSpec, RunPolicySpec, StorageSpec
from finetune_core.api.sources import DatasetSpec, ModelSpec


def _immutable(section: str, *, optional: bool = False) -> tuple[str, str]:
    """Return the CEL rule that keeps ``section`` as it was created.

    `self.x == oldSelf.x` alone is skipped by the server when an optional field is added or removed.
    """
    name = section.rsplit(".", 1)
    parent = f".{name[0]}" if len(name) == 2 else ""
    rule = f"self.{section} == oldSelf.{section}"
    if optional:
        old, new = f"has(oldSelf{parent}.{name[-1]})", f"has(self{parent}.{name[-1]})"
        rule = f"{new} == {old} && (!{new} || {rule})"
    return rule, f"`{section}` must not change after creation; create a new FineTuneJob"


class FineTuneJobSpec(ApiModel):
    """What to fine-tune, on what, how, where, and where the result goes."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self.method == 'LoRA' || !has(self.lora)", "`lora` must be absent unless `method` is LoRA"),
            (
                "type(self.deepspeed.zeroStage) != int || self.deepspeed.zeroStage != 0"
                " || self.training.precision == 'fp32'",
                "`deepspeed.zeroStage` must be 1, 2, 3 or Auto unless `training.precision` is fp32",
            ),
            (
                "!has(self.evaluation.artifactFrom) || self.evaluation.artifactFrom != 'Best'"
                " || has(self.dataset.validation)",
                "`evaluation.artifactFrom` must be Last unless `dataset.validation` is set",
            ),
            _immutable("model"),
            _immutable("dataset"),
            _immutable("method"),
            _immutable("lora", optional=True),
            _immutable("training"),
            _immutable("deepspeed"),
            _immutable("evaluation"),
            _immutable("resources"),
            _immutable("storage.uri"),
            _immutable("storage.endpoint", optional=True),
            _immutable("storage.region"),
            _immutable("storage.credentialsSecretRef"),
            _immutable("storage.runId", optional=True),
            _immutable("storage.checkpoint.everySteps"),
            _immutable("podTemplate"),
        )
    )

    model: ModelSpec
    """The base model."""
    dataset: DatasetSpec
    """The examples to learn from."""
    method: Method
    """LoRA trains low-rank adapters, Full trains every parameter."""
    lora: LoRASpec | None = None
    """The adapters; only with `method: LoRA`."""
    training: TrainingSpec
    """The optimisation."""
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    """How training state is spread over the processes."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """When the validation rows are scored."""
    resources: ResourcesSpec = ResourcesSpec()
    """Machines."""
    storage: StorageSpec
    """The object store that checkpoints and the artifact go to."""
    run_policy: RunPolicySpec = RunPolicySpec()
    """What the operator does around attempts; may change at any time."""
    pod_template: PodTemplateSpec = PodTemplateSpec()
    """The parts of the pods that people need to set."""
