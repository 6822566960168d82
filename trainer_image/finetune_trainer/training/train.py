"""From a joined gang to a committed artifact: `train` reads as the story of a run, `loop` has its steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from finetune_core.contract import Phase, Result
from finetune_core.layout import checkpoint_folder
from finetune_trainer.errors import StopAgreed, Stopped
from finetune_trainer.outcomes import Standing
from finetune_trainer.plan import WorkerPlan, open_root
from finetune_trainer.storage.artifact import publish
from finetune_trainer.storage.checkpoints import TrainerState, fetch_folder
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.export import export
from finetune_trainer.training.gang import Gang
from finetune_trainer.training.loop import Training
from finetune_trainer.training.material import Data, load_data, load_model, prepare
from finetune_trainer.training.model import trained_parameters
from finetune_trainer.training.progress import Progress, say
from finetune_trainer.training.saving import Saver
from finetune_trainer.training.start import Start, past_steps, read_trainer_state, start_run
from finetune_trainer.training.state import load_state, load_weights


def train(plan: WorkerPlan, gang: Gang, progress: Progress | None, standing: Standing) -> Result:
    """Train, checkpoint and publish; return the result that every rank of the gang ends with.

    ``progress`` exists on rank 0; ``standing`` is kept current on all. All ranks agree at every micro-batch, batch of
    an evaluation and wait for the store on whether one of them was told to stop. Raises Stopped once what was trained
    is committed, and the other exceptions of `errors`.
    """
    try:
        return _train(plan, gang, progress, standing)
    except StopAgreed:
        # Outside of the steps nothing is unsaved: before the first one, or after the last one's checkpoint.
        where = "what was trained is committed" if standing.checkpoint else "no step was finished yet"
        raise Stopped(f"told to stop: {where}") from None


def _train(plan: WorkerPlan, gang: Gang, progress: Progress | None, standing: Standing) -> Result:
    gang.check_stop()
    root = open_root(plan.config, plan.paths)
    prepared = gang.each(lambda: prepare(plan) if gang.local_rank == 0 else [], until_told=True)
    data = gang.together(lambda: load_data(plan, prepared[0]), until_told=True)
    fetched = plan.folder / "resume"
    start = _start(plan, gang, root, fetched)
    model = gang.together(lambda: load_model(plan), until_told=True)
    state: TrainerState | None = None
    if start.parent is not None:
        state = read_trainer_state(fetched)
        load_weights(trained_parameters(model), fetched)
    engine = Engine(model, plan.config.optimization, gang.device)
    if state is not None:
        load_state(engine, fetched, updates=state.updates)
    saver = Saver(gang, root, start, plan.folder, plan.config.storage)
    run = Training(plan, gang, engine, data, saver, progress, standing, state)
    if progress is not None:
        progress.begin(run=start.run, total_steps=run.total_steps, history=past_steps(root, start))
        progress.notice(*start.notices, *data.notices)
        progress.saved(None, saver.committed)
        say(run.description(start))
        progress.phase(Phase.TRAINING)
    run.steps()
    return _finish(plan, gang, root, saver, data, model, start.run, progress)


def _start(plan: WorkerPlan, gang: Gang, root: RunRoot, fetched: Path) -> Start:
    """Take the run number on rank 0 and fetch the checkpoint to resume from once a machine."""

    def begin() -> object:
        return start_run(root, plan.identity, fetched).model_dump(mode="json")

    start = Start.model_validate(gang.share(begin, until_told=True))

    def fetch() -> None:
        if start.parent is not None and gang.local_rank == 0 and not gang.is_first:
            fetch_folder(root, checkpoint_folder(start.parent.run, start.parent.step), fetched)

    gang.each(fetch, until_told=True)
    return start


def _finish(
    plan: WorkerPlan,
    gang: Gang,
    root: RunRoot,
    saver: Saver,
    data: Data,
    model: torch.nn.Module,
    run: int,
    progress: Progress | None,
) -> Result:
    """Load the chosen checkpoint back, verify it, export it and commit the artifact; rank 0 for all."""

    def publish_chosen() -> object:
        if progress is not None:
            progress.phase(Phase.EXPORTING)
        chosen = saver.chosen(plan.config.evaluation.artifact_from)
        source, target = plan.folder / "chosen", plan.folder / "artifact"
        fetch_folder(root, checkpoint_folder(chosen.run, chosen.step), source)
        files = export(model, data.tokenizer, source, target, precision=plan.config.optimization.precision)
        result = publish(root, run, chosen.step, files)
        shutil.rmtree(source)
        shutil.rmtree(target)
        score = f", validation perplexity {chosen.perplexity:.4g}" if chosen.perplexity is not None else ""
        message = f"the artifact is the model of step {chosen.step}{score}"
        return result.model_copy(update={"message": message, "checkpoint": chosen.uri}).model_dump(mode="json")

    return Result.model_validate(gang.share(publish_chosen, until_told=True))
