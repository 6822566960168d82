"""The beginning of a run in the bucket: choose what to resume from, take the run number, bring back the past.

Rank 0 does this for all, at each start of the gang (`start_run`) and at each rollback (`roll_back`); what comes out
is JSON, because it is shared at the rendezvous store.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from uuid import uuid4

from finetune_core.contract import CheckpointRecord, ContractModel, Identity
from finetune_core.layout import checkpoint_folder
from finetune_trainer.errors import NewerRun, OutsideFailure
from finetune_trainer.storage.checkpoints import (
    TRAINER_FILE,
    Damaged,
    TrainerState,
    check_readable,
    committed,
    fetch_folder,
    inventory,
    uncommitted,
)
from finetune_trainer.storage.lineage import (
    CheckpointId,
    Course,
    ParentRecord,
    RunRecord,
    StepRange,
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
    course: Course = Course()
    ancestors: list[CheckpointRecord] = []
    """The committed checkpoints that this run continues, oldest first."""
    others: list[CheckpointRecord] = []
    """Committed checkpoints on branches that were left, and damaged ones."""
    notices: list[str] = []


class Choice(ContractModel):
    """What is resumed from, and what was passed over."""

    chosen: ParentRecord | None = None
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
        # A rollback holds for all that come after it, also when it was cut off before its first checkpoint.
        course = known[max(known)].course if known else Course()
        run = max(records, default=0) + 1
        if not take_run(root, run, _record(identity, choice, course)):
            continue
        taken.add(run)
        if lineage(known, committed(root)) == candidates:
            return _describe(root, run, course, choice)
    raise OutsideFailure(f"no run number could be taken in {MOST_TRIES} tries: other writers are active")


def roll_back(
    root: RunRoot, identity: Identity, run: int, target: Path, *, before: int, factor: float, skip: Iterable[StepRange]
) -> Start:
    """Leave ``run`` for a new one that grows from its newest whole checkpoint of a step up to ``before``.

    The new run's rate is ``factor`` times that of ``run``, and ``skip`` joins what is left out. What ``run``
    committed beyond stays where it is and is no longer resumed from, also after a crash right after this call.
    Raises NewerRun where another start of the job took a number meanwhile.
    """
    records = read_records(root)
    candidates = [item for item in lineage(records, committed(root)) if item.step <= before]
    choice = _choose(root, candidates, target)
    old = records[run].course
    course = Course(rate_factor=old.rate_factor * factor, skipped=[*old.skipped, *skip], rollbacks=old.rollbacks + 1)
    if max(records) > run or not take_run(root, run + 1, _record(identity, choice, course)):
        raise NewerRun(f"a run after {run} of this job has started, so run {run} stopped writing to the bucket")
    return _describe(root, run + 1, course, choice)


def _record(identity: Identity, choice: Choice, course: Course) -> RunRecord:
    return RunRecord(
        attempt=identity.attempt, pod_uid=identity.pod_uid, parent=choice.chosen, course=course, token=uuid4().hex
    )


def _choose(root: RunRoot, candidates: Sequence[CheckpointId], target: Path) -> Choice:
    """Return the first candidate whose every byte verifies, fetched into ``target``, and why others were not.

    Folders without COMMIT above the chosen one are told too: an upload was cut off, or COMMIT was deleted.
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
                f"checkpoint of step {item.step} (run {item.run}) does not count: its COMMIT is missing"
                f" ({checkpoint_folder(*item)}), because its upload was cut off or somebody deleted it"
            )
    if chosen is None and candidates:
        notices.append("no checkpoint could be used: training starts from the base model")
    parent = ParentRecord(run=chosen.run, step=chosen.step) if chosen else None
    return Choice(chosen=parent, damaged=damaged, notices=notices)


def _describe(root: RunRoot, run: int, course: Course, choice: Choice) -> Start:
    """Return the start with the inventory of the bucket: what the run continues, and the rest."""
    stored = {CheckpointId(record.run, record.step): record for record in inventory(root, choice.damaged)}
    whole = {key: record for key, record in stored.items() if not record.damaged}
    own = [stored[item] for item in reversed(lineage(read_records(root), whole)) if item in stored]
    rest = [record for record in stored.values() if record not in own]
    return Start(run=run, parent=choice.chosen, course=course, ancestors=own, others=rest, notices=choice.notices)


def past_steps(root: RunRoot, start: Start) -> list[StepRow]:
    """Return the steps that led to the start, from the bucket's step log."""
    if start.parent is None:
        return []
    return read_history(root, read_records(root), start.parent.run, start.parent.step)


def read_trainer_state(folder: Path) -> TrainerState:
    """Return the training state of a fetched checkpoint that is not a tensor."""
    return TrainerState.model_validate_json((folder / TRAINER_FILE).read_text())
