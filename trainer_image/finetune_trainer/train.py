"""One attempt to train a job, from the moment when all ranks have joined to the committed artifact. `worker.py` calls
`train` on every rank.

`train` shows all phases of an attempt in their order. `loop.py` holds the optimizer steps of a run, and `finish.py`
makes the artifact of the chosen checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from finetune_core.contract import Phase, Result
from finetune_core.errors import UserError
from finetune_core.layout import checkpoint_folder
from finetune_trainer.checkpoints.rehearsal import rehearse_adapter
from finetune_trainer.checkpoints.resume import (
    RunStart,
    read_steps_before,
    read_trainer_state,
    start_run,
    start_run_after_rollback,
)
from finetune_trainer.checkpoints.saver import Saver
from finetune_trainer.data.dataset import GRADED_FIELDS, check_columns
from finetune_trainer.data.micro_batches import MicroBatcher
from finetune_trainer.data.prompts import answer_reader
from finetune_trainer.decisions.recovery import RollbackRequired
from finetune_trainer.decisions.replay import ReplayedDecisions, replay_decisions
from finetune_trainer.engine.checks import check_model
from finetune_trainer.engine.making import make_engine
from finetune_trainer.engine.state import load_state, load_weights
from finetune_trainer.evaluation.comparison import ModelComparison
from finetune_trainer.evaluation.gradable import asked_rows, needed_by, why_ungradable
from finetune_trainer.evaluation.graders import Grading, load_grading
from finetune_trainer.evaluation.scorer import Scorer
from finetune_trainer.evaluation.sets import prepare_base_model_set, validation_set
from finetune_trainer.finish import finish
from finetune_trainer.kernels.parts import parts_left_plain
from finetune_trainer.loop import TrainingLoop
from finetune_trainer.model.attention import DeviceAbilities, ModelAbilities, kernels
from finetune_trainer.model.digest import BaseDigests
from finetune_trainer.model.load import trained_parameters
from finetune_trainer.pod.errors import StopAgreed, Stopped
from finetune_trainer.pod.outcomes import WorkerStatus
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.preparation import (
    PreparationSummary,
    TrainingData,
    agreed_summary,
    base_model_folder,
    export_options,
    load_data,
    load_model,
    prepare_node,
    publishes_extended_base,
    with_adapter_settings,
)
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.reporting.progress import Progress, log_line
from finetune_trainer.storage.artifact import rehearse_publish
from finetune_trainer.storage.checkpoint_folders import TrainerState, fetch_folder
from finetune_trainer.storage.lineage import Rollback
from finetune_trainer.storage.root import RunRoot, open_root
from finetune_trainer.storage.settings_file import write_settings


def train(plan: WorkerPlan, gang: Gang, progress: Progress | None, status: WorkerStatus) -> Result:
    """Train, write checkpoints and publish the artifact. Return the result, which is the same on every rank.

    ``progress`` is None on all ranks but rank 0. ``status`` is updated on every rank as training goes on. At every
    micro-batch, every evaluation batch and every wait for the object store, the ranks agree on whether any rank
    received SIGTERM. After SIGTERM `train` raises Stopped, once everything that was trained is committed. It can also
    raise UserError, Diverged, OutsideFailure and errors of torch.
    """
    try:
        gang.check_stop()
        plan = gang.run_on_all_ranks(partial(with_adapter_settings, plan), until_stop=True)
        root = open_root(plan.config, plan.paths)
        grading = _load_grading(plan, gang)
        data = _prepare_and_load_data(plan, gang, grading)
        grading = _try_rows(plan, gang, data, grading, progress)
        start = _start_first_run(plan, gang, root, data.summary)
        while True:
            with gang.long_work():
                run = Run(plan, gang, root, data, grading, start, progress, status)
            try:
                run.comparison.score_base_model(is_base=start.parent is None)
                stopped_early = run.loop.run()
                return finish(
                    plan,
                    gang,
                    root,
                    data,
                    model=run.model,
                    engine=run.engine,
                    saver=run.saver,
                    comparison=run.comparison,
                    digests=start.base_digests,
                    stopped_early=stopped_early,
                    progress=progress,
                )
            except RollbackRequired as required:
                with gang.long_work():
                    run.close()
                start = _start_run_after_rollback(plan, gang, root, start, required.rollback)
    except StopAgreed:
        # Nothing is left to save: `TrainingLoop.run` catches StopAgreed itself and saves. StopAgreed arrives here only
        # if SIGTERM came before the run's first step or after its last checkpoint.
        where = "what was trained is committed" if status.checkpoint else "no step was finished yet"
        raise Stopped(f"told to stop: {where}") from None


def _prepare_and_load_data(plan: WorkerPlan, gang: Gang, grading: Grading | None) -> TrainingData:
    """Let the first rank of each node write the tokenised rows and, where needed, an extended base model. Then load the
    rows on every rank."""
    graded = grading.columns_read if grading is not None else frozenset()
    answers = gang.gather(
        lambda: _prepare(plan, graded, gang.stop_requested) if gang.local_rank == 0 else None, until_stop=True
    )
    return gang.run_on_all_ranks(lambda: load_data(plan, agreed_summary(answers)), until_stop=True)


def _prepare(plan: WorkerPlan, graded: frozenset[str], stop: Callable[[], bool]) -> object:
    """Write the files that the ranks of this node share, and return the `PreparationSummary` of the node as JSON.
    ``graded`` holds all columns that the job's grader reads. Raises StopAgreed where ``stop`` returns True while rows
    are tokenised."""
    summary = prepare_node(plan, graded, stop=stop)
    notices = [*summary.notices, *prepare_base_model_set(plan, graded)]
    return summary.model_copy(update={"notices": notices}).model_dump(mode="json")


def _load_grading(plan: WorkerPlan, gang: Gang) -> Grading | None:
    """Return the job's `Grading`, which grades generated answers, on every rank; None if the job has no task.

    Raises UserError on all ranks if the grader does not exist, or if `dataset.validation` or `dataset.test` lacks a
    column that the grader requires.
    """
    config = plan.config
    grading: Grading | None = gang.run_on_all_ranks(
        lambda: load_grading(config.dataset, config.evaluation.require), until_stop=True
    )
    if grading is None:
        return None

    def check() -> None:
        for field, path in zip(GRADED_FIELDS, (plan.inputs.validation, plan.inputs.test), strict=True):
            if path is not None:
                check_columns(path, field, config.dataset.format, grading.required_columns)

    gang.run_on_rank_0(check, until_stop=True)
    return grading


def _try_rows(
    plan: WorkerPlan, gang: Gang, data: TrainingData, grading: Grading | None, progress: Progress | None
) -> Grading | None:
    """Try whether rows of `dataset.validation` and of `dataset.test` can be graded, and return a `Grading` that also
    reads answers with the job's tokenizer. Return None where the job has no task.

    Raises UserError on all ranks if none of the tried rows of one field can be graded although `evaluation.bestBy` or
    `evaluation.require` needs a score on the rows of this field. If neither needs a score on the rows of the field, a
    notice says that none of the tried rows can be graded.
    """
    form, evaluation = plan.config.dataset.format.prompt_completion, plan.config.evaluation
    if grading is None or form is None:
        return None
    grading = grading.reading(answer_reader(form, data.tokenizer, plan.config.model.added_tokens, data.stop_ids))
    scored = "dataset.test" if plan.config.dataset.test is not None else "dataset.validation"

    def notices() -> object:
        found = []
        for field, examples in zip(GRADED_FIELDS, (data.validation, data.test), strict=True):
            if problem := why_ungradable(grading, [row.fields for row in asked_rows(evaluation, examples.rows)]):
                if needing := needed_by(evaluation, field, scored):
                    raise UserError(field, f"{problem}, and {needing} needs a score of dataset.task")
                found.append(f"{field}: {problem}")
        return found

    texts = gang.run_on_rank_0(notices, until_stop=True)
    if progress is not None:
        progress.notice(*texts)
    return grading


def _start_first_run(plan: WorkerPlan, gang: Gang, root: RunRoot, summary: PreparationSummary) -> RunStart:
    """Take the next run number of the job, and fetch the checkpoint that the run resumes from, if there is
    one."""

    def take_run_number(target: Path) -> RunStart:
        is_lora = plan.config.lora is not None
        digests = BaseDigests.of(adapters=is_lora, base=plan.inputs.model, extended=base_model_folder(plan))
        adapter_sha256 = summary.origin.sha256 if summary.origin is not None else None
        start = start_run(root, plan.identity, target, plan.inputs.training, adapter_sha256).model_copy(
            update={"base_digests": digests}
        )
        if start.parent is not None:
            digests.check(read_trainer_state(target), seed=plan.config.optimization.seed)
        refused = rehearse_publish(root, start.run, extended_base=publishes_extended_base(plan))
        other_base = digests.other_base_notice(summary.adapter_base_sha256)
        return start.model_copy(update={"notices": [*start.notices, *other_base, *refused]})

    return _begin_run(plan, gang, root, take_run_number)


def _start_run_after_rollback(
    plan: WorkerPlan, gang: Gang, root: RunRoot, failed: RunStart, rollback: Rollback
) -> RunStart:
    """Take the next run number after the ``failed`` run, and fetch the checkpoint to which ``rollback`` returns."""

    def take_run_number(target: Path) -> RunStart:
        start = start_run_after_rollback(root, plan.identity, failed.run, rollback, target)
        return start.model_copy(update={"base_digests": failed.base_digests})

    return _begin_run(plan, gang, root, take_run_number)


def _begin_run(plan: WorkerPlan, gang: Gang, root: RunRoot, take_run_number: Callable[[Path], RunStart]) -> RunStart:
    """Return the start of a run on every rank, with the checkpoint to resume from on the disk of every node.

    Rank 0 calls ``take_run_number``, which also downloads the checkpoint into the folder that it gets as its argument.
    Then the first rank of each other node fetches the same checkpoint. All ranks must call this function together.
    """

    def on_rank_0() -> object:
        target = plan.folder / "resume"
        start = take_run_number(target)
        write_settings(root, start.run, plan.config)
        if target.is_dir():
            target.rename(_resume_folder(plan, start))
        return start.model_dump(mode="json")

    start = RunStart.model_validate(gang.run_on_rank_0(on_rank_0, until_stop=True))

    def fetch() -> None:
        if start.parent is not None and gang.local_rank == 0 and not gang.is_first:
            fetch_folder(root, checkpoint_folder(start.parent.run, start.parent.step), _resume_folder(plan, start))

    gang.gather(fetch, until_stop=True)
    return start


def _resume_folder(plan: WorkerPlan, start: RunStart) -> Path:
    """Return the local folder that holds the checkpoint which ``start`` resumes from."""
    return plan.folder / f"resume-{start.run}"


class Run:
    """The objects of one run: model, engine, saver, model comparison and training loop. After a rollback new objects
    are made for the next run."""

    def __init__(
        self,
        plan: WorkerPlan,
        gang: Gang,
        root: RunRoot,
        data: TrainingData,
        grading: Grading | None,
        start: RunStart,
        progress: Progress | None,
        status: WorkerStatus,
    ) -> None:
        """Load the model and, where ``start`` resumes from a checkpoint, the training state of the checkpoint. All
        ranks must make their `Run` together."""
        config = plan.config
        self._plan, self._data = plan, data
        self.model: Any = gang.run_on_all_ranks(lambda: load_model(plan), until_stop=True)
        if config.lora is not None:
            gang.run_on_rank_0(self._rehearse_adapter, until_stop=True)
        fetched = _resume_folder(plan, start)
        state: TrainerState | None = None
        if start.parent is not None:
            state = read_trainer_state(fetched)
            load_weights(trained_parameters(self.model), fetched)
        ratio = config.lora.lora_plus_ratio if config.lora is not None else None
        self.engine = make_engine(
            self.model,
            config.optimization,
            gang.device,
            lora_plus_ratio=float(ratio or 1),
            plain_kernels=parts_left_plain(os.environ),
        )
        attention = check_model(
            self.engine,
            data.train,
            pad=data.pad,
            packing=data.capacity is not None,
            kernels=kernels(
                config.optimization.attention,
                ModelAbilities.of(data.structure.model),
                DeviceAbilities.of(gang.device),
                config.optimization.precision,
                packing=data.capacity is not None,
            ),
        )
        if state is not None:
            # The ranks of a node share the folder, which must stay until the last of them has read it.
            gang.run_on_all_ranks(partial(load_state, self.engine, fetched, updates=state.updates))
        shutil.rmtree(fetched, ignore_errors=True)
        self.saver = Saver(gang, root, start, plan.folder, config.storage, config.evaluation.best_by)
        batches = MicroBatcher(
            data.train,
            rank=gang.rank,
            world_size=gang.world_size,
            pad=data.pad,
            capacity=data.capacity,
            seed=config.optimization.seed,
            mixture=data.mixture,
        )

        def set_phase(phase: Phase) -> None:
            status.phase = phase.value
            if progress is not None:
                progress.phase(phase)

        scorer = Scorer(
            self.engine,
            gang,
            batches,
            config.evaluation,
            grading,
            batch_size=config.optimization.micro_batch_size,
            context=data.summary.model_context,
            phase=set_phase,
        )
        self.comparison = ModelComparison(plan, gang, root, data, scorer, start.run, progress, grading)
        history = read_steps_before(root, start) if gang.is_first else []
        replayed = gang.run_on_rank_0(
            lambda: replay_decisions(config.evaluation, history).model_dump(mode="json"), until_stop=True
        )
        self.loop = TrainingLoop(
            plan,
            gang,
            self.engine,
            data,
            batches=batches,
            saver=self.saver,
            scorer=scorer,
            validation=validation_set(plan, data),
            progress=progress,
            status=status,
            start=start,
            replayed=ReplayedDecisions.model_validate(replayed),
            state=state,
        )
        if progress is not None:
            taken = None
            if data.mixture is not None:
                taken = partial(data.mixture.taken, global_batch_size=config.optimization.global_batch_size)
            progress.begin(run=start.run, total_steps=self.loop.total_steps, history=history, taken=taken)
            progress.attention(attention.kernel)
            log_line(self.engine.kernels.description)
            progress.adapted(data.summary.adapted_share)
            progress.started_from(data.summary.origin)
            progress.notice(*start.notices, *data.summary.notices, *attention.notices)
            progress.saved(None, self.saver.committed, self.saver.best)
            log_line(self.loop.description(start))
        set_phase(Phase.TRAINING)

    def _rehearse_adapter(self) -> None:
        options = export_options(self._plan, self._data.structure, self._data.stop_ids)
        rehearse_adapter(self.model, options, self._plan.folder / "rehearsal")

    def close(self) -> None:
        """Free the memory of the model and the engine, so that the next run can load them again."""
        self.saver.free_memory()
        self.engine.close()
        del self.engine, self.model, self.loop, self.comparison
