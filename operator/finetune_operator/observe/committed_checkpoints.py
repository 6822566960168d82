"""The committed checkpoints of a job, as far as the operator knows them. `observer.py` calls `known_checkpoints`, and
`status/report_merge.py` calls `committed`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC

from finetune_core.api.status import CHECKPOINT_LIMIT, CheckpointStatus
from finetune_core.contract import CheckpointRecord, Report


def known_checkpoints(stored: Sequence[CheckpointStatus], report: Report | None) -> list[CheckpointStatus]:
    """Return the committed checkpoints of a job, oldest first.

    ``stored`` are those in the stored status. ``report`` is the newest report of the job's pods; None without one. The
    checkpoints of the report are returned if it has any and if its trainer has taken a run number: the status is
    written less often than reports arrive, and so may lack the checkpoint that the pods committed last. Only
    checkpoints from the status have scores and the marks `last` and `best`.
    """
    if report is None or report.run == 0 or not report.checkpoints:
        return list(stored)
    return [committed(record) for record in report.checkpoints[-CHECKPOINT_LIMIT:]]


def committed(record: CheckpointRecord) -> CheckpointStatus:
    """Return the checkpoint ``record`` of a report without its scores and without the marks `last` and `best`."""
    return CheckpointStatus(
        run=record.run,
        step=record.step,
        uri=record.uri,
        bytes=record.bytes,
        manifest_sha256=record.manifest_sha256,
        time=record.time.astimezone(UTC).replace(microsecond=0),
        damaged=record.damaged,
    )
