"""Finds, among the steps of all runs of a job, those that led to its model, and counts what was computed in vain. Pure.

A job may have several runs: each start of its ranks and each rollback takes the next run number, and a later run
computes steps of an earlier one again. `compared_run.py` calls `training_of`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finetune_cli.compare.stored_files import Step, StoredRollback, StoredRun


@dataclass(frozen=True, slots=True)
class Training:
    """The training of a job over all its runs."""

    steps: tuple[Step, ...]
    """The steps that led to the newest weights, ordered by step, each of them once."""
    rollbacks: tuple[StoredRollback, ...]
    """The rollbacks that apply to the newest run, oldest first."""
    restarts: int
    """How often the ranks started again, rollbacks not counted."""
    discarded: tuple[Step, ...]
    """Steps that were computed, but did not lead to the newest weights: a rollback or a restart left them behind."""

    @property
    def not_finite(self) -> tuple[Step, ...]:
        """All steps, discarded ones too, whose loss or gradient was not finite."""
        return tuple(step for step in (*self.steps, *self.discarded) if not step.is_finite)

    @property
    def gaps(self) -> int:
        """Number of steps between the first and the last one that are in no step log."""
        return self.steps[-1].step - self.steps[0].step + 1 - len(self.steps) if self.steps else 0


def training_of(records: Mapping[int, StoredRun], steps: Mapping[int, Iterable[Step]], newest: int) -> Training:
    """Return the training that ended with run number ``newest``. ``steps`` are the steps of each run.

    The steps of the newest run count, then those of its parent up to the checkpoint that it resumed from, and so on, as
    in the trainer's `step_log.read_history`. Where two runs have the same step, the later run counts.
    """
    taken: dict[int, Step] = {}
    run: int | None = newest
    last: int | None = None
    while run is not None and run in records:
        for step in steps.get(run, ()):
            if last is None or step.step <= last:
                taken.setdefault(step.step, step)
        parent = records[run].parent
        if parent is None or parent.run >= run:
            break
        run, last = parent.run, parent.step
    kept = {(step.run, step.step) for step in taken.values()}
    lost = [step for rows in steps.values() for step in rows if (step.run, step.step) not in kept and step.is_trained]
    rollbacks = records[newest].rollbacks if newest in records else ()
    restarts = max(0, len(records) - 1 - len(rollbacks))
    return Training(tuple(taken[key] for key in sorted(taken)), rollbacks, restarts, tuple(lost))
