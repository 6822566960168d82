"""Run numbers and run records. Each start of a job's ranks, and each rollback, claims the next run number. The record
names the checkpoint that the run continues, and the higher number keeps earlier runs from writing (fencing).

A resuming run follows the records back to its parents instead of taking the checkpoint with the highest step. The
highest step may belong to an abandoned branch, after a rollback or on a partitioned node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from finetune_core.contract import ContractModel
from finetune_core.layout import run_key
from finetune_trainer.pod.errors import NewerRun
from finetune_trainer.storage.root import RunRoot


class CheckpointId(NamedTuple):
    """Identifies a checkpoint by the run that wrote it and the optimizer step that it holds."""

    run: int
    step: int


class ParentRecord(ContractModel):
    """The checkpoint that a run resumed from."""

    run: int
    step: int


class Rollback(ContractModel):
    """A rollback to an earlier checkpoint. The rollback applies to all later steps of the lineage."""

    step: int
    """Step of the checkpoint that training returned to. Later steps use the learning rate times `rate_factor`."""
    rate_factor: float
    skip_from: int
    """First step whose global batch is consumed without an optimizer update."""
    skip_to: int
    """Last step whose global batch is consumed without an optimizer update."""
    reason: str


class RunRecord(ContractModel):
    """Content of `runs/<run>.json`. `attempt` and `pod_uid` make the records of any two writers different, so that a
    writer can tell its own record from another one after a conditional write."""

    version: int = 1
    attempt: int
    pod_uid: str
    parent: ParentRecord | None = None
    rate_factor: float = 1.0
    """Product of the factors in `rollbacks`, for people who read the file."""
    rollbacks: list[Rollback] = []
    """All rollbacks of the lineage, oldest first."""


def lineage(records: Mapping[int, RunRecord], committed: Iterable[CheckpointId]) -> list[CheckpointId]:
    """Return the checkpoints that a new run may resume from, best first.

    The checkpoints of the newest run come first, newest first. Then follow the parent of that run and the older
    checkpoints of the parent's run, and so on.
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
        # A parent always has a lower run number. The second condition ends the loop for a record that was tampered
        # with.
        if parent is None or parent.run >= run:
            break
        run, newest_step = parent.run, parent.step
    return found


def run_numbers(root: RunRoot) -> list[int]:
    """Return the run numbers that were claimed so far, in ascending order."""
    matches = (re.fullmatch(r"runs/(\d+)\.json", entry.key) for entry in root.list_objects("runs/"))
    return sorted(int(match[1]) for match in matches if match)


def read_records(root: RunRoot) -> dict[int, RunRecord]:
    """Return the records of all runs, by run number."""
    records = {}
    for run in run_numbers(root):
        data = root.read(run_key(run))
        if data is not None:
            records[run] = RunRecord.model_validate_json(data)
    return records


def claim_run_number(root: RunRoot, run: int, record: RunRecord) -> bool:
    """Create the record of run number ``run``. Return False if another writer has claimed the number."""
    return root.create(run_key(run), record.to_json().encode())


def check_fence(root: RunRoot, run: int) -> None:
    """Raise NewerRun if a later start of the job has claimed a higher run number than ``run``."""
    newest = max(run_numbers(root), default=run)
    if newest > run:
        raise NewerRun(f"run {newest} of this job has started, so run {run} stopped writing to the bucket")
