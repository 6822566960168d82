"""The beginning of a run in the bucket: choose what to resume from, take the run number, bring back the past.

Rank 0 does this for all; what comes out is JSON, because it is shared at the rendezvous store.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from finetune_core.contract import CheckpointRecord, ContractModel, Identity
from finetune_core.layout import checkpoint_folder
from finetune_trainer.errors import NewerRun, OutsideFailure
from finetune_trainer.storage.checkpoints import (
    TRAINER_FILE,
    Damaged,
    TrainerState,
    committed,
    fetch_folder,
    inventory,
)
from finetune_trainer.storage.lineage import (
    CheckpointId,
    ParentRecord,
    Rollback,
    RunRecord,
    lineage,
    read_records,
    take_run,
)
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.steplog import StepRow, read_history

MOST_TRIES = 20


class Start(ContractModel):
    """How a run begins."""

    run: int
    parent: ParentRecord | None = None
    ancestors: list[CheckpointRecord] = []
    """The committed checkpoints that this run continues, oldest first."""
    others: list[CheckpointRecord] = []
    """Committed checkpoints on branches that were left."""
    notices: list[str] = []
    rollbacks: list[Rollback] = []
    """Returns to earlier checkpoints that hold for this run too."""


def _choose(root: RunRoot, candidates: Sequence[CheckpointId], target: Path) -> tuple[CheckpointId | None, list[str]]:
    """Return the first candidate whose every byte verifies, fetched into ``target``, and why others were not."""
    notices = []
    for candidate in candidates:
        try:
            fetch_folder(root, checkpoint_folder(*candidate), target)
        except Damaged as damage:
            notices.append(f"checkpoint of step {candidate.step} (run {candidate.run}) was passed over: {damage}")
            continue
        return candidate, notices
    if candidates:
        notices.append("no checkpoint could be used: training starts from the base model")
    return None, notices


def start_run(root: RunRoot, identity: Identity, target: Path) -> Start:
    """Take the next run number and fetch the checkpoint that it resumes from into ``target``.

    A former run that is still alive may commit until the number is taken; then the choice is made again.
    """
    taken: set[int] = set()
    for _ in range(MOST_TRIES):
        records = read_records(root)
        known = {run: record for run, record in records.items() if run not in taken}
        candidates = lineage(known, committed(root))
        chosen, notices = _choose(root, candidates, target)
        parent = ParentRecord(run=chosen.run, step=chosen.step) if chosen else None
        run = max(records, default=0) + 1
        # The newest run's, whichever checkpoint is resumed from: its own may be lost, what it had learned is not.
        rollbacks = known[max(known)].rollbacks if known else []
        if not take_run(root, run, _record(identity, parent, rollbacks)):
            continue
        taken.add(run)
        if lineage(known, committed(root)) == candidates:
            return _describe(root, run, parent, rollbacks, notices)
    raise OutsideFailure(f"no run number could be taken in {MOST_TRIES} tries: other writers are active")


def restart_run(root: RunRoot, identity: Identity, run: int, rollback: Rollback, target: Path) -> Start:
    """Take the number after ``run``, which ends with ``rollback``, and fetch the checkpoint that it goes back to.

    Where that one is damaged an older one of the lineage serves, at last the base model. Raises NewerRun where another
    start of the job was faster.
    """
    records = read_records(root)
    candidates = [item for item in lineage(records, committed(root)) if item.step <= rollback.step]
    chosen, notices = _choose(root, candidates, target)
    parent = ParentRecord(run=chosen.run, step=chosen.step) if chosen else None
    rollbacks = [*records[run].rollbacks, rollback.model_copy(update={"step": chosen.step if chosen else 0})]
    if max(records) != run or not take_run(root, run + 1, _record(identity, parent, rollbacks)):
        raise NewerRun(f"another run of this job has started, so run {run} ended")
    return _describe(root, run + 1, parent, rollbacks, notices)


def _record(identity: Identity, parent: ParentRecord | None, rollbacks: Sequence[Rollback]) -> RunRecord:
    return RunRecord(
        attempt=identity.attempt,
        pod_uid=identity.pod_uid,
        parent=parent,
        rate_factor=math.prod(rollback.rate_factor for rollback in rollbacks),
        rollbacks=list(rollbacks),
    )


def _describe(
    root: RunRoot, run: int, parent: ParentRecord | None, rollbacks: list[Rollback], notices: list[str]
) -> Start:
    records = read_records(root)
    stored = {CheckpointId(record.run, record.step): record for record in inventory(root)}
    own = [stored[item] for item in reversed(lineage(records, stored)) if item in stored]
    rest = [record for record in stored.values() if record not in own]
    return Start(run=run, parent=parent, ancestors=own, others=rest, notices=notices, rollbacks=rollbacks)


def past_steps(root: RunRoot, start: Start) -> list[StepRow]:
    """Return the steps that led to the start, from the bucket's step log."""
    if start.parent is None:
        return []
    return read_history(root, read_records(root), start.parent.run, start.parent.step)


def read_trainer_state(folder: Path) -> TrainerState:
    """Return the training state of a fetched checkpoint that is not a tensor."""
    return TrainerState.model_validate_json((folder / TRAINER_FILE).read_text())
