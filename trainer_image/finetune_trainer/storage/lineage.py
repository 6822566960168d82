"""Run numbers and run records. Each start of a job's ranks, and each rollback, takes the next run number and writes a
run record. The record names the checkpoint from which the run continues. Once a higher number is taken, `check_fence`
fails in earlier runs, which then stop writing.

A new run follows the records from run to parent to find its checkpoint. It does not simply take the checkpoint with the
highest step, because the newest run may not have continued from that checkpoint. After a rollback, training goes on
from an earlier step. A run on a node that was cut off may have written checkpoints that no later run used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pydantic import ConfigDict, ValidationError

from finetune_core.contract import ContractModel
from finetune_core.contract.same_training import TrainingRecord
from finetune_core.errors import UserError
from finetune_core.layout import run_key
from finetune_trainer.pod.errors import Damaged, NewerRun
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.run_store import ListedObject

RECORD_BYTES = 256 * 1024
"""Largest size in bytes of a run record that is read."""


class CheckpointId(NamedTuple):
    """Identifies a checkpoint: the run that wrote it, and the last optimizer step that it includes."""

    run: int
    step: int


class ParentRecord(ContractModel):
    """The checkpoint that a run resumed from."""

    run: int
    step: int


class Rollback(ContractModel):
    """A return to an earlier checkpoint, which changes the learning rate and the data of the runs that follow."""

    step: int
    """Step of the checkpoint that training returned to, or 0 if it returned to the beginning. Before the checkpoint is
    chosen, the field holds the last step whose weights can be trusted. In all steps after this step, the learning rate
    is multiplied by `rate_factor`."""
    rate_factor: float
    skip_from: int
    """First step whose global batch is left out: the step counts as done, but the weights are not updated."""
    skip_to: int
    """Last step whose global batch is left out."""
    reason: str


class RunRecord(ContractModel):
    """Content of `runs/<run>.json`. No two writers write the same pair of `attempt` and `pod_uid`, so a writer that
    finds a stored record can tell whether the record is its own. Unknown fields are ignored, because a later version
    may have written the record of a run that this version resumes."""

    model_config = ConfigDict(extra="ignore")

    version: int = 1
    attempt: int
    pod_uid: str
    uid: str = ""
    """uid of the job. Empty in a record of an older version."""
    training: TrainingRecord | None = None
    """What the run trains. None in a record of an older version."""
    adapter_sha256: str | None = None
    """sha256 of the adapter that the job starts from (`model.adapter`). None without one, and in a record of an older
    version."""
    parent: ParentRecord | None = None
    rate_factor: float = 1.0
    """Product of the rate factors of all `rollbacks`. Only people who read the file use this field.
    """
    rollbacks: list[Rollback] = []
    """All rollbacks that apply to this run, oldest first."""


def lineage(records: Mapping[int, RunRecord], committed: Iterable[CheckpointId]) -> list[CheckpointId]:
    """Return the checkpoints that a new run may resume from, the preferred ones first.

    First come the checkpoints of the newest run, from the newest to the oldest. Then follow the checkpoint that this
    run resumed from and the older checkpoints of that checkpoint's run, and so on.
    """
    by_run: dict[int, list[int]] = {}
    for checkpoint in committed:
        by_run.setdefault(checkpoint.run, []).append(checkpoint.step)
    found: list[CheckpointId] = []
    run, newest_step = max(records, default=0), None
    while run in records:
        steps = sorted(by_run.get(run, []), reverse=True)
        found += [CheckpointId(run, step) for step in steps if newest_step is None or step <= newest_step]
        parent = records[run].parent
        # A parent always has a lower run number. The check of the number ends the loop even if someone has changed a
        # record.
        if parent is None or parent.run >= run:
            break
        run, newest_step = parent.run, parent.step
    return found


def listed_records(root: RunRoot) -> dict[int, ListedObject]:
    """Return the listing entry of each run record below ``root``, by run number in ascending order. So the result has
    one item for each run number that has been taken so far."""
    matches = ((re.fullmatch(r"runs/([0-9]{6,18})\.json", entry.key), entry) for entry in root.list_objects("runs/"))
    found = {int(match[1]): entry for match, entry in matches if match}
    return {run: found[run] for run in sorted(found) if found[run].key == run_key(run)}


def read_records(root: RunRoot, runs: Sequence[int] | None = None) -> dict[int, RunRecord]:
    """Return the records of ``runs``, or of all runs in the folder, by run number in ascending order.

    Raises Damaged where a record is gone, malformed, or longer than `RECORD_BYTES`.
    """
    records = {}
    for run in sorted(listed_records(root) if runs is None else runs):
        data = root.read_at_most(run_key(run), RECORD_BYTES)
        if data is None:
            raise Damaged(f"{run_key(run)} is gone or has more than {RECORD_BYTES} bytes")
        try:
            records[run] = RunRecord.model_validate_json(data)
        except ValidationError as error:
            raise Damaged(f"{run_key(run)} is no run record") from error
    return records


def check_owner(records: Mapping[int, RunRecord], uid: str) -> None:
    """Raise UserError where the job with the uid ``uid`` has a run in the folder of runs, but the newest run there is
    of another job.

    Two jobs may use the same folder where two clusters use one bucket. Without this check each job would end the runs
    of the other job again and again. The job that began last keeps the folder.
    """
    newest = records[max(records)] if records else None
    if newest is not None and newest.uid not in ("", uid) and any(record.uid == uid for record in records.values()):
        raise UserError(
            "storage.runId",
            f"the job with uid {newest.uid} has taken this run over (run {max(records)}), so this job must not continue"
            " it; create this job anew to take the run back, or with another storage.runId to train beside it",
        )


def check_adapter(records: Mapping[int, RunRecord], sha256: str | None) -> None:
    """Raise UserError where the newest run of the folder did not start from the adapter with the digest ``sha256``;
    None means that no adapter is given. All attempts of a job must start from the same adapter, because what the
    earlier runs have trained belongs to that adapter."""
    newest = records[max(records)] if records else None
    before = newest.adapter_sha256 if newest is not None else None
    if newest is None or before == sha256:
        return
    if before is None:
        raise UserError("model.adapter", f"must be absent: run {max(records)} of this folder began without an adapter")
    raise UserError(
        "model.adapter",
        f"is not what run {max(records)} started from: the sha256 of its files is {(sha256 or 'none')[:12]}…, and was"
        f" {(before or 'none')[:12]}…; put the earlier files back, or create the job anew with another storage.runId",
    )


def claim_run_number(root: RunRoot, run: int, record: RunRecord) -> bool:
    """Take run number ``run`` by creating its run record. Return False if another writer has taken the number."""
    return root.create(run_key(run), record.to_json().encode())


def check_fence(root: RunRoot, run: int) -> None:
    """Raise NewerRun if a higher run number than ``run`` has been taken for the job, so that ``run`` stops writing."""
    newest = max(listed_records(root), default=run)
    if newest > run:
        raise NewerRun(f"run {newest} of this job has started, so run {run} stopped writing to the bucket")
