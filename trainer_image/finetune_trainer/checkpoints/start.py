"""The beginning of a run in the bucket: choose what to resume from, take the run number, bring back the past.

Rank 0 does this for all, at each start of the gang (`start_run`) and at each rollback (`restart_run`); what comes out
is JSON, because it is shared at the rendezvous store.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from finetune_core.contract import CheckpointRecord, ContractModel, Identity
from finetune_core.layout import checkpoint_folder
from finetune_trainer.model.digest import Ground
from finetune_trainer.pod.errors import NewerRun, OutsideFailure
from finetune_trainer.storage.checkpoint_folders import (
    TRAINER_FILE,
    TrainerState,
    check_readable,
    committed,
    fetch_folder,
    inventory,
    uncommitted,
)
from finetune_trainer.storage.commit import Damaged
from finetune_trainer.storage.lineage import (
    CheckpointId,
    ParentRecord,
    Rollback,
    RunRecord,
    claim_run_number,
    lineage,
    read_records,
)
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.step_log import StepRow, read_history

log = logging.getLogger(__name__)

MOST_TRIES = 20


class Start(ContractModel):
    """How a run begins."""

    run: int
    parent: ParentRecord | None = None
    ancestors: list[CheckpointRecord] = []
    """The committed checkpoints that this run continues, oldest first."""
    others: list[CheckpointRecord] = []
    """Committed checkpoints on branches that were left, and damaged ones."""
    notices: list[str] = []
    ground: Ground = Ground()
    rollbacks: list[Rollback] = []
    """Returns to earlier checkpoints that hold for this run too."""


class Choice(ContractModel):
    """What is resumed from, and what was passed over."""

    parent: ParentRecord | None = None
    damaged: dict[str, str] = {}
    """What is wrong, by the folder of each checkpoint that was passed over."""
    notices: list[str] = []


def start_run(root: RunRoot, identity: Identity, target: Path) -> Start:
    """Take the next run number and fetch the checkpoint that it resumes from into ``target``.

    A former run that is still alive may commit until the number is taken; then the choice is made again.
    """
    taken: set[int] = set()
    for _ in range(MOST_TRIES):
        records = read_records(root)
        known = {run: record for run, record in records.items() if run not in taken}
        candidates = lineage(known, committed(root))
        choice = _choose(root, candidates, target)
        run = max(records, default=0) + 1
        # The newest run's, whichever checkpoint is resumed from: its own may be lost, what it had learned is not.
        rollbacks = known[max(known)].rollbacks if known else []
        if not claim_run_number(root, run, _record(identity, choice, rollbacks)):
            continue
        taken.add(run)
        if lineage(known, committed(root)) == candidates:
            _abort_stale_uploads(root)
            return _describe(root, run, choice, rollbacks)
    raise OutsideFailure(f"no run number could be taken in {MOST_TRIES} tries: other writers are active")


def restart_run(root: RunRoot, identity: Identity, run: int, rollback: Rollback, target: Path) -> Start:
    """Take the number after ``run``, which ends with ``rollback``, and fetch the checkpoint that it goes back to.

    Where that one is damaged an older one of the lineage serves, at last the base model. Raises NewerRun where another
    start of the job was faster.
    """
    records = read_records(root)
    candidates = [item for item in lineage(records, committed(root)) if item.step <= rollback.step]
    choice = _choose(root, candidates, target)
    returned = choice.parent.step if choice.parent else 0
    rollbacks = [*records[run].rollbacks, rollback.model_copy(update={"step": returned})]
    if max(records) != run or not claim_run_number(root, run + 1, _record(identity, choice, rollbacks)):
        raise NewerRun(f"another run of this job has started, so run {run} ended")
    return _describe(root, run + 1, choice, rollbacks)


def _abort_stale_uploads(root: RunRoot) -> None:
    """Free what cut-off uploads of former runs still hold in the store; not being allowed to is no failure."""
    try:
        aborted = root.abort_multipart_uploads()
    except OutsideFailure as failure:
        log.warning("stale multipart uploads can't be aborted: %s", failure)
        return
    if aborted:
        log.info("aborted %d stale multipart uploads, among them %s", len(aborted), aborted[0])


def _record(identity: Identity, choice: Choice, rollbacks: Sequence[Rollback]) -> RunRecord:
    return RunRecord(
        attempt=identity.attempt,
        pod_uid=identity.pod_uid,
        parent=choice.parent,
        rate_factor=math.prod(rollback.rate_factor for rollback in rollbacks),
        rollbacks=list(rollbacks),
    )


def _choose(root: RunRoot, candidates: Sequence[CheckpointId], target: Path) -> Choice:
    """Return the first candidate whose every byte verifies, fetched into ``target``, and why others were not.

    Folders of the newest candidate's run without COMMIT are told too: an upload was cut off, or COMMIT was deleted.
    """
    damaged: dict[str, str] = {}
    notices: list[str] = []
    chosen: CheckpointId | None = None
    for candidate in candidates:
        shutil.rmtree(target, ignore_errors=True)
        folder = checkpoint_folder(*candidate)
        try:
            fetch_folder(root, folder, target)
            check_readable(target)
        except Damaged as damage:
            damaged[folder] = str(damage)
            notices.append(f"checkpoint of step {candidate.step} (run {candidate.run}) was passed over: {damage}")
            continue
        chosen = candidate
        break
    for item in uncommitted(root):
        if chosen is None or item > chosen:
            notices.append(
                f"checkpoint of step {item.step} (run {item.run}) does not count: {checkpoint_folder(*item)}/COMMIT is"
                " missing, because its upload was cut off or somebody deleted it"
            )
    if chosen is None and candidates:
        notices.append("no checkpoint could be used: training starts from the base model")
    parent = ParentRecord(run=chosen.run, step=chosen.step) if chosen else None
    return Choice(parent=parent, damaged=damaged, notices=notices)


def _describe(root: RunRoot, run: int, choice: Choice, rollbacks: list[Rollback]) -> Start:
    """Return the start with the inventory of the bucket: what the run continues, and the rest."""
    stored = {CheckpointId(record.run, record.step): record for record in inventory(root, choice.damaged)}
    whole = [key for key, record in stored.items() if not record.damaged]
    own = [stored[item] for item in reversed(lineage(read_records(root), whole))]
    rest = [record for record in stored.values() if record not in own]
    return Start(run=run, parent=choice.parent, ancestors=own, others=rest, notices=choice.notices, rollbacks=rollbacks)


def past_steps(root: RunRoot, start: Start) -> list[StepRow]:
    """Return the steps that led to the start, from the bucket's step log."""
    if start.parent is None:
        return []
    return read_history(root, read_records(root), start.parent.run, start.parent.step)


def read_trainer_state(folder: Path) -> TrainerState:
    """Return the training state of a fetched checkpoint that is not a tensor."""
    return TrainerState.model_validate_json((folder / TRAINER_FILE).read_text())
