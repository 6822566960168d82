"""From a joined gang to a committed artifact: `train` reads as the story of an attempt, `loop` has the steps of a run,
`finish` what becomes of the last checkpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune_core.contract import Phase, Result
from finetune_core.layout import checkpoint_folder
from finetune_trainer.checkpoints.saver import Saver
from finetune_trainer.checkpoints.start import Start, past_steps, read_trainer_state, restart_run, start_run
from finetune_trainer.data.shares import Batches
from finetune_trainer.decisions.recovery import RollBack
from finetune_trainer.decisions.replay import Past, past_of
from finetune_trainer.engine.checks import check_model
from finetune_trainer.engine.engine import Engine
from finetune_trainer.engine.state import load_state, load_weights
from finetune_trainer.evaluation.comparison import ModelComparison
from finetune_trainer.evaluation.scorer import Scorer
from finetune_trainer.evaluation.sets import prepare_base_model_set, validation_set
from finetune_trainer.finish import finish
from finetune_trainer.loop import Training
from finetune_trainer.material import (
    Data,
    base_folder,
    load_data,
    load_model,
    prepare,
    same_on_all_nodes,
)
from finetune_trainer.model.digest import Ground
from finetune_trainer.model.load import trained_parameters
from finetune_trainer.pod.errors import StopAgreed, Stopped
from finetune_trainer.pod.outcomes import Standing
from finetune_trainer.pod.plan import WorkerPlan, open_root
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.reporting.progress import Progress, say
from finetune_trainer.storage.checkpoints import TrainerState, fetch_folder
from finetune_trainer.storage.lineage import Rollback
from finetune_trainer.storage.root import RunRoot


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
    answers = gang.each(lambda: _prepare(plan) if gang.local_rank == 0 else None, until_told=True)
    data = gang.together(lambda: load_data(plan, same_on_all_nodes(answers)), until_told=True)
    start = _start(plan, gang, root)
    while True:
        run = Run(plan, gang, root, data, start, progress, standing)
        try:
            run.comparison.score_base_model(is_base=start.parent is None)
            stopped_early = run.training.steps()
            return finish(
                plan, gang, root, data, run.model, run.engine, run.saver, run.comparison, stopped_early, progress
            )
        except RollBack as order:
            run.close()
            start = _start_again(plan, gang, root, start, order.rollback)


def _prepare(plan: WorkerPlan) -> object:
    """Write what the ranks of this node share, and return what there is to know about it."""
    prepared = prepare(plan)
    notices = [*prepared.notices, *prepare_base_model_set(plan)]
    return prepared.model_copy(update={"notices": notices}).model_dump(mode="json")


class Run:
    """The parts of one run: everything that a rollback makes anew."""

    def __init__(
        self,
        plan: WorkerPlan,
        gang: Gang,
        root: RunRoot,
        data: Data,
        start: Start,
        progress: Progress | None,
        standing: Standing,
    ) -> None:
        """Load the model at the state of ``start``; a collective."""
        self.model: Any = gang.together(lambda: load_model(plan), until_told=True)
        fetched = _fetched(plan, start)
        state: TrainerState | None = None
        if start.parent is not None:
            state = read_trainer_state(fetched)
            load_weights(trained_parameters(self.model), fetched)
        self.engine = Engine(self.model, plan.config.optimization, gang.device)
        check_model(self.engine, data.train, pad=data.pad, packing=data.capacity is not None)
        if state is not None:
            load_state(self.engine, fetched, updates=state.updates)
        shutil.rmtree(fetched, ignore_errors=True)
        self.saver = Saver(gang, root, start, plan.folder, plan.config.storage, plan.config.evaluation.best_by)
        batches = Batches(
            data.train,
            rank=gang.rank,
            world_size=gang.world_size,
            pad=data.pad,
            capacity=data.capacity,
            seed=plan.config.optimization.seed,
        )

        def tell(phase: Phase) -> None:
            standing.phase = phase.value
            if progress is not None:
                progress.phase(phase)

        scorer = Scorer(
            self.engine,
            gang,
            batches,
            plan.config.evaluation,
            plan.config.dataset.task,
            batch_size=plan.config.optimization.micro_batch_size,
            context=data.prepared.model_context,
            phase=tell,
        )
        self.comparison = ModelComparison(plan, gang, root, data, scorer, start.run, progress)
        history = past_steps(root, start) if gang.is_first else []
        shared = gang.share(lambda: past_of(plan.config.evaluation, history).model_dump(mode="json"), until_told=True)
        self.training = Training(
            plan,
            gang,
            self.engine,
            data,
            batches,
            self.saver,
            scorer,
            validation_set(plan, data),
            progress,
            standing,
            start,
            Past.model_validate(shared),
            state,
        )
        if progress is not None:
            progress.begin(run=start.run, total_steps=self.training.total_steps, history=history)
            progress.notice(*start.notices, *data.prepared.notices)
            progress.saved(None, self.saver.committed, self.saver.best)
            say(self.training.description(start))
        tell(Phase.TRAINING)

    def close(self) -> None:
        """Free the memory of model and engine, for the run that follows."""
        self.engine.close()
        del self.engine, self.model, self.training, self.comparison


def _fetched(plan: WorkerPlan, start: Start) -> Path:
    """Return where the checkpoint that ``start`` resumes from is fetched to."""
    return plan.folder / f"resume-{start.run}"


def _start(plan: WorkerPlan, gang: Gang, root: RunRoot) -> Start:
    """Take the run number on rank 0 and fetch the checkpoint to resume from once a machine."""
    target = plan.folder / "resume"

    def begin() -> object:
        ground = Ground.of(adapters=plan.config.lora is not None, base=plan.inputs.model, extended=base_folder(plan))
        start = start_run(root, plan.identity, target).model_copy(update={"ground": ground})
        if start.parent is not None:
            ground.check(read_trainer_state(target), seed=plan.config.optimization.seed)
        _moved(target, _fetched(plan, start))
        return start.model_dump(mode="json")

    start = Start.model_validate(gang.share(begin, until_told=True))
    _fetch(plan, gang, root, start)
    return start


def _start_again(plan: WorkerPlan, gang: Gang, root: RunRoot, left: Start, rollback: Rollback) -> Start:
    """Take the next run number after ``left``, which went wrong, and fetch what it goes back to."""
    target = plan.folder / "resume"

    def begin() -> object:
        start = restart_run(root, plan.identity, left.run, rollback, target)
        start = start.model_copy(update={"ground": left.ground})
        _moved(target, _fetched(plan, start))
        return start.model_dump(mode="json")

    start = Start.model_validate(gang.share(begin, until_told=True))
    _fetch(plan, gang, root, start)
    return start


def _moved(source: Path, target: Path) -> None:
    if source.is_dir():
        source.rename(target)


def _fetch(plan: WorkerPlan, gang: Gang, root: RunRoot, start: Start) -> None:
    def fetch() -> None:
        if start.parent is not None and gang.local_rank == 0 and not gang.is_first:
            fetch_folder(root, checkpoint_folder(start.parent.run, start.parent.step), _fetched(plan, start))

    gang.each(fetch, until_told=True)
