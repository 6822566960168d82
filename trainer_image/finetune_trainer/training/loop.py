"""The steps of a run, from where it starts to its last: consume a global batch, update, evaluate, save, tell."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch

from finetune_core.contract import Phase
from finetune_core.planning.choices import total_steps
from finetune_trainer.data.order import batches_per_epoch, cursor
from finetune_trainer.errors import Diverged, StopAgreed, Stopped
from finetune_trainer.outcomes import Standing
from finetune_trainer.plan import WorkerPlan
from finetune_trainer.storage.checkpoints import TrainerState
from finetune_trainer.storage.steplog import StepRow
from finetune_trainer.training.batches import Batches
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.gang import Gang
from finetune_trainer.training.loss import perplexity, summed_loss
from finetune_trainer.training.material import Data
from finetune_trainer.training.progress import Progress
from finetune_trainer.training.saving import Saver
from finetune_trainer.training.schedule import rate
from finetune_trainer.training.start import Start


class Training:
    """The steps of a run from where it starts to its last."""

    def __init__(
        self,
        plan: WorkerPlan,
        gang: Gang,
        engine: Engine,
        data: Data,
        saver: Saver,
        progress: Progress | None,
        standing: Standing,
        state: TrainerState | None,
    ) -> None:
        """Stand at ``state``, or before the first step."""
        self._config = plan.config
        self._gang = gang
        self._engine = engine
        self._data = data
        self._saver = saver
        self._progress = progress
        self._standing = standing
        optimization = plan.config.optimization
        rows = len(data.train)
        self._rows = rows
        self._batches = Batches(
            data.train,
            rank=gang.rank,
            world_size=gang.world_size,
            pad=data.pad,
            capacity=data.capacity,
            seed=optimization.seed,
        )
        self._validation = replace(self._batches, examples=data.validation)
        self._per_epoch = batches_per_epoch(rows, optimization.global_batch_size)
        self.total_steps = total_steps(
            rows=rows,
            global_batch_size=optimization.global_batch_size,
            epochs=optimization.epochs,
            max_steps=optimization.max_steps,
        )
        self.step = state.step if state else 0
        self._saved_step = self.step
        standing.step = self.step
        standing.checkpoint = saver.last.uri if saver.last else None
        self._updates = state.updates if state else 0
        self._tokens = state.tokens if state else 0
        best = saver.best
        self._best = best.perplexity if best is not None and best.perplexity is not None else math.inf
        if state is not None and state.rows != rows and progress is not None:
            progress.notice(f"the training data has {rows} rows where the checkpoint was made with {state.rows}")

    def description(self, start: Start) -> str:
        """Return the line that the log begins with."""
        optimization, world = self._config.optimization, self._config.world
        shapes = self._engine.names.values()
        trained = sum(math.prod(shape) for shape in shapes)
        resumed = f", resumed from step {start.parent.step} of run {start.parent.run}" if start.parent else ""
        return (
            f"run {start.run}: {self._config.method.value}, {trained:,} trained parameters, {optimization.precision},"
            f" ZeRO {optimization.zero_stage}, {world.size} x {world.device},"
            f" {torch.get_num_threads()} threads each; {self._rows} rows, {self.total_steps} steps of"
            f" {optimization.global_batch_size} examples{resumed}"
        )

    def steps(self) -> None:
        """Run to the last step with evaluations and checkpoints; raises Stopped and Diverged."""
        try:
            while self.step < self.total_steps:
                self._after(self._one_step(self.step + 1))
            self._drain()
        except StopAgreed:
            self._stop()

    def _one_step(self, step: int) -> StepRow:
        """Consume the global batch of ``step`` and apply its update; raises StopAgreed before it is applied.

        Loss and gradient are sums over the supervised tokens of the whole global batch divided by their number,
        whatever the number of ranks and micro-batches: the engine averages over ranks, hence the factor.
        """
        started = time.monotonic()
        optimization, gang = self._config.optimization, self._gang
        share = self._batches.step(step, optimization)
        tokens = share.tokens
        nll = torch.zeros((), dtype=torch.float64, device=gang.device)
        for index, micro in enumerate(self._batches.tensors(share, step=step), start=1):
            gang.check_stop(failed=self._saver.failed)
            loss = summed_loss(self._engine, micro.to(gang.device))
            nll += loss.detach()
            self._engine.backward(loss * (gang.world_size / max(1, tokens)), last=index == len(share.own))
        loss_value = gang.total([float(nll)])[0] / max(1, tokens)
        norm = self._engine.gradient_norm()
        self._check_finite(step, loss_value, norm)
        learning_rate = rate(step, self.total_steps, optimization)
        self._engine.step(learning_rate)
        self.step = self._standing.step = step
        self._updates += 1
        self._tokens += tokens
        return StepRow(
            step=step,
            epoch=step / self._per_epoch,
            loss=loss_value,
            learning_rate=learning_rate,
            gradient_norm=norm,
            tokens=tokens,
            seconds=time.monotonic() - started,
        )

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        """Raise Diverged before the update is applied; every rank sees the same values."""
        what = "loss" if not math.isfinite(loss) else "gradient" if not math.isfinite(norm) else None
        if what is not None:
            raise Diverged(
                f"the {what} of step {step} is not a finite number; lower training.learningRate (it is"
                f" {self._config.optimization.learning_rate:g}) or look at the rows of that step"
            )

    def _after(self, row: StepRow) -> None:
        """Evaluate and save where it is due, and tell."""
        if self._progress is not None:
            self._progress.finished_step(row)
        score = self._evaluate() if self._evaluation_due() else None
        if self._progress is not None:
            if score is not None:
                self._progress.scored(score)
            self._progress.log_step()
        improved = score is not None and score < self._best
        if improved and score is not None:
            self._best = score
        wanted_best = improved and self._config.evaluation.artifact_from == "Best"
        periodic = self._saver.due(self.step)
        must = wanted_best or self.step == self.total_steps
        if periodic or must:
            self._save(score, must=must)
        self._tell_checkpoints()

    def _evaluation_due(self) -> bool:
        if not self._data.validation:
            return False
        every = self._config.evaluation.every_steps or self._per_epoch
        return self.step % every == 0 or self.step == self.total_steps

    def _evaluate(self) -> float:
        self._phase(Phase.EVALUATING)
        value = perplexity(
            self._engine,
            self._gang,
            self._validation,
            batch_size=self._config.optimization.micro_batch_size,
        )
        self._phase(Phase.TRAINING)
        return value

    def _save(self, score: float | None, *, must: bool) -> None:
        """Take a snapshot; it is committed in the background. ``must``: a later one does not make up for it."""
        self._phase(Phase.SAVING)
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
            perplexity=score,
            best_perplexity=self._best if math.isfinite(self._best) else None,
        )
        rows = self._progress.pending_rows() if self._progress is not None else []
        self._saver.save(self._engine, state, rows, must=must)
        self._saved_step = self.step
        self._phase(Phase.TRAINING)

    def _tell_checkpoints(self) -> None:
        """Note what was committed since the last time, and how old what would be resumed from is."""
        for record in self._saver.take_committed():
            self._standing.checkpoint = record.uri
            if self._progress is not None:
                self._progress.saved(record, self._saver.committed)
        if self._progress is not None:
            self._progress.checkpointing(
                age=self._saver.age_seconds, problem=self._saver.problem, stall=self._saver.stall_seconds
            )

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
            self._save(None, must=True)
        self._drain()
        where = f"the checkpoint of step {self.step} is committed" if self.step else "no step was finished yet"
        raise Stopped(f"told to stop: {where}")

    def _phase(self, phase: Phase) -> None:
        self._standing.phase = phase.value
        if self._progress is not None:
            self._progress.phase(phase)
