"""The end of a job: the chosen checkpoint is loaded back, verified, scored, exported and committed as the artifact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune_core.contract import CheckpointRecord, EvaluationRecord, Outcome, Phase, Result
from finetune_core.layout import checkpoint_folder
from finetune_core.tasks import main_score_text
from finetune_trainer.checkpoints.export import Export, export
from finetune_trainer.checkpoints.saver import Saver
from finetune_trainer.engine.engine import MASTER, Engine
from finetune_trainer.engine.state import stored_tensors
from finetune_trainer.evaluation.comparison import ModelComparison
from finetune_trainer.material import Data, base_folder
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.reporting.progress import Progress
from finetune_trainer.sources.inputs import source_name
from finetune_trainer.storage.artifact import publish
from finetune_trainer.storage.bases import publish_base
from finetune_trainer.storage.checkpoints import fetch_folder
from finetune_trainer.storage.root import RunRoot


def finish(
    plan: WorkerPlan,
    gang: Gang,
    root: RunRoot,
    data: Data,
    model: Any,
    engine: Engine,
    saver: Saver,
    comparison: ModelComparison,
    stopped_early: bool,
    progress: Progress | None,
) -> Result:
    """Return the result with the committed artifact; raises StopAgreed where a rank was told to stop meanwhile.

    What is scored and exported are the verified bytes of the checkpoint, not what the process has in memory.
    """
    chosen = saver.chosen(plan.config.evaluation.artifact_from)
    source = plan.folder / "chosen"
    if progress is not None:
        progress.phase(Phase.EXPORTING)

    def fetch() -> None:
        if gang.local_rank == 0:
            fetch_folder(root, checkpoint_folder(chosen.run, chosen.step), source)

    gang.each(fetch, until_told=True)
    if comparison.evaluation is not None:
        for name, tensors in stored_tensors(source, (MASTER,)):
            engine.write_weight(name, tensors[MASTER])
        comparison.score_tuned_model(chosen.step)
    if progress is not None:
        progress.phase(Phase.EXPORTING)

    def publish_chosen() -> object:
        outcome = Outcome.EARLY_STOPPED if stopped_early else Outcome.COMPLETED
        target = plan.folder / "artifact"
        files = export_files(plan, root, model, data, source, target)
        result = publish(root, saver.run, chosen.step, files, below=target, outcome=outcome)
        shutil.rmtree(target)
        patience = plan.config.evaluation.patience if stopped_early else None
        message = sentence(chosen, comparison.evaluation, task=plan.config.dataset.task, patience=patience)
        evaluation = comparison.evaluation.rounded() if comparison.evaluation is not None else None
        update = {"message": message, "checkpoint": chosen.uri, "evaluation": evaluation}
        return result.model_copy(update=update).model_dump(mode="json")

    result = Result.model_validate(gang.share(publish_chosen, until_told=True))
    shutil.rmtree(source, ignore_errors=True)
    return result


def export_files(plan: WorkerPlan, root: RunRoot, model: Any, data: Data, source: Path, target: Path) -> list[Path]:
    """Write the artifact of the checkpoint in ``source`` into ``target`` and return its files.

    An adapter names its base: where that is not the one given, it is published first.
    """
    config, folder = plan.config, base_folder(plan)
    base_name = source_name(config.model)
    if folder != plan.inputs.model and config.lora is not None and config.storage.artifact != "Merged":
        base_name = publish_base(root, folder)
    options = Export(
        kind=config.storage.artifact,
        precision=config.optimization.precision,
        base=folder,
        base_name=base_name,
        new_rows=data.prepared.new_rows,
        stop_ids=data.stop_ids,
    )
    return export(model, data.tokenizer, source, target, options)


def sentence(chosen: CheckpointRecord, evaluation: EvaluationRecord | None, *, task: str, patience: int | None) -> str:
    """Return what a person reads at the end: which step it is, how good, and why it stopped early where it did."""
    text = f"the artifact is the model of step {chosen.step}"
    if chosen.perplexity is not None:
        text += f", validation perplexity {chosen.perplexity:.4g}"
    if evaluation is not None and evaluation.tuned is not None and evaluation.tuned.task_score is not None:
        before = evaluation.base.task_score if evaluation.base is not None else None
        text += f", {main_score_text(task, evaluation.tuned.task_score)}"
        text += f" (the base model {before:.1%})" if before is not None else ""
    if patience is not None:
        evaluations = "1 evaluation" if patience == 1 else f"{patience} evaluations"
        text += f"; stopped early, because {evaluations} in a row brought no improvement"
    return text
