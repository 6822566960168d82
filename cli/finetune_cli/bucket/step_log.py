"""Reads the step log of a job from the bucket: one row for each optimizer step, over all runs of the job.

`finetune metrics` calls `read_steps`. The rows are read as they are stored, so that the columns of another version of
the trainer are kept. tests/cli/test_metrics.py compares the result with what the trainer itself reads.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune_cli.bucket.object_store import ObjectStoreReader
from finetune_core.errors import UserError
from finetune_core.layout import Location

Row = dict[str, int | float | bool | str | None]
"""One row of the step log, by the names of its columns. `run` is the number of the run that made the step."""

RECORD_BYTES = 1 << 20
"""Largest size in bytes of the record of a run. A larger object is none that a trainer wrote."""


def read_steps(
    store: ObjectStoreReader, root: Location, *, every_run: bool, progress: Callable[[str], None]
) -> list[Row]:
    """Return the rows of the step log below ``root``, by step.

    Without ``every_run`` these are the steps that led to the newest row: those of the newest run, before them those of
    the run that it resumed from, up to the checkpoint that it resumed from, and so on. With ``every_run`` the rows of
    all runs are returned, by run and step, also those of branches that were left. ``progress`` is called with the
    address of each file before the file is read. Raises UserError where there is no step log, and where a file or a
    record can't be read.
    """
    segments: dict[int, list[str]] = {}
    for entry in store.entries(root.bucket, root.key("metrics") + "/"):
        if match := re.fullmatch(r"(\d{1,9})-\d{1,9}\.jsonl", entry.key.rpartition("/")[2]):
            segments.setdefault(int(match[1]), []).append(entry.key)
    if not segments:
        raise UserError(
            root.uri("metrics"), "has no step log yet; the trainer writes its first rows with the first checkpoint"
        )
    if every_run:
        return [
            row for run in sorted(segments) for key in segments[run] for row in _rows(store, root, run, key, progress)
        ]
    return _lineage(store, root, segments, progress)


def _lineage(
    store: ObjectStoreReader, root: Location, segments: Mapping[int, list[str]], progress: Callable[[str], None]
) -> list[Row]:
    """Return the rows of the newest run, and of the runs that it grew from. Where two runs have a row of the same step,
    that of the later run counts: it has the scores of an evaluation that SIGTERM interrupted in the earlier run."""
    records = {
        int(match[1]): entry.key
        for entry in store.entries(root.bucket, root.key("runs") + "/")
        if (match := re.fullmatch(r"(\d{1,9})\.json", entry.key.rpartition("/")[2])) and entry.bytes <= RECORD_BYTES
    }
    run, limit = max([*records, *segments]), math.inf
    kept: dict[int, Row] = {}
    while True:
        for key in segments.get(run, []):
            own = {_step(row): row for row in _rows(store, root, run, key, progress)}
            kept |= {step: row for step, row in own.items() if step <= limit and step not in kept}
        parent = _parent(store, root.bucket, records[run]) if run in records else None
        if parent is None or parent[0] >= run:
            return [kept[step] for step in sorted(kept)]
        run, limit = parent


def columns_of(rows: list[Row]) -> list[str]:
    """Return the names of all columns of ``rows``, in the order in which they first appear, `run` and `step` first."""
    names = dict.fromkeys(("run", "step"))
    for row in rows:
        names |= dict.fromkeys(row)
    return list(names)


def _rows(
    store: ObjectStoreReader, root: Location, run: int, key: str, progress: Callable[[str], None]
) -> Iterator[Row]:
    """Yield the rows in one file of a run. It is fetched into a temporary file first, because it may be large."""
    address = f"s3://{root.bucket}/{key}"
    progress(address)
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        file = Path(folder) / "segment.jsonl"
        store.fetch(root.bucket, key, file, lambda _count: None)
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield {"run": run, **_row(line, f"{address}:{number}")}


def _row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(place, "is no row of a step log; the file was changed or is cut off") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int) or isinstance(row["step"], bool):
        raise UserError(place, "is no row of a step log, because it has no whole number as its `step`")
    wrong = next((name for name, value in row.items() if not _is_plain(value)), None)
    if wrong is not None:
        raise UserError(place, f"is no row of a step log, because `{wrong}` is neither a number nor a text")
    # A trainer writes no such numbers, and JSON has none.
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _step(row: Row) -> int:
    step = row["step"]
    assert isinstance(step, int)
    return step


def _parent(store: ObjectStoreReader, bucket: str, key: str) -> tuple[int, int] | None:
    """Return run and step of the checkpoint that a run resumed from. Return None where it began anew."""
    address = f"s3://{bucket}/{key}"
    try:
        record: Mapping[str, Any] = json.loads(store.read(bucket, key))
        parent = record.get("parent")
        return None if parent is None else (int(parent["run"]), int(parent["step"]))
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            address, "is no record of a run of this version; `--every-run` shows all rows without the records"
        ) from error
