"""The end of a job's training: choose a checkpoint, download and verify its files, score the tuned model, and publish
the artifact.

`train.py` calls `finish` after the last optimizer step of a run.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_core.contract import CheckpointRecord, EvaluationRecord, Outcome, Phase, Result
from finetune_core.layout import artifact_folder, checkpoint_folder
from finetune_core.requirements import judged
from finetune_core.tasks import main_score_text, main_value_text
from finetune_trainer.checkpoints.export import MERGED_FOLDER, export_artifact
from finetune_trainer.checkpoints.model_card import CardFacts, model_card
from finetune_trainer.checkpoints.saver import Saver
from finetune_trainer.engine.engine import MASTER
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.engine.state import stored_tensors
from finetune_trainer.evaluation.comparison import ModelComparison
from finetune_trainer.model.digest import BaseDigests
from finetune_trainer.pod.model_file_names import ADAPTER_FILE
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.preparation import TrainingData, base_model_folder, export_options, publishes_extended_base
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.reporting.progress import Progress
from finetune_trainer.sources.inputs import model_revision
from finetune_trainer.storage.artifact import CARD_FILE, publish
from finetune_trainer.storage.checkpoint_folders import fetch_folder
from finetune_trainer.storage.extended_bases import publish_base
from finetune_trainer.storage.root import RunRoot


def finish(
    plan: WorkerPlan,
    gang: Gang,
    root: RunRoot,
    data: TrainingData,
    *,
    model: Any,
    engine: TrainingEngine,
    saver: Saver,
    comparison: ModelComparison,
    digests: BaseDigests,
    stopped_early: bool,
    progress: Progress | None,
) -> Result:
    """Publish the artifact and return the job's result, on every rank. Raises StopAgreed after SIGTERM.

    The tuned model's scores and the artifact come from the chosen checkpoint, which is downloaded from the bucket and
    verified, and not from the weights in memory.
    """
    # The artifact may need as much memory as the snapshots take.
    saver.free_memory()
    chosen = saver.chosen(plan.config.evaluation.artifact_from)
    source = plan.folder / "chosen"
    if progress is not None:
        progress.phase(Phase.EXPORTING)

    def fetch() -> None:
        if gang.local_rank == 0:
            fetch_folder(root, checkpoint_folder(chosen.run, chosen.step), source)

    gang.gather(fetch, until_stop=True)
    if comparison.evaluation is not None:
        with gang.long_work():
            for name, tensors in stored_tensors(source, (MASTER,)):
                engine.write_weight(name, tensors[MASTER])
        comparison.score_tuned_model(chosen.step)
    if progress is not None:
        progress.phase(Phase.EXPORTING)

    def publish_chosen() -> object:
        outcome = Outcome.EARLY_STOPPED if stopped_early else Outcome.COMPLETED
        target = plan.folder / "artifact"
        export_files(plan, root, model, data, source, target, digests)
        write_cards(plan, data, target, digests, chosen.step, comparison.evaluation)
        files = sorted(path for path in target.rglob("*") if path.is_file())
        result = publish(root, saver.run, chosen.step, files, below=target, outcome=outcome, origin=data.summary.origin)
        shutil.rmtree(target)
        patience = plan.config.evaluation.patience if stopped_early else None
        task = plan.config.dataset.task
        message = result_message(chosen, comparison.evaluation, task=task.label if task else None, patience=patience)
        told = told_of_run(result, saver.run, message, chosen.uri, comparison.evaluation)
        return judged(told, plan.config.evaluation.require).model_dump(mode="json")

    result = Result.model_validate(gang.run_on_rank_0(publish_chosen, until_stop=True))
    # The artifact is committed, so a SIGTERM that comes from now on changes nothing.
    gang.stand_down()
    shutil.rmtree(source, ignore_errors=True)
    return result


def told_of_run(
    committed: Result, run: int, message: str, checkpoint: str, evaluation: EvaluationRecord | None
) -> Result:
    """Return ``committed``, the result of the committed artifact, with the details of ``run``: the run's message, the
    address of its chosen checkpoint, and its scores.

    Another run may have committed an artifact first. Then ``committed`` is returned as it is, because the scores of
    ``run`` are not those of that artifact.
    """
    artifact = committed.artifact
    if artifact is None or not artifact.uri.endswith(f"/{artifact_folder(run)}"):
        return committed
    rounded = evaluation.rounded() if evaluation is not None else None
    return committed.model_copy(update={"message": message, "checkpoint": checkpoint, "evaluation": rounded})


def export_files(
    plan: WorkerPlan, root: RunRoot, model: Any, data: TrainingData, source: Path, target: Path, digests: BaseDigests
) -> None:
    """Write the artifact of the checkpoint in folder ``source`` into folder ``target``.

    An adapter's configuration names the base model. Where the artifact is an adapter of a base model that the run
    extended, for example by added tokens or a merged adapter, the extended copy is uploaded to the bucket first, and
    the configuration names the address of the copy. ``digests`` holds the sha256 of the base model and of the extended
    copy.
    """
    options = export_options(plan, data.structure, data.stop_ids)
    options = replace(
        options,
        added_rows=data.summary.added_rows,
        base_sha256=digests.base_sha256,
        origin=data.summary.origin,
    )
    if publishes_extended_base(plan):
        address = publish_base(root, base_model_folder(plan))
        options = replace(options, base_name=address, revision=None, base_sha256=digests.rows_sha256)
    export_artifact(model, data.tokenizer, source, target, options)


def write_cards(
    plan: WorkerPlan,
    data: TrainingData,
    target: Path,
    digests: BaseDigests,
    step: int,
    evaluation: EvaluationRecord | None,
) -> None:
    """Write a model card into the artifact's folder ``target``, and into its folder of the merged model where there is
    one. The artifact is the model of optimizer step ``step``."""
    config = plan.config
    facts = CardFacts(
        identity=plan.identity,
        base_revision=model_revision(config.model, plan.inputs.model),
        base_sha256=digests.base_sha256,
        data_sha256=data.summary.data_sha256,
        examples=len(data.train),
        origin=data.summary.origin,
        step=step,
        evaluation=evaluation,
    )
    merged = target / MERGED_FOLDER
    is_adapter = (target / ADAPTER_FILE).is_file()
    (target / CARD_FILE).write_text(model_card(config, facts, "adapter" if is_adapter else "model"))
    if merged.is_dir():
        (merged / CARD_FILE).write_text(model_card(config, facts, "model"))


def result_message(
    chosen: CheckpointRecord, evaluation: EvaluationRecord | None, *, task: str | None, patience: int | None
) -> str:
    """Return the sentence of the final result, such as `the artifact is the model of step 60, validation perplexity
    1.479`.

    ``task`` is the name of the job's task, None where the job has none. ``patience`` is `evaluation.patience` where the
    run stopped early, else None.
    """
    text = f"the artifact is the model of step {chosen.step}"
    if chosen.perplexity is not None:
        text += f", validation perplexity {chosen.perplexity:.4g}"
    if evaluation is not None and evaluation.tuned is not None and evaluation.tuned.task_score is not None:
        before = evaluation.base.task_score if evaluation.base is not None else None
        text += f", {main_score_text(task, evaluation.tuned.task_score)}"
        text += f" (the base model {main_value_text(task, before)})" if before is not None else ""
    if patience is not None:
        evaluations = "1 evaluation" if patience == 1 else f"{patience} evaluations"
        text += f"; stopped early, because {evaluations} in a row brought no improvement"
    return text
