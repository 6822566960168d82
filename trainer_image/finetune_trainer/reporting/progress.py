"""What rank 0 knows about the run: `Progress` writes a log line for each step, sends reports to the operator, and
collects the rows of the step log.

`worker.py`, `train.py`, `loop.py`, `finish.py` and `evaluation/` call `Progress` on rank 0. Other ranks have none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from finetune_core.contract import (
    AdapterOrigin,
    CheckpointName,
    CheckpointRecord,
    CurvePoint,
    EvaluationRecord,
    Incident,
    Phase,
    Report,
    Result,
    ScoreRecord,
)
from finetune_core.tasks import main_score_text
from finetune_trainer.reporting.curve import downsample
from finetune_trainer.reporting.reporter import Reporter
from finetune_trainer.reporting.throughput import Throughput, Tokens
from finetune_trainer.storage.step_log import StepRow

MAX_NOTICES = 8
NOTICE_LENGTH = 512
MAX_CHECKPOINTS = 100
MAX_INCIDENTS = 20


def log_line(text: str) -> None:
    """Write a line to the pod's log, without buffering."""
    print(text, flush=True)


def step_line(row: StepRow, total_steps: int, tokens_per_second: float | None) -> str:
    """Return the log line of a step, for example `step 20/100 loss 1.2340 rate 0.001 norm 0.52 485 tok/s`."""
    # A step that a rollback excluded has no tokens.
    loss = f"loss {row.loss:.4f}" if row.loss is not None else "loss not finite" if row.tokens else "left out"
    score = f" ppl {row.perplexity:.4g}" if row.perplexity is not None else ""
    norm = f" norm {row.gradient_norm:.3g}" if row.gradient_norm is not None else ""
    speed = f" {tokens_per_second:.0f} tok/s" if tokens_per_second is not None else ""
    return f"step {row.step}/{total_steps} {loss}{score} rate {row.learning_rate:.3g}{norm}{speed}"


def score_text(record: ScoreRecord, task: str | None) -> str:
    """Return a model's scores as text, for example `perplexity 12.3, 90.0% of 50 answers right`. ``task`` is the name
    of the task, or of the entry point of an own grader; None without a task."""
    text = f"perplexity {record.perplexity:.4g}"
    if record.task_score is None:
        return text
    return f"{text}, {main_score_text(task, record.task_score, answers=record.graded)}"


class Progress:
    """Collects the state that reports to the operator are made of. Only rank 0 has a `Progress`."""

    def __init__(
        self, *, pod_uid: str, ranks: int, reporter: Reporter | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin in phase Loading. ``reporter`` is None where the job sends no reports. ``clock`` returns monotonic
        seconds."""
        self._pod_uid = pod_uid
        self._ranks = ranks
        self._reporter = reporter
        self._clock = clock
        self._speed = Throughput()
        self._phase = Phase.LOADING
        self._run = self._step = self._total_steps = self._resumed_from = 0
        self._epoch = 0.0
        self._metrics: dict[str, float] = {}
        self._taken: Callable[[int], Sequence[int]] = lambda step: ()
        self._points: list[CurvePoint] = []
        self._checkpoints: list[CheckpointRecord] = []
        self._checkpoint_age: int | None = None
        self._checkpoint_problem = ""
        self._adapted_share: float | None = None
        self._adapter: AdapterOrigin | None = None
        self._notices: list[str] = []
        self._pending: list[StepRow] = []
        self._newest: StepRow | None = None
        self._mfu: float | None = None
        self._attention = ""
        self._best: CheckpointName | None = None
        self._evaluation: EvaluationRecord | None = None
        self._incidents: list[Incident] = []
        if reporter is not None:
            reporter.start()
        self._publish(urgent=True)

    def begin(
        self,
        *,
        run: int,
        total_steps: int,
        history: Sequence[StepRow],
        taken: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        """Note what is known before the first step of a run: the run's number, ``total_steps``, and ``history``, the
        rows of the step log for all steps that led to the run's first step. If the training examples are a mix of
        several sources, ``taken`` returns how many examples the steps up to a given one have taken from each source.

        The metrics, MFU and curve of the run before are dropped, because a rollback may have undone its steps.
        """
        self._run, self._total_steps = run, total_steps
        self._taken = taken or (lambda step: ())
        self._step, self._epoch = 0, 0.0
        self._pending, self._newest = [], history[-1] if history else None
        self._points = [CurvePoint(step=row.step, loss=row.loss, perplexity=row.perplexity) for row in history]
        self._metrics = self._counts(0)
        self._mfu = next((row.mfu for row in reversed(history) if row.applied), None)
        if history:
            self._show(history[-1])
            scored = next((row for row in reversed(history) if row.perplexity is not None), None)
            values = {"perplexity": scored.perplexity, "taskScore": scored.task_score} if scored is not None else {}
            self._metrics |= {name: value for name, value in values.items() if value is not None}
        self._resumed_from = self._step
        self._speed = Throughput()
        self._publish(urgent=True)

    def notice(self, *texts: str) -> None:
        """Add sentences for people to the log and to the reports. A notice is not a failure."""
        for text in texts:
            log_line(f"notice: {text}")
        self._notices = [*self._notices, *(text[:NOTICE_LENGTH] for text in texts)][-MAX_NOTICES:]

    def attention(self, kernel: str) -> None:
        """Note the kernel that computes attention, for example `SDPA`."""
        log_line(f"attention: {kernel}")
        self._attention = kernel

    def adapted(self, share: float | None) -> None:
        """Note the share of the weights in the model's layers that LoRA adapters can change; None without adapters."""
        self._adapted_share = share

    def started_from(self, adapter: AdapterOrigin | None) -> None:
        """Note the adapter that the training started from; None without one."""
        self._adapter = adapter

    def phase(self, phase: Phase) -> None:
        """Note the run's current phase, and report it at once."""
        self._phase = phase
        self._publish(urgent=True)

    def finished_step(self, row: StepRow, *, updates: int) -> None:
        """Note a finished step. ``updates`` is the number of updates applied so far. If an evaluation is due after the
        step, the caller passes its scores to `scored` later."""
        self._speed.step(self._clock(), Tokens(row.tokens, row.real_tokens, row.padded_tokens), row.seconds)
        self._pending.append(row)
        self._newest = row
        self._points.append(CurvePoint(step=row.step, loss=row.loss))
        self._show(row)
        self._metrics["skippedUpdates"] = row.step - updates
        self._publish()

    def scored(self, step: int, perplexity: float, task_score: float | None) -> None:
        """Note the validation scores after ``step``, which is the newest step."""
        values = {"perplexity": perplexity} | ({"taskScore": task_score} if task_score is not None else {})
        self._metrics |= values
        scores = {"perplexity": perplexity, "task_score": task_score}
        if self._newest is not None and self._newest.step == step:
            self._newest = self._newest.model_copy(update=scores)
            # The row becomes pending again even if an earlier run has written it to the step log. The row in the step
            # log then has no scores, because SIGTERM stopped the earlier run during the evaluation.
            self._pending = [*(row for row in self._pending if row.step != step), self._newest]
        if self._points:
            self._points[-1] = self._points[-1].model_copy(update={"perplexity": perplexity})

    def evaluated(self, evaluation: EvaluationRecord, task: str | None) -> None:
        """Note the known scores of the base model and of the tuned model. ``task`` is the name of the task, or of the
        entry point of an own grader; None without a task."""
        self._evaluation = evaluation
        for name, record in (("base", evaluation.base), ("tuned", evaluation.tuned)):
            if record is not None:
                examples = f"{evaluation.examples} {evaluation.rows.lower()} examples"
                log_line(f"{name} model on {examples}: {score_text(record, task)}")
        self._publish(urgent=True)

    def incident(self, incident: Incident) -> None:
        """Note an incident that the stability monitor found."""
        self._incidents = [*self._incidents, incident][-MAX_INCIDENTS:]
        self.notice(incident.message)
        self._publish(urgent=True)

    def log_step(self) -> None:
        """Write the log line of the newest step."""
        if self._pending:
            log_line(step_line(self._pending[-1], self._total_steps, self._speed.per_second().real))

    def pending_rows(self) -> list[StepRow]:
        """Return the rows of the steps that were finished or scored since the last call of this function, for the next
        segment of the step log in the bucket."""
        rows, self._pending = self._pending, []
        return rows

    def saved(
        self,
        record: CheckpointRecord | None,
        checkpoints: Sequence[CheckpointRecord],
        best: CheckpointRecord | None,
    ) -> None:
        """Note the committed ``checkpoints``. ``record`` is the checkpoint that was just committed, or None if there is
        none. ``best`` is the best checkpoint, or None if none was scored."""
        self._checkpoints = list(checkpoints)[-MAX_CHECKPOINTS:]
        self._best = CheckpointName(run=best.run, step=best.step) if best is not None else None
        if record is not None:
            log_line(f"checkpoint of step {record.step} committed: {record.bytes / 1e6:.1f} MB at {record.uri}")
        self._publish(urgent=True)

    def checkpointing(self, *, age: float, problem: str) -> None:
        """Note ``age`` (see `Saver.age_seconds`), and ``problem``, a sentence about what is wrong with saving, which is
        empty where nothing is wrong. Write a log line where ``problem`` has changed before its first colon. What
        follows the colon may change with every try."""
        if problem.partition(":")[0] != self._checkpoint_problem.partition(":")[0]:
            log_line(f"checkpoints: {problem}" if problem else "checkpoints are committed again")
        self._checkpoint_age, self._checkpoint_problem = round(age), problem

    def end(self, result: Result) -> None:
        """Send the final report, with the result."""
        self._phase = Phase.ENDED
        if self._reporter is not None:
            self._reporter.close(self._report(result))

    def _show(self, row: StepRow) -> None:
        self._step, self._epoch = row.step, row.epoch
        self._mfu = row.mfu if row.applied else self._mfu
        known = {
            "loss": row.loss,
            "learningRate": row.learning_rate,
            "gradientNorm": row.gradient_norm,
            "memoryBytes": row.memory_bytes or None,
            "memoryPeakBytes": row.memory_peak_bytes or None,
        }
        if row.applied:
            known |= {
                "dataSeconds": row.data_seconds,
                "forwardSeconds": row.forward_seconds,
                "backwardSeconds": row.backward_seconds,
                "updateSeconds": row.update_seconds,
                "stepSeconds": row.seconds,
                "checkpointSeconds": row.checkpoint_seconds,
            }
        self._metrics |= {name: value for name, value in known.items() if value is not None}
        self._metrics |= self._counts(row.step)

    def _counts(self, step: int) -> dict[str, float]:
        """Return how many examples the steps up to ``step`` have taken from each source of a mix."""
        return {f"mix{source}Examples": count for source, count in enumerate(self._taken(step))}

    def _publish(self, *, urgent: bool = False) -> None:
        if self._reporter is not None:
            self._reporter.update(self._report(None), urgent=urgent)

    def _report(self, result: Result | None) -> Report:
        speed = self._speed.per_second()
        rates = {"supervisedTokensPerSecond": speed.supervised, "paddedTokensPerSecond": speed.padded}
        metrics = self._metrics | {name: value for name, value in rates.items() if value is not None}
        return Report(
            run=self._run,
            pod_uid=self._pod_uid,
            phase=self._phase,
            ranks=self._ranks,
            step=self._step,
            total_steps=self._total_steps,
            epoch=self._epoch,
            eta_seconds=self._speed.eta_seconds(self._total_steps - self._step),
            tokens_per_second=speed.real,
            mfu=self._mfu,
            attention=self._attention,
            metrics={key: value for key, value in metrics.items() if math.isfinite(value)},
            resumed_from_step=self._resumed_from,
            history=downsample(self._points),
            checkpoints=self._checkpoints,
            checkpoint_age_seconds=self._checkpoint_age,
            checkpoint_problem=self._checkpoint_problem[:NOTICE_LENGTH],
            best=self._best,
            adapted_share=self._adapted_share,
            adapter=self._adapter,
            notices=self._notices,
            evaluation=self._evaluation,
            incidents=self._incidents,
            result=result,
        )
