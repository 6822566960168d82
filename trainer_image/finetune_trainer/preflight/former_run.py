"""Finds an artifact or a checkpoint that a new job can use: in the job's own folder of runs, or in the folder of a
former job with the same namespace, name and training. `preflight/entrypoint.py` calls `own_folder`, `former_folders`
and `judged_run`.

A job loses status and uid where its cluster is built anew from Git or restored from a backup. Without this search the
job would train everything again. Folders of former jobs are only read, and their content is not trusted: a folder with
a record that is malformed or too long, or with a damaged artifact, is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import partial

from pydantic import TypeAdapter, ValidationError

from finetune_core.api.evaluation import RequirementSpec
from finetune_core.api.storage import RunId
from finetune_core.contract import Outcome
from finetune_core.contract.preflight_result import FoundArtifact, FoundRun
from finetune_core.contract.same_training import TrainingRecord
from finetune_core.layout import (
    ARTIFACT_POINTER,
    COMMIT,
    MANIFEST,
    ArtifactPointer,
    Location,
    artifact_folder,
    evaluation_key,
)
from finetune_core.requirements import judge
from finetune_trainer.pod.errors import Damaged
from finetune_trainer.storage.checkpoint_folders import committed
from finetune_trainer.storage.commit import check_sizes, read_manifest
from finetune_trainer.storage.evaluation_file import EvaluationFile
from finetune_trainer.storage.lineage import RunRecord, lineage, listed_records, read_records
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.run_store import ListedObject

MOST_FOLDERS = 1000
"""Largest number of folders that are listed in the search for former jobs: the first ones in the order of their names.
"""
MOST_RECORDS = 2000
"""Largest number of run records in the folder of a former job. A folder with more records is left alone."""
POINTER_BYTES = 256 * 1024
"""Largest size in bytes of `ARTIFACT` that is read."""
MANIFEST_BYTES = 16 * 1024 * 1024
"""Largest size in bytes of a manifest or a `COMMIT` that is read. A manifest has about 150 bytes for each file of the
artifact."""
EVALUATION_BYTES = 64 * 1024 * 1024
"""Largest size in bytes of a file with scores and answers that is read."""
PARALLEL_FOLDERS = 8


@dataclass(frozen=True)
class OwnFolder:
    """What the job's own folder of runs holds before attempt 1."""

    has_runs: bool
    found: FoundRun | None
    """The artifact or the newest checkpoint. None where the folder holds neither."""
    records: Mapping[int, RunRecord] = field(default_factory=dict)
    """The records of the runs by number. Empty where one of them can't be read."""


@dataclass(frozen=True)
class FormerFolder:
    """The folder of a former job whose settings are those of the checked job. All of its runs have the same
    training."""

    training: TrainingRecord
    """The training of all runs in the folder."""
    found: FoundRun
    newest: datetime
    """When the newest run in the folder was begun."""


def own_folder(root: RunRoot) -> OwnFolder:
    """Return what the job's own folder of runs holds. Raises Damaged where the artifact is not what was committed, or
    where an object of the artifact is malformed."""
    entries = listed_records(root)
    try:
        records = read_records(root, list(entries))
    except Damaged:
        # Records are not needed for an artifact. Without an artifact, the start of the run says what is wrong.
        records = {}
    return OwnFolder(has_runs=bool(entries), found=_found(root, records, entries), records=records)


def former_folders(root: RunRoot, settings_sha256: str) -> list[FormerFolder]:
    """Return the folders of former jobs beside ``root`` that hold an artifact or a checkpoint. All runs of such a
    folder trained with the settings whose digest is ``settings_sha256``.

    Folders with an artifact come first. Among them, and among the other folders, a newer folder comes before an older
    one. Raises OutsideFailure if the store can't be read.
    """
    parent, _, own = root.location.prefix.rpartition("/")
    names = root.store.list_folders(root.location.bucket, f"{parent}/", MOST_FOLDERS)
    beside = [
        RunRoot(root.store, Location(root.location.bucket, f"{parent}/{name}"))
        for name in names
        if name != own and _is_run_id(name)
    ]
    with ThreadPoolExecutor(PARALLEL_FOLDERS) as pool:
        folders = [
            folder
            for folder in pool.map(partial(_former_folder, settings_sha256=settings_sha256), beside)
            if folder is not None
        ]
    return sorted(folders, key=lambda folder: (folder.found.artifact is not None, folder.newest), reverse=True)


def judged_run(found: FoundRun, requirements: Sequence[RequirementSpec] | None) -> FoundRun:
    """Return ``found``, with the outcome GateFailed where the artifact's model did not reach one of ``requirements``.
    ``requirements`` is `evaluation.require` of the job that takes the artifact over."""
    if found.artifact is None or all(judgement.passed for judgement in judge(requirements, found.evaluation)):
        return found
    failed = found.artifact.model_copy(update={"outcome": Outcome.GATE_FAILED})
    return found.model_copy(update={"artifact": failed})


def _is_run_id(name: str) -> bool:
    try:
        TypeAdapter(RunId).validate_python(name)
    except ValidationError:
        return False
    return True


def _former_folder(root: RunRoot, settings_sha256: str) -> FormerFolder | None:
    """Return what the folder ``root`` holds. Return None if it holds no artifact and no checkpoint, if its runs do not
    all have the same training, or if their settings have another digest than ``settings_sha256``. Return None also if
    the folder is damaged or has more than MOST_RECORDS records."""
    entries = listed_records(root)
    if not 0 < len(entries) <= MOST_RECORDS:
        return None
    runs = list(entries)
    try:
        # The newest record alone is mostly enough to see that a folder does not fit.
        newest = read_records(root, runs[-1:])[runs[-1]].training
        if newest is None or newest.settings_sha256 != settings_sha256:
            return None
        records = read_records(root, runs)
        if any(record.training != newest for record in records.values()):
            return None
        found = _found(root, records, entries)
    except Damaged:
        return None
    if found is None:
        return None
    newest_time = max(entry.modified for entry in entries.values())
    return FormerFolder(training=newest, found=found, newest=newest_time)


def _found(root: RunRoot, records: Mapping[int, RunRecord], entries: Mapping[int, ListedObject]) -> FoundRun | None:
    """Return the committed artifact of a folder or else its newest checkpoint; None where the folder holds neither.
    Raises Damaged where the artifact is not what was committed, or where an object that is read is malformed."""
    try:
        return _artifact_or_checkpoint(root, records, entries)
    except ValidationError as error:
        raise Damaged(f"{root.location.prefix} holds an object that is malformed") from error


def _artifact_or_checkpoint(
    root: RunRoot, records: Mapping[int, RunRecord], entries: Mapping[int, ListedObject]
) -> FoundRun | None:
    uid = records[max(records)].uid if records else ""
    run_id = root.location.prefix.rpartition("/")[2]
    began = min((entry.modified for entry in entries.values()), default=None)
    data = root.read_at_most(ARTIFACT_POINTER, POINTER_BYTES)
    if data is not None:
        pointer = ArtifactPointer.model_validate_json(data)
        if pointer.folder != artifact_folder(pointer.run):
            raise Damaged(f"{ARTIFACT_POINTER} names {pointer.folder}, which is not the folder of run {pointer.run}")
        listed = root.list_objects(f"{pointer.folder}/")
        files = {entry.key.removeprefix(f"{pointer.folder}/"): entry for entry in listed}
        for name in (COMMIT, MANIFEST):
            if name in files and files[name].bytes > MANIFEST_BYTES:
                raise Damaged(f"{pointer.folder}/{name} has more than {MANIFEST_BYTES} bytes")
        manifest, sha256 = read_manifest(root, pointer.folder)
        if sha256 != pointer.manifest_sha256:
            raise Damaged(f"{pointer.folder} is not the artifact that {ARTIFACT_POINTER} names")
        check_sizes(pointer.folder, manifest, files)
        scores = root.read_at_most(evaluation_key(pointer.run), EVALUATION_BYTES)
        artifact = FoundArtifact(
            run=pointer.run,
            bytes=pointer.bytes,
            manifest_sha256=pointer.manifest_sha256,
            outcome=pointer.outcome,
        )
        return FoundRun(
            run_id=run_id,
            uid=uid,
            time=(began or listed[0].modified).replace(microsecond=0),
            step=pointer.step,
            artifact=artifact,
            template_date=_template_date(records),
            # Scores that are too long to be read here are left out. The object `evaluation/<run>.json` still holds
            # them.
            evaluation=EvaluationFile.model_validate_json(scores).evaluation.rounded() if scores is not None else None,
        )
    checkpoints = lineage(records, committed(root))
    if not checkpoints or began is None:
        return None
    return FoundRun(
        run_id=run_id,
        uid=uid,
        time=began.replace(microsecond=0),
        step=checkpoints[0].step,
        template_date=_template_date(records),
    )


def _template_date(records: Mapping[int, RunRecord]) -> date | None:
    """Return the date that chat templates got in the newest run of ``records``; None where the date is not recorded."""
    training = records[max(records)].training if records else None
    return training.template_date if training is not None else None
