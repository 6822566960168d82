"""The optimizer steps of a run: train on a global batch, update, watch the loss, evaluate, save a checkpoint, report.

`train.py` makes one `TrainingLoop` for each run. `TrainingLoop.run` shows the order of optimizer steps, evaluations and
checkpoints, and `TrainingLoop._train_step` shows the parts of one optimizer step.
"""

from __future__ import annotations

import math
import time

import torch

from finetune_core.contract import Phase
from finetune_core.planning.training_plan import total_steps
from finetune_trainer.checkpoints.resume import RunStart
from finetune_trainer.checkpoints.saver import Saver
from finetune_trainer.data.ahead import MicroBatchesAhead
from finetune_trainer.data.micro_batches import MicroBatcher, MicroBatchPlan
from finetune_trainer.data.order import batches_per_epoch, cursor
from finetune_trainer.decisions.recovery import is_skipped, plan_recovery
from finetune_trainer.decisions.replay import ReplayedDecisions
from finetune_trainer.decisions.schedule import learning_rate_at
from finetune_trainer.decisions.stability import Alarm, non_finite_alarm, observe
from finetune_trainer.engine.fragment_snapshot import STATE_BYTES
from finetune_trainer.engine.host_copy import HostCopy
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.evaluation.scorer import Scorer
from finetune_trainer.evaluation.sets import EvaluationSet
from finetune_trainer.pod.errors import StopAgreed, Stopped
from finetune_trainer.pod.outcomes import WorkerStatus
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.preparation import TrainingData
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.ranks.return_guard import copy_seconds, least_seconds
from finetune_trainer.reporting.meter import BACKWARD, DATA, FORWARD, UPDATE, Stopwatch, memory_usage, mfu, model_shape
from finetune_trainer.reporting.progress import Progress
from finetune_trainer.storage.checkpoint_folders import TrainerState
from finetune_trainer.storage.step_log import StepRow


class TrainingLoop:
    """The optimizer steps of one run, from the step after its parent checkpoint to the last step of the job."""

    def __init__(
        self,
        plan: WorkerPlan,
        gang: Gang,
        engine: TrainingEngine,
        data: TrainingData,
        *,
        batches: MicroBatcher,
        saver: Saver,
        scorer: Scorer,
        validation: EvaluationSet | None,
        progress: Progress | None,
        status: WorkerStatus,
        start: RunStart,
        replayed: ReplayedDecisions,
        state: TrainerState | None,
    ) -> None:
        """Begin after the step of ``state``, or at step 1 where ``state`` is None.

        ``state`` is the training state that the parent checkpoint stores. ``replayed`` holds the best evaluation and
        the state of the stability monitor after the steps before this run.
        """
        self._config = plan.config
        self._gang = gang
        self._engine = engine
        self._batches = batches
        self._saver = saver
        self._scorer = scorer
        self._validation = validation
        self._progress = progress
        self._status = status
        self._rollbacks = start.rollbacks
        self._selection = replayed.selection
        self._monitor = replayed.monitor
        self._data_sha256 = data.summary.data_sha256
        self._validation_sha256 = data.summary.evaluation_sha256.get("validation")
        optimization = plan.config.optimization
        self._rows = rows = len(data.train)
        self._steps_per_epoch = batches_per_epoch(rows, optimization.global_batch_size)
        self.total_steps = total_steps(
            rows=rows,
            global_batch_size=optimization.global_batch_size,
            epochs=optimization.epochs,
            max_steps=optimization.max_steps,
        )
        self.step = state.step if state else 0
        trained = (step for step in range(self.step + 1, self.total_steps + 1) if not is_skipped(step, self._rollbacks))
        self._ahead = MicroBatchesAhead(batches, trained, optimization, gang.device)
        self._stopwatch = Stopwatch(gang.device)
        self._trained_parameters = sum(math.prod(shape) for shape in engine.parameter_shapes.values())
        self._model_shape = model_shape(data.structure, self._trained_parameters, adapters=plan.config.lora is not None)
        self._saved_step = self.step
        self._saving_seconds = 0.0
        status.step = self.step
        status.checkpoint = saver.last.uri if saver.last else None
        self._updates = state.updates if state else 0
        self._tokens = state.tokens if state else 0
        # If SIGTERM came after the evaluation of a step, the step log has the scores, although the checkpoint that was
        # saved after SIGTERM has none. Such an evaluation is not made again, because it would count twice against
        # `evaluation.patience`.
        evaluated = state is not None and (state.perplexity is not None or replayed.evaluated_step == state.step)
        self._evaluation_missing = state is not None and not evaluated and self._evaluation_due()
        if state is not None and state.data_sha256 != self._data_sha256 and progress is not None:
            progress.notice(f"the {rows} training examples are not the {state.rows} that the checkpoint was made with")
        if state is not None and state.validation_sha256 != self._validation_sha256 and progress is not None:
            progress.notice(
                "the validation rows are not those that the checkpoint was made with, so the scores of earlier"
                " evaluations can't be compared with later ones"
            )

    def description(self, start: RunStart) -> str:
        """Return the line that describes the run in the log before its first step, with the method, the numbers of
        parameters, ranks, examples and steps, and the checkpoint that the run resumes from."""
        optimization, world = self._config.optimization, self._config.world
        resumed = f", resumed from step {start.parent.step} of run {start.parent.run}" if start.parent else ""
        engine = f"ZeRO {optimization.zero_stage}" if optimization.zero_stage is not None else "no DeepSpeed"
        factor = math.prod(rollback.rate_factor for rollback in start.rollbacks)
        lowered = f", rate times {factor:.3g} after {len(start.rollbacks)} rollbacks" if start.rollbacks else ""
        return (
            f"run {start.run}: {self._config.method.value}, {self._trained_parameters:,} trained parameters,"
            f" {optimization.precision}, {engine}, {world.size} x {world.device},"
            f" {torch.get_num_threads()} threads each; {self._rows} examples, {self.total_steps} steps of"
            f" {optimization.global_batch_size}{resumed}{lowered}"
        )

    def run(self) -> bool:
        """Train to the last step, or until `evaluation.patience` is exhausted, with evaluations and checkpoints. Return
        whether the training ended before its last step.

        Raises Stopped after SIGTERM, RollbackRequired or Diverged after an alarm, and the error of the upload thread
        where saving failed.
        """
        try:
            if self._evaluation_missing:
                # The parent checkpoint was saved after SIGTERM, without scores. So the evaluation is made now.
                # Otherwise the choice of the best checkpoint would depend on when SIGTERM came.
                self._evaluate_and_save(catching_up=True)
            while self.step < self.total_steps and not self._selection.exhausted:
                step = self.step + 1
                if is_skipped(step, self._rollbacks):
                    self._skip_step(step)
                else:
                    self._recover_from(self._train_step(step))
                self._evaluate_and_save()
            self._wait_for_commits()
        except StopAgreed:
            self._save_and_stop()
        return self.step < self.total_steps

    def _train_step(self, step: int) -> Alarm | None:
        """Train on the global batch of ``step``. Return an alarm where the loss or the gradient is suspicious.

        The update is applied only where loss and gradient are finite. Raises StopAgreed after SIGTERM, or where the
        upload thread of a rank failed, always before the update.
        """
        started, started_cpu = time.monotonic(), time.thread_time()
        with self._stopwatch.part(DATA):
            batch_plan = self._ahead.plan(step)
        own_nll, own_positions = self._accumulate_gradient(step, batch_plan)
        # Both copies are issued before the first of them is waited for, so the CPU waits for the GPU once.
        copied_nll = HostCopy(own_nll)
        norm = self._engine.gradient_norm()
        nll, positions = self._gang.sum_over_ranks([copied_nll.read(), own_positions])
        loss = nll / max(1, batch_plan.tokens)
        learning_rate = learning_rate_at(step, self.total_steps, self._config.optimization, self._rollbacks)
        alarm = non_finite_alarm(step, loss, norm)
        with self._stopwatch.part(UPDATE):
            if alarm is None:
                self._engine.step(learning_rate)
            else:
                self._engine.discard_gradient()
        self._updates += alarm is None
        if alarm is None and self._config.stability.on_exploding_loss is not None:
            self._monitor, alarm = observe(self._monitor, step, loss, norm)
        spent = self._stopwatch.take()
        self._record_step(
            StepRow(
                step=step,
                epoch=step / self._steps_per_epoch,
                loss=loss if math.isfinite(loss) else None,
                learning_rate=learning_rate,
                gradient_norm=norm if math.isfinite(norm) else None,
                applied=math.isfinite(loss) and math.isfinite(norm),
                tokens=batch_plan.tokens,
                padded_tokens=int(positions),
                seconds=time.monotonic() - started,
                cpu_seconds=time.thread_time() - started_cpu,
                data_seconds=spent[DATA],
                forward_seconds=spent[FORWARD],
                backward_seconds=spent[BACKWARD],
                update_seconds=spent[UPDATE],
            ),
            batch_plan,
        )
        return alarm

    def _accumulate_gradient(self, step: int, batch_plan: MicroBatchPlan) -> tuple[torch.Tensor, int]:
        """Run forward and backward over this rank's micro-batches of the global batch, and make the first micro-batch
        of the next step. The CPU waits for no result of the GPU.

        Return two sums over this rank's micro-batches: the negative log-likelihood (nats) of the supervised tokens, in
        fp64 on the device, and the number of computed positions, padding included. The accumulated gradient is that of
        the mean negative log-likelihood of all supervised tokens of the global batch, whatever the number of ranks and
        micro-batches. Raises StopAgreed as `_train_step` does.
        """
        gang = self._gang
        nll = torch.zeros((), dtype=torch.float64, device=gang.device)
        positions = 0
        # DeepSpeed averages gradients over the ranks. The factor `world_size` turns the average into a sum.
        factor = gang.world_size / max(1, batch_plan.tokens)
        for index in range(1, len(batch_plan.micro_batches) + 1):
            gang.check_stop(failed=self._saver.failed)
            with self._stopwatch.part(DATA):
                micro_batch = self._ahead.take(step)
            with self._stopwatch.part(FORWARD):
                loss = self._engine.loss(micro_batch, factor=factor)
            nll += loss.detach()
            positions += micro_batch.input_ids.numel()
            with self._stopwatch.part(BACKWARD):
                self._engine.backward(loss * factor, last=index == len(batch_plan.micro_batches))
            with self._stopwatch.part(DATA):
                # A GPU still computes what was issued before.
                self._ahead.make_next()
        return nll, positions

    def _skip_step(self, step: int) -> None:
        """Count ``step`` as done without training on its global batch, because a rollback excludes the batch's rows."""
        self._gang.check_stop(failed=self._saver.failed)
        learning_rate = learning_rate_at(step, self.total_steps, self._config.optimization, self._rollbacks)
        epoch = step / self._steps_per_epoch
        row = StepRow(step=step, epoch=epoch, learning_rate=learning_rate, applied=False, tokens=0, seconds=0.0)
        self._record_step(row, None)

    def _record_step(self, row: StepRow, batch_plan: MicroBatchPlan | None) -> None:
        """Advance to the step of ``row``. Rank 0 also adds the number of tokens without padding, memory, utilisation
        and the time for saving to the row, and reports the row.

        ``batch_plan`` is None for a skipped step.
        """
        self.step = self._status.step = row.step
        self._tokens += row.tokens
        if self._progress is None:
            return
        lengths = [self._batches.examples.lengths[index] for index in batch_plan.rows] if batch_plan else []
        device = self._gang.device
        memory, peak = memory_usage(device)
        self._progress.finished_step(
            row.model_copy(
                update={
                    "real_tokens": sum(lengths),
                    "mfu": mfu(self._model_shape, lengths, row.seconds, devices=self._gang.world_size, device=device),
                    "memory_bytes": memory,
                    "memory_peak_bytes": peak,
                    "checkpoint_seconds": self._saving_seconds,
                }
            ),
            updates=self._updates,
        )
        self._saving_seconds = 0.0

    def _recover_from(self, alarm: Alarm | None) -> None:
        """Record ``alarm`` and act as `spec.stability` says. Every rank has the same loss and gradient norm, so all
        ranks act alike.

        Raises RollbackRequired or Diverged where recording the alarm is not enough.
        """
        if alarm is None:
            return
        incident, error = plan_recovery(alarm, self._config, self._rollbacks)
        if self._progress is not None:
            self._progress.incident(incident)
        if error is not None:
            if self._progress is not None:
                self._progress.log_step()
            # Wait for all uploads, so that the checkpoint to which a rollback returns does not depend on how far an
            # upload was.
            self._wait_for_commits()
            raise error

    def _evaluation_due(self) -> bool:
        if self._validation is None or self.step == 0:
            return False
        every = self._config.evaluation.every_steps or self._steps_per_epoch
        return self.step % every == 0 or self.step == self.total_steps

    def _evaluate_and_save(self, *, catching_up: bool = False) -> None:
        """Evaluate the model if an evaluation is due after the current step, save a checkpoint if one is needed, and
        report both. A checkpoint is needed at the job's interval, after an evaluation that is the best so far, and at
        the end.

        With ``catching_up`` an earlier run made the step and its checkpoint, and only the evaluation is missing. A
        checkpoint that is due after the step is then saved again with the scores, because a checkpoint without scores
        can't become the best one.
        """
        perplexity = task_score = None
        if self._validation is not None and self._evaluation_due():
            perplexity, task_score = self._evaluate(self._validation)
            self._selection = self._selection.after(self.step, perplexity=perplexity, task_score=task_score)
            if self._progress is not None:
                self._progress.scored(self.step, perplexity, task_score)
        if self._progress is not None and not catching_up:
            self._progress.log_step()
        improved = perplexity is not None and self._selection.best_step == self.step
        if self._saver.due(self.step) or improved or self.step == self.total_steps or self._selection.exhausted:
            self._save(perplexity, task_score, best=improved)
        self._report_checkpoints()

    def _evaluate(self, validation: EvaluationSet) -> tuple[float, float | None]:
        """Return the validation perplexity, and the task score where `evaluation.bestBy` is TaskScore."""
        perplexity, task_score = self._scorer.perplexity(validation.examples), None
        if self._config.evaluation.best_by == "TaskScore":
            task_score = self._scorer.task_scores(validation).main
        self._set_phase(Phase.TRAINING)
        return perplexity, task_score

    def _save(self, perplexity: float | None, task_score: float | None, *, best: bool = False) -> None:
        """Copy the training state into memory. A background thread uploads and commits the copy as a checkpoint.

        ``best`` says that the model has the best evaluation so far. Where too many copies wait for their upload, and
        after SIGTERM, the new copy replaces waiting copies, but never the copy of the best model.
        """
        self._set_phase(Phase.SAVING)
        began = time.monotonic()
        optimization = self._config.optimization
        position = cursor(self.step + 1, rows=self._rows, global_batch_size=optimization.global_batch_size)
        state = TrainerState(
            step=self.step,
            epoch=position.epoch,
            batch_in_epoch=position.batch,
            seed=optimization.seed,
            updates=self._updates,
            tokens=self._tokens,
            world_size=self._gang.world_size,
            zero_stage=optimization.zero_stage,
            rows=self._rows,
            data_sha256=self._data_sha256,
            validation_sha256=self._validation_sha256,
            perplexity=perplexity,
            task_score=task_score,
            best_perplexity=self._selection.best if self._selection.best_by == "Perplexity" else None,
        )
        rows = self._progress.pending_rows() if self._progress is not None else []
        self._saver.save(self._engine, state, rows, best=best)
        self._saved_step = self.step
        self._saving_seconds += time.monotonic() - began
        self._set_phase(Phase.TRAINING)

    def _report_checkpoints(self) -> None:
        """Report the checkpoints that were committed since the last call, the age of the newest checkpoint, any problem
        with saving, and a failure to delete old checkpoints."""
        for record in self._saver.take_committed():
            self._status.checkpoint = record.uri
            if self._progress is not None:
                self._progress.saved(record, self._saver.committed, self._saver.best)
        if self._progress is not None:
            self._progress.checkpointing(age=self._saver.age_seconds, problem=self._saver.problem)
            self._progress.notice(*self._saver.take_notices())

    def _wait_for_commits(self) -> None:
        """Wait until every checkpoint that was saved is committed."""
        self._set_phase(Phase.SAVING)
        self._saver.wait_for_commits(self._gang.stop_requested)
        self._report_checkpoints()

    def _save_and_stop(self) -> None:
        """Save a checkpoint of the newest finished step unless it is saved already, wait until it is committed, and
        raise Stopped. All ranks call this together.

        Where the upload thread of a rank failed, the error of that thread is raised on all ranks instead.
        """
        self._saver.raise_failure()
        if self.step > self._saved_step:
            least = least_seconds(self._config.world.device)
            seconds = copy_seconds(STATE_BYTES * self._trained_parameters, least=least)
            with self._gang.within(seconds, "the copy of the training state"):
                self._save(None, None)
        self._wait_for_commits()
        where = f"the checkpoint of step {self.step} is committed" if self.step else "no step was finished yet"
        raise Stopped(f"told to stop: {where}")

    def _set_phase(self, phase: Phase) -> None:
        self._status.phase = phase.value
        if self._progress is not None:
            self._progress.phase(phase)
