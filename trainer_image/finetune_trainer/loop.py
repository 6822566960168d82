"""The steps of a run, from where it starts to its last: consume a global batch, update, watch, evaluate, save, tell."""

from __future__ import annotations

import math
import time

import torch

from finetune_core.contract import Phase
from finetune_core.planning.training_plan import total_steps
from finetune_trainer.checkpoints.saver import Saver
from finetune_trainer.checkpoints.start import Start
from finetune_trainer.data.order import batches_per_epoch, cursor
from finetune_trainer.data.shares import Batches, Share
from finetune_trainer.decisions.recovery import left_out, react
from finetune_trainer.decisions.replay import Past
from finetune_trainer.decisions.schedule import rate
from finetune_trainer.decisions.stability import Alarm, non_finite, observe
from finetune_trainer.engine.engine import Engine
from finetune_trainer.evaluation.scorer import Scorer
from finetune_trainer.evaluation.sets import EvaluationSet
from finetune_trainer.material import Data
from finetune_trainer.pod.errors import StopAgreed, Stopped
from finetune_trainer.pod.outcomes import Standing
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.reporting.meter import BACKWARD, DATA, FORWARD, UPDATE, Stopwatch, memory_of, mfu, shape_of
from finetune_trainer.reporting.progress import Progress
from finetune_trainer.storage.checkpoints import TrainerState
from finetune_trainer.storage.steplog import StepRow


class Training:
    """The steps of a run from where it starts to its last."""

    def __init__(
        self,
        plan: WorkerPlan,
        gang: Gang,
        engine: Engine,
        data: Data,
        batches: Batches,
        saver: Saver,
        scorer: Scorer,
        validation: EvaluationSet | None,
        progress: Progress | None,
        standing: Standing,
        start: Start,
        past: Past,
        state: TrainerState | None,
    ) -> None:
        """Stand at ``state``, or before the first step; ``past`` is what led there."""
        self._config = plan.config
        self._gang = gang
        self._engine = engine
        self._batches = batches
        self._saver = saver
        self._scorer = scorer
        self._validation = validation
        self._progress = progress
        self._standing = standing
        self._rollbacks = start.rollbacks
        self._selection = past.selection
        self._watch = past.watch
        self._prepared = data.prepared
        optimization = plan.config.optimization
        self._rows = rows = len(data.train)
        self._per_epoch = batches_per_epoch(rows, optimization.global_batch_size)
        self.total_steps = total_steps(
            rows=rows,
            global_batch_size=optimization.global_batch_size,
            epochs=optimization.epochs,
            max_steps=optimization.max_steps,
        )
        self._trained = sum(math.prod(shape) for shape in engine.names.values())
        self._shape = shape_of(data.bones, self._trained, adapters=plan.config.lora is not None)
        self.step = state.step if state else 0
        self._saved_step = self.step
        self._saving_seconds = 0.0
        standing.step = self.step
        standing.checkpoint = saver.last.uri if saver.last else None
        self._updates = state.updates if state else 0
        self._tokens = state.tokens if state else 0
        self._unscored = state is not None and state.perplexity is None and self._evaluation_due()
        if state is not None and state.data_sha256 != data.prepared.data_sha256 and progress is not None:
            progress.notice(f"the {rows} training rows are not the {state.rows} that the checkpoint was made with")

    def description(self, start: Start) -> str:
        """Return the line that the log begins with."""
        optimization, world = self._config.optimization, self._config.world
        resumed = f", resumed from step {start.parent.step} of run {start.parent.run}" if start.parent else ""
        factor = math.prod(rollback.rate_factor for rollback in start.rollbacks)
        lowered = f", rate times {factor:.3g} after {len(start.rollbacks)} rollbacks" if start.rollbacks else ""
        return (
            f"run {start.run}: {self._config.method.value}, {self._trained:,} trained parameters,"
            f" {optimization.precision}, ZeRO {optimization.zero_stage}, {world.size} x {world.device},"
            f" {torch.get_num_threads()} threads each; {self._rows} rows, {self.total_steps} steps of"
            f" {optimization.global_batch_size} examples{resumed}{lowered}"
        )

    def steps(self) -> bool:
        """Run to the last step with evaluations and checkpoints; return whether patience ended it before.

        Raises Stopped, Diverged and RollBack.
        """
        try:
            if self._unscored:
                # The run was told to stop during this evaluation: what is chosen must not depend on that.
                self._evaluate_and_save(scored_late=True)
            while self.step < self.total_steps and not self._selection.exhausted:
                step = self.step + 1
                if left_out(step, self._rollbacks):
                    self._leave_out(step)
                else:
                    self._react(self._one_step(step))
                self._evaluate_and_save()
            self._drain()
        except StopAgreed:
            self._stop()
        return self._selection.exhausted

    def _one_step(self, step: int) -> Alarm | None:
        """Consume the global batch of ``step`` and apply its update if it is finite; return what is wrong with it.

        Loss and gradient are sums over the supervised tokens of the whole global batch divided by their number,
        whatever the number of ranks and micro-batches: the engine averages over ranks, hence the factor. Raises
        StopAgreed before the update.
        """
        started, started_cpu, watch = time.monotonic(), time.thread_time(), Stopwatch(self._gang.device)
        gang, optimization = self._gang, self._config.optimization
        with watch.part(DATA):
            share = self._batches.step(step, optimization)
        nll = torch.zeros((), dtype=torch.float64, device=gang.device)
        positions = 0
        tensors = self._batches.tensors(share, step=step)
        for index in range(1, len(share.own) + 1):
            gang.check_stop(failed=self._saver.failed)
            with watch.part(DATA):
                micro = next(tensors).to(gang.device)
            with watch.part(FORWARD):
                loss = self._engine.loss(micro)
            nll += loss.detach()
            positions += micro.input_ids.numel()
            with watch.part(BACKWARD):
                factor = gang.world_size / max(1, share.tokens)
                self._engine.backward(loss * factor, last=index == len(share.own))
        total_nll, padded = gang.total([float(nll), positions])
        loss_value, norm = total_nll / max(1, share.tokens), self._engine.gradient_norm()
        learning_rate = rate(step, self.total_steps, optimization, self._rollbacks)
        alarm = non_finite(step, loss_value, norm)
        with watch.part(UPDATE):
            if alarm is None:
                self._engine.step(learning_rate)
            else:
                self._engine.discard()
        self._updates += alarm is None
        if alarm is None and self._config.stability.on_exploding_loss is not None:
            self._watch, alarm = observe(self._watch, step, loss_value, norm)
        self._finished(
            StepRow(
                step=step,
                epoch=step / self._per_epoch,
                loss=loss_value if math.isfinite(loss_value) else None,
                learning_rate=learning_rate,
                gradient_norm=norm if math.isfinite(norm) else None,
                applied=math.isfinite(loss_value) and math.isfinite(norm),
                tokens=share.tokens,
                padded_tokens=int(padded),
                seconds=time.monotonic() - started,
                cpu_seconds=time.thread_time() - started_cpu,
                data_seconds=watch.seconds(DATA),
                forward_seconds=watch.seconds(FORWARD),
                backward_seconds=watch.seconds(BACKWARD),
                update_seconds=watch.seconds(UPDATE),
            ),
            share,
        )
        return alarm

    def _leave_out(self, step: int) -> None:
        """Consume the global batch of ``step`` without computing it: it is of the data that a rollback skips."""
        self._gang.check_stop(failed=self._saver.failed)
        optimization = self._config.optimization
        learning_rate = rate(step, self.total_steps, optimization, self._rollbacks)
        row = StepRow(
            step=step, epoch=step / self._per_epoch, learning_rate=learning_rate, applied=False, tokens=0, seconds=0.0
        )
        self._finished(row, None)

    def _finished(self, row: StepRow, share: Share | None) -> None:
        """Note a step that was consumed, with what the whole of it took."""
        self.step = self._standing.step = row.step
        self._tokens += row.tokens
        if self._progress is None:
            return
        lengths = [self._batches.examples.lengths[index] for index in share.rows] if share else []
        device = self._gang.device
        memory, peak = memory_of(device)
        self._progress.finished_step(
            row.model_copy(
                update={
                    "real_tokens": sum(lengths),
                    "mfu": mfu(self._shape, lengths, row.seconds, devices=self._gang.world_size, device=device),
                    "memory_bytes": memory,
                    "memory_peak_bytes": peak,
                    "checkpoint_seconds": self._saving_seconds,
                }
            ),
            updates=self._updates,
        )
        self._saving_seconds = 0.0

    def _react(self, alarm: Alarm | None) -> None:
        """Record what went wrong and do as the job says; every rank sees the same numbers, so all do the same."""
        if alarm is None:
            return
        incident, order = react(alarm, self._config, self._rollbacks)
        if self._progress is not None:
            self._progress.incident(incident)
        if order is not None:
            if self._progress is not None:
                self._progress.log_step()
            # What comes next must not depend on how far an upload was.
            self._drain()
            raise order

    def _evaluation_due(self) -> bool:
        if self._validation is None or self.step == 0:
            return False
        every = self._config.evaluation.every_steps or self._per_epoch
        return self.step % every == 0 or self.step == self.total_steps

    def _evaluate_and_save(self, *, scored_late: bool = False) -> None:
        """Evaluate and save where it is due, and tell."""
        perplexity = task_score = None
        if self._validation is not None and self._evaluation_due():
            perplexity, task_score = self._evaluate(self._validation)
            self._selection = self._selection.after(self.step, perplexity=perplexity, task_score=task_score)
            if self._progress is not None:
                self._progress.scored(self.step, perplexity, task_score)
        if self._progress is not None and not scored_late:
            self._progress.log_step()
        improved = perplexity is not None and self._selection.best_step == self.step
        periodic = self._saver.due(self.step) and not scored_late
        must = improved or self.step == self.total_steps or self._selection.exhausted
        if periodic or must:
            self._save(perplexity, task_score, must=must)
        self._tell_checkpoints()

    def _evaluate(self, validation: EvaluationSet) -> tuple[float, float | None]:
        """Return validation perplexity and, where checkpoints are chosen by it, the task's score."""
        perplexity, task_score = self._scorer.perplexity(validation.examples), None
        if self._config.evaluation.best_by == "TaskScore":
            task_score = self._scorer.task_scores(validation).main
        self._phase(Phase.TRAINING)
        return perplexity, task_score

    def _save(self, perplexity: float | None, task_score: float | None, *, must: bool) -> None:
        """Take a snapshot; it is committed in the background. ``must``: a later one does not make up for it."""
        self._phase(Phase.SAVING)
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
            data_sha256=self._prepared.data_sha256,
            perplexity=perplexity,
            task_score=task_score,
            best_perplexity=self._selection.best if self._selection.best_by == "Perplexity" else None,
        )
        rows = self._progress.pending_rows() if self._progress is not None else []
        self._saver.save(self._engine, state, rows, must=must)
        self._saved_step = self.step
        self._saving_seconds += time.monotonic() - began
        self._phase(Phase.TRAINING)

    def _tell_checkpoints(self) -> None:
        """Note what was committed since the last time, and how old what would be resumed from is."""
        for record in self._saver.take_committed():
            self._standing.checkpoint = record.uri
            if self._progress is not None:
                self._progress.saved(record, self._saver.committed, self._saver.best)
        if self._progress is not None:
            self._progress.checkpointing(age=self._saver.age_seconds, problem=self._saver.problem)

    def _drain(self) -> None:
        """Wait until all that was saved is committed."""
        self._phase(Phase.SAVING)
        self._saver.drain(self._gang.told)
        self._tell_checkpoints()

    def _stop(self) -> None:
        """Save what is not saved yet, then leave; all ranks come here together. Always raises Stopped, or what ended
        the background thread of a rank."""
        self._saver.raise_failure()
        if self.step > self._saved_step:
            self._save(None, None, must=True)
        self._drain()
        where = f"the checkpoint of step {self.step} is committed" if self.step else "no step was finished yet"
        raise Stopped(f"told to stop: {where}")

    def _phase(self, phase: Phase) -> None:
        self._standing.phase = phase.value
        if self._progress is not None:
            self._progress.phase(phase)
