"""`finetune checkpoints`: lists the checkpoints of a job that are in the bucket. The list is made from the bucket and
not from the job's status, because the status may be out of date.

The input is a client of the object store, and the address of the folder of all runs of the job. The output has one
entry for each checkpoint folder, as a table or as JSON. The command `checkpoints`
calls `inspect_checkpoints`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from finetune_cli.bucket.object_store import Entry, MissingError, ObjectStoreReader
from finetune_cli.formatting import number, size
from finetune_core.api.job import FineTuneJob
from finetune_core.layout import COMMIT, MANIFEST, TRAINER_FILE, Location, Manifest, digest, parse_uri, run_root_of

COMMITTED, DAMAGED, UNFINISHED = "committed", "damaged", "unfinished"


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """A checkpoint folder in the bucket."""

    run: int
    step: int
    state: str
    """`committed`, `damaged` (a file or the manifest is missing or is not what was committed, or this version can't
    read the manifest) or `unfinished` (COMMIT is missing, for example because the upload still runs)."""
    uri: str
    bytes: int
    files: int
    """Number of files in the manifest. For a damaged or unfinished folder, number of all objects in the folder."""
    time: datetime
    """Time of the commit. For an unfinished checkpoint, the time at which its newest object was written."""
    manifest_sha256: str = ""
    perplexity: float | None = None
    problem: str = ""
    """What is damaged, with the object's name. Empty for a folder without damage."""
    last: bool = False
    best: bool = False


def root_of(job: FineTuneJob) -> Location:
    """Return the bucket and the prefix of the folder of all runs of ``job``."""
    return parse_uri(run_root_of(job, job.status.preflight if job.status else None))


def inspect_checkpoints(
    store: ObjectStoreReader, root: Location, *, verify: bool, progress: Callable[[str], None]
) -> list[CheckpointFolder]:
    """Return all checkpoint folders below ``root``, sorted by run and step. In each folder that has the object
    COMMIT, names and sizes of the files are compared with the manifest, and the manifest's sha256 with COMMIT. With
    ``verify`` every file that the manifest names is also read, and its sha256 is compared with the manifest.

    ``progress`` is called with the address of each folder before the folder is inspected.
    """
    found = []
    for (run, step), files in sorted(_folders(store, root).items()):
        place = Location(root.bucket, next(iter(files.values())).key.rpartition("/")[0])
        progress(place.uri())
        try:
            found.append(_inspect_folder(store, place, run, step, files, verify=verify))
        except MissingError:
            # An object was deleted while its folder was inspected. A running trainer deletes old checkpoints, and in
            # each of them it deletes COMMIT first. So a folder that has no COMMIT after the error is being deleted, and
            # is not listed.
            left = _folders(store, root).get((run, step), {})
            if COMMIT in left:
                found.append(_inspect_folder(store, place, run, step, left, verify=verify))
    return _with_last_and_best(found)


def _folders(store: ObjectStoreReader, root: Location) -> dict[tuple[int, int], dict[str, Entry]]:
    """Return, for each checkpoint folder by (run, step), the objects in the folder by their file names."""
    folders: dict[tuple[int, int], dict[str, Entry]] = {}
    start = len(root.key("checkpoints")) + 1
    for entry in store.entries(root.bucket, root.key("checkpoints") + "/"):
        match = re.fullmatch(r"(\d+)-(\d+)/(.+)", entry.key[start:])
        if match:
            folders.setdefault((int(match[1]), int(match[2])), {})[match[3]] = entry
    return folders


def _inspect_folder(
    store: ObjectStoreReader, place: Location, run: int, step: int, files: Mapping[str, Entry], *, verify: bool
) -> CheckpointFolder:
    """Inspect the checkpoint folder at ``place``, and return its state, size, perplexity and damage. ``files`` are the
    objects in the folder, by their file names."""
    weight = sum(entry.bytes for name, entry in files.items() if name not in (COMMIT, MANIFEST))
    newest = max(entry.modified for entry in files.values())
    if COMMIT not in files:
        return CheckpointFolder(run, step, UNFINISHED, place.uri(), weight, len(files), newest)
    time, sha256 = files[COMMIT].modified, ""
    try:
        if MANIFEST not in files:
            raise DamageError(f"{MANIFEST} is missing")
        encoded = store.read(place.bucket, place.key(MANIFEST))
        sha256 = digest(encoded)
        if store.read(place.bucket, place.key(COMMIT)).decode(errors="replace").strip() != sha256:
            raise DamageError(f"the sha256 of {MANIFEST} is not that in {COMMIT}")
        manifest = _manifest(encoded)
        for file in manifest.files:
            if file.name not in files:
                raise DamageError(f"{file.name} is missing")
            if files[file.name].bytes != file.bytes:
                raise DamageError(f"{file.name} has {files[file.name].bytes} bytes, {MANIFEST} says {file.bytes}")
            if verify and store.digest(place.bucket, place.key(file.name)) != file.sha256:
                raise DamageError(f"{file.name} has another sha256 than {MANIFEST} says")
    except DamageError as damage:
        return CheckpointFolder(run, step, DAMAGED, place.uri(), weight, len(files), time, sha256, problem=str(damage))
    perplexity = _perplexity(store.read(place.bucket, place.key(TRAINER_FILE))) if TRAINER_FILE in files else None
    return CheckpointFolder(
        run, step, COMMITTED, place.uri(), manifest.total_bytes, len(manifest.files), time, sha256, perplexity
    )


class DamageError(Exception):
    """A file or the manifest of a checkpoint is missing or is not what was committed, or this version can't read the
    manifest. The trainer can't resume from such a checkpoint. The message names the file or the manifest."""


def _manifest(encoded: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(encoded)
    except ValidationError as error:
        raise DamageError(f"{MANIFEST} is none of this version") from error


def _perplexity(encoded: bytes) -> float | None:
    """Return the validation perplexity in ``encoded``, the content of a checkpoint's trainer.json. Return None where
    ``encoded`` contains no finite number as the perplexity. ``encoded`` may be any bytes, because everybody with a key
    for the bucket can write the object."""
    try:
        value = json.loads(encoded).get("perplexity")
        perplexity = float(value) if isinstance(value, int | float) else math.nan
    except (ValueError, AttributeError, OverflowError, RecursionError):
        return None
    return perplexity if math.isfinite(perplexity) else None


def _with_last_and_best(found: Sequence[CheckpointFolder]) -> list[CheckpointFolder]:
    """Return ``found`` with two marks: `last` on the newest committed checkpoint, and `best` on the committed
    checkpoint with the lowest validation perplexity."""
    whole = [item for item in found if item.state == COMMITTED]
    last = whole[-1] if whole else None
    scored = [item for item in whole if item.perplexity is not None]
    best = min(scored, key=lambda item: item.perplexity or 0.0, default=None)
    return [CheckpointFolder(**{**asdict(item), "last": item is last, "best": item is best}) for item in found]


def as_json(root: Location, found: Sequence[CheckpointFolder]) -> dict[str, Any]:
    """Return the checkpoint folders as a JSON object for programs."""

    def plain(item: CheckpointFolder) -> dict[str, Any]:
        values = asdict(item) | {"time": item.time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        values["manifestSha256"] = values.pop("manifest_sha256")
        return {key: value for key, value in values.items() if value not in (None, "")}

    return {"root": root.uri(), "checkpoints": [plain(item) for item in found]}


def as_table(root: Location, found: Sequence[CheckpointFolder]) -> Table:
    """Return the checkpoint folders as a table for people."""
    table = Table(title=root.uri(), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("run", "step", "size", "files", "perplexity"):
        table.add_column(column, justify="right")
    for column in ("committed (UTC)", "state", ""):
        table.add_column(column)
    styles = {COMMITTED: "green", DAMAGED: "red", UNFINISHED: "yellow"}
    for item in found:
        marks = " ".join(mark for mark, is_so in (("last", item.last), ("best", item.best)) if is_so)
        table.add_row(
            str(item.run),
            str(item.step),
            size(item.bytes),
            str(item.files),
            number(item.perplexity) if item.perplexity is not None else "",
            f"{item.time.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if item.state != UNFINISHED else "",
            Text(item.state, style=styles[item.state]),
            Text(item.problem or marks, style="red" if item.problem else "cyan"),
        )
    return table
