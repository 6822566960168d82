"""What rank 0 knows about the run, told three ways: a line a step in the log, reports, rows of the step log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from finetune_core.contract import CheckpointRecord, CurvePoint, Phase, Report, Result
from finetune_trainer.reporting import Reporter, Speed, thin
from finetune_trainer.storage.steplog import StepRow

MOST_NOTICES = 8
NOTICE_LENGTH = 512
MOST_CHECKPOINTS = 100


def say(text: str) -> None:
    """Write a line to the pod's log at once."""
    print(text, flush=True)


def step_line(row: StepRow, total_steps: int, tokens_per_second: float | None) -> str:
    """Return the log line of a step: `step 20/100 loss 1.234 rate 1e-03 norm 0.52 485 tok/s`."""
    loss = f"loss {row.loss:.4f}" if row.loss is not None else "left out" if not row.applied else "loss not finite"
    score = f" ppl {row.perplexity:.4g}" if row.perplexity is not None else ""
    norm = f" norm {row.gradient_norm:.3g}" if row.gradient_norm is not None else ""
    speed = f" {tokens_per_second:.0f} tok/s" if tokens_per_second is not None else ""
    return f"step {row.step}/{total_steps} {loss}{score} rate {row.learning_rate:.3g}{norm}{speed}"


class Progress:
    """The state that reports are made of; it exists on rank 0 only."""

    def __init__(
        self, *, pod_uid: str, ranks: int, reporter: Reporter | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin to report, in phase Loading."""
        self._pod_uid = pod_uid
        self._ranks = ranks
        self._reporter = reporter
        self._clock = clock
        self._speed = Speed(clock())
        self._phase = Phase.LOADING
        self._run = self._step = self._total_steps = self._resumed_from = 0
        self._epoch = 0.0
        self._metrics: dict[str, float] = {}
        self._points: list[CurvePoint] = []
        self._checkpoints: list[CheckpointRecord] = []
        self._checkpoint_age: int | None = None
        self._checkpoint_problem = ""
        self._notices: list[str] = []
        self._pending: list[StepRow] = []
        if reporter is not None:
            reporter.start()
        self._publish(urgent=True)

    def begin(self, *, run: int, total_steps: int, history: Sequence[StepRow]) -> None:
        """Note what is known before the first step."""
        self._run, self._total_steps = run, total_steps
        self._points = [CurvePoint(step=row.step, loss=row.loss, perplexity=row.perplexity) for row in history]
        if history:
            self._show(history[-1])
            scored = [row.perplexity for row in history if row.perplexity is not None]
            self._metrics |= {"perplexity": scored[-1]} if scored else {}
        self._resumed_from = self._step
        self._speed = Speed(self._clock())
        self._publish(urgent=True)

    def notice(self, *texts: str) -> None:
        """Tell a person something that is no failure."""
        for text in texts:
            say(f"notice: {text}")
        self._notices = [*self._notices, *(text[:NOTICE_LENGTH] for text in texts)][-MOST_NOTICES:]

    def phase(self, phase: Phase) -> None:
        """Note what the run is doing now."""
        self._phase = phase
        self._publish(urgent=True)

    def finished_step(self, row: StepRow) -> None:
        """Note a finished step; its evaluation, if one is due, comes with `scored`."""
        self._speed.step(self._clock(), row.tokens)
        self._pending.append(row)
        self._points.append(CurvePoint(step=row.step, loss=row.loss))
        self._show(row)
        self._publish()

    def scored(self, value: float) -> None:
        """Note the validation perplexity after the newest step."""
        self._metrics["perplexity"] = value
        if self._pending:
            self._pending[-1] = self._pending[-1].model_copy(update={"perplexity": value})
        if self._points:
            self._points[-1] = self._points[-1].model_copy(update={"perplexity": value})

    def log_step(self) -> None:
        """Write the newest step's line."""
        if self._pending:
            say(step_line(self._pending[-1], self._total_steps, self._speed.tokens_per_second()))

    def pending_rows(self) -> list[StepRow]:
        """Return the steps since the last call: the next segment of the step log."""
        rows, self._pending = self._pending, []
        return rows

    def saved(self, record: CheckpointRecord | None, checkpoints: Sequence[CheckpointRecord]) -> None:
        """Note the committed checkpoints; ``record`` is the new one."""
        self._checkpoints = list(checkpoints)[-MOST_CHECKPOINTS:]
        if record is not None:
            say(f"checkpoint of step {record.step} committed: {record.bytes / 1e6:.1f} MB at {record.uri}")
        self._publish(urgent=True)

    def checkpointing(self, *, age: float, problem: str, stall: float) -> None:
        """Note the age of what would be resumed from, why it grows, and how long training waited for the newest."""
        self._checkpoint_age, self._checkpoint_problem = round(age), problem
        self._metrics["checkpointStallSeconds"] = stall

    def end(self, result: Result) -> None:
        """Send the final report."""
        self._phase = Phase.ENDED
        if self._reporter is not None:
            self._reporter.close(self._report(result))

    def _show(self, row: StepRow) -> None:
        self._step, self._epoch = row.step, row.epoch
        known = {"loss": row.loss, "learningRate": row.learning_rate, "gradientNorm": row.gradient_norm}
        self._metrics |= {name: value for name, value in known.items() if value is not None}

    def _publish(self, *, urgent: bool = False) -> None:
        if self._reporter is not None:
            self._reporter.update(self._report(None), urgent=urgent)

    def _report(self, result: Result | None) -> Report:
        return Report(
            run=self._run,
            pod_uid=self._pod_uid,
            phase=self._phase,
            ranks=self._ranks,
            step=self._step,
            total_steps=self._total_steps,
            epoch=self._epoch,
            eta_seconds=self._speed.eta_seconds(self._total_steps - self._step),
            tokens_per_second=self._speed.tokens_per_second(),
            metrics={key: value for key, value in self._metrics.items() if math.isfinite(value)},
            resumed_from_step=self._resumed_from,
            history=thin(self._points),
            checkpoints=self._checkpoints,
            checkpoint_age_seconds=self._checkpoint_age,
            checkpoint_problem=self._checkpoint_problem[:NOTICE_LENGTH],
            notices=self._notices,
            result=result,
        )
