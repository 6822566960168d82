"""Run numbers: each start of the gang takes the next one, which fences the earlier ones and records what it grew from.

Resume follows the records backwards and never asks for the highest step: a branch that was left (a rollback, a
partitioned node) may have higher ones.
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
    """Which checkpoint: the run that wrote it and the step that it holds."""

    run: int
    step: int


class ParentRecord(ContractModel):
    """The checkpoint that a run grew from."""

    run: int
    step: int


class Rollback(ContractModel):
    """A return to an earlier checkpoint; it holds for every later step of the lineage."""

    step: int
    """Step that was returned to: later ones use the lower rate."""
    rate_factor: float
    skip_from: int
    """First step whose global batch is consumed without an update."""
    skip_to: int
    """Last such step."""
    reason: str


class RunRecord(ContractModel):
    """Content of `runs/<run>.json`; it differs between any two writers, so that a conditional write can be told
    from another's."""

    version: int = 1
    attempt: int
    pod_uid: str
    parent: ParentRecord | None = None
    rate_factor: float = 1.0
    """Product over `rollbacks`, for people who read the file."""
    rollbacks: list[Rollback] = []
    """All rollbacks of the lineage, oldest first."""


def lineage(records: Mapping[int, RunRecord], committed: Iterable[CheckpointId]) -> list[CheckpointId]:
    """Return the checkpoints that a new run may resume from, best first.

    First those of the newest run, newest first; then its parent and the older ones of the parent's run; and so on.
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
        # A parent is an older run, always: this also ends the loop on a record that was tampered with.
        if parent is None or parent.run >= run:
            break
        run, newest_step = parent.run, parent.step
    return found


def run_numbers(root: RunRoot) -> list[int]:
    """Return the run numbers that were taken, ascending."""
    matches = (re.fullmatch(r"runs/(\d+)\.json", entry.key) for entry in root.list_objects("runs/"))
    return sorted(int(match[1]) for match in matches if match)


def read_records(root: RunRoot) -> dict[int, RunRecord]:
    """Return the records of all runs."""
    records = {}
    for run in run_numbers(root):
        data = root.read(run_key(run))
        if data is not None:
            records[run] = RunRecord.model_validate_json(data)
    return records


def claim_run_number(root: RunRoot, run: int, record: RunRecord) -> bool:
    """Take run number ``run``; False where another writer has it."""
    return root.create(run_key(run), record.to_json().encode())


def check_fence(root: RunRoot, run: int) -> None:
    """Raise NewerRun where a later start of the job has taken a higher run number."""
    newest = max(run_numbers(root), default=run)
    if newest > run:
        raise NewerRun(f"run {newest} of this job has started, so run {run} stopped writing to the bucket")
