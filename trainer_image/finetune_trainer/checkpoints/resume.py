"""The start of a run: choose the checkpoint to resume from, fetch it, and take the next run number in the bucket.

Rank 0 does this for all ranks. `train.py` calls `start_run` at the start of an attempt and `start_run_after_rollback`
after a rollback. Both return a `RunStart`, which is sent to the other ranks as JSON.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from finetune_core.contract import CheckpointRecord, ContractModel, Identity
from finetune_core.contract.same_training import TrainingRecord
from finetune_core.layout import TRAINER_FILE, checkpoint_folder
from finetune_trainer.model.digest import BaseDigests
from finetune_trainer.pod.errors import Damaged, NewerRun, OutsideFailure
from finetune_trainer.storage.checkpoint_folders import (
    TrainerState,
    check_readable,
    committed,
    fetch_folder,
    inventory,
    uncommitted,
)
from finetune_trainer.storage.lineage import (
    CheckpointId,
    ParentRecord,
    Rollback,
    RunRecord,
    check_adapter,
    check_owner,
    claim_run_number,
    lineage,
    read_records,
)
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.step_log import StepRow, read_history

log = logging.getLogger(__name__)

MAX_TRIES = 20


class RunStart(ContractModel):
    """How a run starts: its run number, the checkpoint that it resumes from, and which other checkpoints the bucket
    holds."""

    run: int
    """Number of this run, from 1. Every start of the job's ranks takes the next number, and so does every rollback."""
    parent: ParentRecord | None = None
    """The checkpoint that the run resumes from. None where training starts from the base model."""
    ancestors: list[CheckpointRecord] = []
    """The committed checkpoints that led to the weights this run starts with, oldest first. The last of them is
    `parent`. The list is empty where `parent` is None."""
    other_checkpoints: list[CheckpointRecord] = []
    """All other committed checkpoints in the bucket, for example damaged checkpoints and those that a rollback left
    behind."""
    notices: list[str] = []
    """Sentences for the log and the reports, for example why a checkpoint was not used."""
    base_digests: BaseDigests = BaseDigests()
    rollbacks: list[Rollback] = []
    """All rollbacks of the job so far, which all apply to this run. Each rollback lowers the learning rate from some
    step on, and excludes the data of some steps."""


class ResumeChoice(ContractModel):
    """The checkpoint to resume from, and the checkpoints that could not be used."""

    parent: ParentRecord | None = None
    damaged: dict[str, str] = {}
    """What is wrong with each checkpoint that could not be used, by the checkpoint's folder, for example
    `checkpoints/000001-000000120`."""
    notices: list[str] = []


def start_run(
    root: RunRoot,
    identity: Identity,
    target: Path,
    training: TrainingRecord | None = None,
    adapter_sha256: str | None = None,
) -> RunStart:
    """Take the next run number, and fetch the checkpoint to resume from into the folder ``target``. The run record
    keeps ``training``, so that a later job can tell whether its own training would be the same, and
    ``adapter_sha256``, the digest of the adapter that the job starts from.

    An earlier run that is still alive may commit one more checkpoint before the number is taken. The checkpoint to
    resume from is then chosen again, and the new run takes one more number. Raises OutsideFailure where other writers
    interfere with each of MAX_TRIES tries, and UserError where another job has taken over the folder of runs, or where
    the newest run started from another adapter.
    """
    taken: set[int] = set()
    for _ in range(MAX_TRIES):
        records = read_records(root)
        check_owner(records, identity.uid)
        check_adapter(records, adapter_sha256)
        known = {run: record for run, record in records.items() if run not in taken}
        candidates = lineage(known, committed(root))
        choice = _choose_checkpoint(root, candidates, target)
        run = max(records, default=0) + 1
        # The record of the newest run lists all rollbacks of the job. These rollbacks also apply where this run resumes
        # from an older run's checkpoint, for example because the checkpoints of the newest run are lost.
        rollbacks = known[max(known)].rollbacks if known else []
        if not claim_run_number(root, run, _record(identity, choice, rollbacks, training, adapter_sha256)):
            continue
        taken.add(run)
        if lineage(known, committed(root)) == candidates:
            _abort_stale_uploads(root)
            return _run_start(root, run, choice, rollbacks)
    raise OutsideFailure(f"no run number could be taken in {MAX_TRIES} tries: other writers are active")


def start_run_after_rollback(root: RunRoot, identity: Identity, run: int, rollback: Rollback, target: Path) -> RunStart:
    """Start the next run after ``run``, which ended with ``rollback``: take the run number ``run`` + 1, and fetch the
    newest checkpoint up to ``rollback.step`` into the folder ``target``.

    Where that checkpoint is damaged, the next older checkpoint that led to it is used. Where no checkpoint is left,
    training starts from the base model. Raises NewerRun where another start of the job has taken a run number since
    ``run`` began.
    """
    records = read_records(root)
    candidates = [item for item in lineage(records, committed(root)) if item.step <= rollback.step]
    choice = _choose_checkpoint(root, candidates, target)
    returned = choice.parent.step if choice.parent else 0
    rollbacks = [*records[run].rollbacks, rollback.model_copy(update={"step": returned})]
    record = _record(identity, choice, rollbacks, records[run].training, records[run].adapter_sha256)
    if max(records) != run or not claim_run_number(root, run + 1, record):
        raise NewerRun(f"another run of this job has started, so run {run} ended")
    return _run_start(root, run + 1, choice, rollbacks)


def _abort_stale_uploads(root: RunRoot) -> None:
    """Abort the multipart uploads that earlier runs left unfinished, because otherwise the store would keep the
    uploaded parts. Where the store refuses or can't be reached, only log a warning."""
    try:
        aborted = root.abort_multipart_uploads()
    except OutsideFailure as failure:
        log.warning("stale multipart uploads can't be aborted: %s", failure)
        return
    if aborted:
        log.info("aborted %d stale multipart uploads, among them %s", len(aborted), aborted[0])


def _record(
    identity: Identity,
    choice: ResumeChoice,
    rollbacks: Sequence[Rollback],
    training: TrainingRecord | None,
    adapter_sha256: str | None,
) -> RunRecord:
    return RunRecord(
        attempt=identity.attempt,
        pod_uid=identity.pod_uid,
        uid=identity.uid,
        training=training,
        adapter_sha256=adapter_sha256,
        parent=choice.parent,
        rate_factor=math.prod(rollback.rate_factor for rollback in rollbacks),
        rollbacks=list(rollbacks),
    )


def _choose_checkpoint(root: RunRoot, candidates: Sequence[CheckpointId], target: Path) -> ResumeChoice:
    """Download ``candidates`` into the folder ``target``, one after another, until all files of a checkpoint match
    their sha256 and can be read. Return this checkpoint, if there is one, and what is wrong with the checkpoints that
    were tried before it.

    The notices also name the checkpoint folders without COMMIT: those that are newer than the chosen checkpoint, or all
    of them if no checkpoint is chosen. Such a folder remains where an upload was cut off, or where somebody deleted
    COMMIT.
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
    return ResumeChoice(parent=parent, damaged=damaged, notices=notices)


def _run_start(root: RunRoot, run: int, choice: ResumeChoice, rollbacks: list[Rollback]) -> RunStart:
    """Return the `RunStart` of run number ``run``. It lists all committed checkpoints of the job: the chosen checkpoint
    and the checkpoints that led to it in `ancestors`, and all others in `other_checkpoints`."""
    stored = {CheckpointId(record.run, record.step): record for record in inventory(root, choice.damaged)}
    undamaged = [key for key, record in stored.items() if not record.damaged]
    own = [stored[item] for item in reversed(lineage(read_records(root), undamaged))]
    rest = [record for record in stored.values() if record not in own]
    return RunStart(
        run=run,
        parent=choice.parent,
        ancestors=own,
        other_checkpoints=rest,
        notices=choice.notices,
        rollbacks=rollbacks,
    )


def read_steps_before(root: RunRoot, start: RunStart) -> list[StepRow]:
    """Return the rows of all steps that led to the parent checkpoint of ``start``, read from the step log in the
    bucket, oldest first."""
    if start.parent is None:
        return []
    return read_history(root, read_records(root), start.parent.run, start.parent.step)


def read_trainer_state(folder: Path) -> TrainerState:
    """Return the training state of the downloaded checkpoint in ``folder`` without its tensors: step, seed and other
    values."""
    return TrainerState.model_validate_json((folder / TRAINER_FILE).read_text())
