"""Commits the artifact of a job (the trained model), and reads back the result of a job whose artifact is committed.

The object `ARTIFACT` names the folder of the artifact that counts. The first run that creates this object wins, and
every later attempt of the job returns the result of that run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune_core.contract import AdapterOrigin, ArtifactRecord, Outcome, Result
from finetune_core.layout import ARTIFACT_POINTER, ArtifactPointer, Manifest, artifact_folder
from finetune_trainer.pod.errors import Damaged, OutsideFailure
from finetune_trainer.storage.commit import commit_folder, read_manifest, upload_files
from finetune_trainer.storage.evaluation_file import read_evaluation
from finetune_trainer.storage.extended_bases import EXTENDED_BASE_PROBE, extended_bases_root
from finetune_trainer.storage.lineage import check_fence
from finetune_trainer.storage.root import RunRoot

CARD_FILE = "README.md"
"""File of an artifact that describes the model: its model card."""


def committed_result(root: RunRoot) -> Result | None:
    """Return the job's result if its artifact is committed, else None.

    Raises Damaged if COMMIT or the manifest in the folder that `ARTIFACT` names is missing or has changed. The other
    files of the folder are not checked.
    """
    data = root.read(ARTIFACT_POINTER)
    if data is None:
        return None
    pointer = ArtifactPointer.model_validate_json(data)
    _, manifest_sha256 = read_manifest(root, pointer.folder)
    if manifest_sha256 != pointer.manifest_sha256:
        raise Damaged(f"{pointer.folder} is not the artifact that {ARTIFACT_POINTER} names")
    scored = read_evaluation(root, pointer.run)
    return Result(
        outcome=pointer.outcome,
        message=f"the artifact of step {pointer.step} is committed",
        step=pointer.step,
        artifact=ArtifactRecord(
            uri=root.uri(pointer.folder),
            step=pointer.step,
            bytes=pointer.bytes,
            manifest_sha256=pointer.manifest_sha256,
        ),
        evaluation=scored.evaluation.rounded() if scored is not None else None,
    )


def rehearse_publish(root: RunRoot, run: int, *, extended_base: bool) -> list[str]:
    """Write an empty object where the artifact of ``run`` will lie, and delete it again. With ``extended_base`` do the
    same in the folder of the extended base models. Return a sentence for each object that can't be deleted.

    Raises OutsideFailure where the store refuses to write, so that this is known before the training and not after it.
    The permission to delete is not required, because the artifact overwrites the empty object.
    """
    places = [(root, f"{artifact_folder(run)}/{CARD_FILE}")]
    if extended_base:
        places.append((extended_bases_root(root), EXTENDED_BASE_PROBE))
    notices = []
    for folder, key in places:
        folder.write(key, b"")
        try:
            folder.delete([key])
        except OutsideFailure as failure:
            notices.append(f"the empty object {folder.uri(key)}, which tested the store, can't be deleted: {failure}")
    return notices


def publish(
    root: RunRoot,
    run: int,
    step: int,
    files: Sequence[Path],
    *,
    below: Path | None = None,
    outcome: Outcome = Outcome.COMPLETED,
    origin: AdapterOrigin | None = None,
) -> Result:
    """Upload and commit ``files`` as the artifact of ``run``, create the object `ARTIFACT`, and return the job's
    result. ``step`` is the step of the exported checkpoint, and ``origin`` the adapter that the training started from,
    which the manifest names. For ``below`` see `upload_files`.

    If an earlier run has already created `ARTIFACT`, the returned result is that of the earlier run's artifact.
    """
    folder = artifact_folder(run)
    uploaded = upload_files(root, folder, files, below=below)
    manifest = Manifest(kind="Artifact", run=run, step=step, files=uploaded, adapter=origin)
    manifest_sha256 = commit_folder(root, folder, manifest)
    pointer = ArtifactPointer(
        run=run,
        step=step,
        folder=folder,
        bytes=manifest.total_bytes,
        manifest_sha256=manifest_sha256,
        outcome=outcome,
    )
    check_fence(root, run)
    root.create(ARTIFACT_POINTER, pointer.to_json().encode())
    result = committed_result(root)
    if result is None:
        raise Damaged(f"{ARTIFACT_POINTER} vanished after it was written")
    return result
