"""Puts together what the folder of a job says about its training: one `ComparedRun` for each source of the command.

`commands/compare_command.py` calls `read_run`. What can't be read becomes a notice, so that one damaged file hides no
other figure. Only a folder without any run raises an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from finetune_cli.bucket.object_store import SMALL_OBJECT_BYTES
from finetune_cli.compare.answers import AnsweredRow, pairs_of
from finetune_cli.compare.folders import RunFolder, StoredObject
from finetune_cli.compare.stored_files import (
    ModelScores,
    Step,
    StoredManifest,
    StoredPointer,
    StoredRun,
    StoredScores,
    StoredState,
    parse,
    settings_of,
    steps_of,
)
from finetune_cli.compare.training_history import Training, training_of
from finetune_core.errors import UserError
from finetune_core.layout import ARTIFACT_POINTER, COMMIT, MANIFEST, TRAINER_FILE, evaluation_key, settings_key
from finetune_core.task_declaration import Task
from finetune_core.tasks import TASKS

RUN_KEY = re.compile(r"runs/(\d{6,18})\.json")
SEGMENT_KEY = re.compile(r"metrics/(\d{6,18})-\d+\.jsonl")
CHECKPOINT_KEY = re.compile(r"checkpoints/(\d{6,18})-(\d{1,18})/(.+)")
MOST_NOTICES = 20


class Tuning(StrEnum):
    """What of the model was trained."""

    LORA = "LoRA"
    FULL = "Full"


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What the cluster knows of a job beyond its folder."""

    state: str
    gpu_seconds: int | None
    incidents: tuple[str, ...]
    """One sentence for each incident of the stability monitor."""
    settings: Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class Artifact:
    """The committed artifact of a job."""

    bytes: int
    step: int
    files: tuple[str, ...]
    """Names of the files, empty where the manifest can't be read."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of base model and tuned model on the same rows."""

    rows: str
    """`Test` or `Validation`, or what another version wrote."""
    examples: int
    base: ModelScores | None
    tuned: ModelScores | None
    tuned_step: int | None
    base_grades: Mapping[str, float]
    """Value of the main score for each graded row, by the identity of the row."""
    tuned_grades: Mapping[str, float]
    answers: tuple[AnsweredRow, ...] = ()
    """Some rows with the answers of both models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """Everything that a comparison knows of one job."""

    label: str
    """Name in tables and plots, different for each run of a comparison."""
    address: str
    tuning: Tuning | None
    """None where neither settings nor artifact say it."""
    task: Task | None
    """None where the job grades nothing, has its own grader, or where the task is not known."""
    task_name: str | None
    """Name of the task, also of an own grader. None where the job has none, or where it is not known."""
    settings: Mapping[str, str] | None
    """The settings of the run file, by the dotted paths of their fields. None where no version stored them."""
    inputs: Mapping[str, str]
    """What identifies model and data sources, by their paths in the spec: digests, or else their addresses."""
    training: Training
    scores: Scores | None
    artifact: Artifact | None
    checkpoints: int
    """Number of committed checkpoints that are still there."""
    checkpoint_bytes: int | None
    """Size of the newest of them."""
    processes: int | None
    on_gpu: bool | None
    job: JobFacts | None
    notices: tuple[str, ...]

    def setting(self, path: str) -> str | None:
        """Return the value of the field at ``path`` of the run file, for example `optimization.learningRate`."""
        return self.settings.get(path) if self.settings is not None else None

    def number(self, path: str) -> float | None:
        """Return the value of the field at ``path`` as a number, or None where it is not known or none."""
        try:
            return float(self.setting(path) or "")
        except ValueError:
            return None


class _Reader:
    """Reads one folder and collects notices about what can't be read."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.objects: dict[str, StoredObject] = {item.key: item for item in folder.list_objects()}
        self.notices: list[str] = []

    def read(self, key: str) -> bytes | None:
        """Return the content of the object ``key``, or None where there is none. An object that is too large counts as
        missing and makes a notice."""
        listed = self.objects.get(key)
        if listed is None:
            return None
        if listed.bytes > SMALL_OBJECT_BYTES:
            self.notices.append(f"{key} is left out: it is larger than {SMALL_OBJECT_BYTES >> 20} MiB")
            return None
        data = self.folder.read(key)
        if data is None:
            self.notices.append(f"{key} is left out: it can't be read")
        return data

    def records(self) -> dict[int, StoredRun]:
        """Return the run records by run number."""
        found: dict[int, StoredRun] = {}
        for key in self.objects:
            match = RUN_KEY.fullmatch(key)
            if match is None:
                continue
            record = parse(StoredRun, self.read(key))
            if record is None:
                self.notices.append(f"{key} is no run record of this version, so run {int(match[1])} is left out")
            else:
                found[int(match[1])] = record
        return found

    def steps(self, progress: Callable[[str], None]) -> dict[int, list[Step]]:
        """Return the steps in the step logs, by run number."""
        found: dict[int, list[Step]] = {}
        for key in sorted(self.objects):
            match = SEGMENT_KEY.fullmatch(key)
            data = self.read(key) if match is not None else None
            if match is None or data is None:
                continue
            progress(key)
            steps, bad = steps_of(data, int(match[1]))
            found.setdefault(int(match[1]), []).extend(steps)
            if bad:
                self.notices.append(f"{key}: {bad} line{'s are' if bad > 1 else ' is'} no step of a log, and left out")
        return found


def read_run(
    folder: RunFolder, label: str, *, job: JobFacts | None = None, progress: Callable[[str], None] = lambda key: None
) -> ComparedRun:
    """Return what ``folder`` says about its training. ``progress`` is called with the key of each segment of the step
    log. Raises UserError where the folder has no run, or where the store can't be read."""
    reader = _Reader(folder)
    records = reader.records()
    if not records:
        raise UserError(folder.address, _no_run(reader))
    pointer = parse(StoredPointer, reader.read(ARTIFACT_POINTER))
    if ARTIFACT_POINTER in reader.objects and pointer is None:
        reader.notices.append(f"{ARTIFACT_POINTER} names no artifact of this version")
    newest = pointer.run if pointer is not None and pointer.run in records else max(records)
    training = training_of(records, reader.steps(progress), newest)
    lineage = _lineage(records, newest)
    scores = _scores(reader, lineage)
    artifact = _artifact(reader, pointer)
    checkpoints, checkpoint_bytes, state = _checkpoints(reader)
    settings = _settings(reader, lineage, job)
    known = settings or {}
    task_name = known.get("dataset.task.name") or known.get("dataset.task.entryPoint")
    task = TASKS.get(task_name) if task_name is not None else _task_of(scores)
    processes, device = _processes(known), known.get("world.device")
    if processes is None and state is not None:
        processes = state.world_size
    notices = [*reader.notices, *_remarks(training, scores, settings)]
    return ComparedRun(
        label=label,
        address=folder.address,
        tuning=_tuning(known, artifact, state),
        task=task,
        task_name=task.name if task is not None else task_name,
        settings=settings,
        inputs=_inputs(records, lineage, known),
        training=training,
        scores=scores,
        artifact=artifact,
        checkpoints=checkpoints,
        checkpoint_bytes=checkpoint_bytes,
        processes=processes,
        on_gpu=device == "GPU" if device is not None else _on_gpu(training),
        job=job,
        notices=tuple(notices[:MOST_NOTICES]),
    )


def _no_run(reader: _Reader) -> str:
    """Return why the folder is no folder of runs, and what to give instead."""
    deeper = {key.rpartition("runs/")[0] for key in reader.objects if re.search(r"/runs/\d{6,18}\.json$", key)}
    if deeper:
        shown = ", ".join(sorted(deeper)[:3])
        return f"has no runs/<run>.json: give the folder of one job, such as {shown}"
    if any(RUN_KEY.fullmatch(key) for key in reader.objects):
        return "has only run records that this version can't read"
    return "has no run: a folder of a job has runs/<run>.json, metrics/, checkpoints/ and evaluation/"


def _lineage(records: Mapping[int, StoredRun], newest: int) -> list[int]:
    """Return ``newest`` and the runs that it grew from, the newest first."""
    found = [newest]
    while (record := records.get(found[-1])) and record.parent is not None and record.parent.run < found[-1]:
        found.append(record.parent.run)
    return found


def _scores(reader: _Reader, lineage: Sequence[int]) -> Scores | None:
    """Return the scores of the newest run that has any."""
    for run in lineage:
        key = evaluation_key(run)
        stored = parse(StoredScores, reader.read(key))
        if stored is None:
            if key in reader.objects:
                reader.notices.append(f"{key} has no scores of this version")
            continue
        found = stored.evaluation
        return Scores(
            rows=found.rows,
            examples=found.examples,
            base=found.base,
            tuned=found.tuned,
            tuned_step=found.tuned_step,
            base_grades=stored.base_grades,
            tuned_grades=stored.tuned_grades,
            answers=pairs_of(stored.base_answers, stored.tuned_answers),
        )
    return None


def _artifact(reader: _Reader, pointer: StoredPointer | None) -> Artifact | None:
    if pointer is None:
        return None
    manifest = parse(StoredManifest, reader.read(f"{pointer.folder}/{MANIFEST}"))
    files = tuple(file.name for file in manifest.files) if manifest is not None else ()
    return Artifact(pointer.bytes, pointer.step, files)


def _checkpoints(reader: _Reader) -> tuple[int, int | None, StoredState | None]:
    """Return the number of committed checkpoints, the size of the newest one, and its training state."""
    folders: dict[tuple[int, int], str] = {}
    for key in reader.objects:
        match = CHECKPOINT_KEY.fullmatch(key)
        if match is not None and match[3] == COMMIT:
            folders[int(match[1]), int(match[2])] = key.rpartition("/")[0]
    if not folders:
        return 0, None, None
    folder = folders[max(folders)]
    manifest = parse(StoredManifest, reader.read(f"{folder}/{MANIFEST}"))
    if manifest is None:
        reader.notices.append(f"{folder}/{MANIFEST} is no manifest of this version")
    state = parse(StoredState, reader.read(f"{folder}/{TRAINER_FILE}"))
    return len(folders), manifest.total_bytes if manifest is not None else None, state


def _settings(reader: _Reader, lineage: Sequence[int], job: JobFacts | None) -> Mapping[str, str] | None:
    """Return the settings of the newest run that stored them, or those that the cluster's job resolves to."""
    for run in lineage:
        key = settings_key(run)
        found = settings_of(reader.read(key))
        if found is not None:
            return found
        if key in reader.objects:
            reader.notices.append(f"{key} has no settings of this version")
    return job.settings if job is not None else None


def _processes(settings: Mapping[str, str]) -> int | None:
    try:
        return int(settings["world.nodes"]) * int(settings["world.processesPerNode"])
    except (KeyError, ValueError):
        return None


def _tuning(settings: Mapping[str, str], artifact: Artifact | None, state: StoredState | None) -> Tuning | None:
    method = settings.get("method")
    if method in set(Tuning):
        return Tuning(method)
    if artifact is not None and "adapter_config.json" in artifact.files:
        return Tuning.LORA
    # The checkpoints of a LoRA run name the base model's weights, which they do not hold.
    if state is not None:
        return Tuning.LORA if state.base_sha256 is not None else Tuning.FULL
    return None


def _task_of(scores: Scores | None) -> Task | None:
    """Return the task whose scores have the names of ``scores``, where only one task has them."""
    model = (scores.tuned or scores.base) if scores is not None else None
    if model is None or not model.scores:
        return None
    fitting = [task for task in TASKS.values() if set(task.score_names) == set(model.scores)]
    return fitting[0] if len(fitting) == 1 else None


def _on_gpu(training: Training) -> bool | None:
    """Return True where a step has a utilisation, which is measured on GPUs only, else None."""
    return True if any(step.mfu is not None for step in training.steps) else None


def _inputs(records: Mapping[int, StoredRun], lineage: Sequence[int], settings: Mapping[str, str]) -> dict[str, str]:
    """Return what identifies the model and the data: digests of the run records, else the addresses in the settings."""
    for run in lineage:
        training = records[run].training if run in records else None
        if training is not None and training.inputs:
            return dict(training.inputs)
    found: dict[str, str] = {}
    for name in ("model", "dataset.train", "dataset.validation", "dataset.test"):
        parts = [f"{key}={value}" for key, value in sorted(settings.items()) if key.startswith(f"{name}.")]
        if parts:
            found[name] = ", ".join(parts)
    return found


def _remarks(training: Training, scores: Scores | None, settings: Mapping[str, str] | None) -> list[str]:
    """Return sentences about what the run has not done, or not told."""
    found = []
    if not training.steps:
        found.append("no step is in the step log yet: a step gets there with the next checkpoint")
    if training.gaps:
        found.append(f"{training.gaps} steps between the first and the last one are in no step log")
    if training.not_finite:
        found.append(f"{len(training.not_finite)} steps had a loss or a gradient that was not finite")
    if scores is None:
        found.append("no model was scored: the job has neither test nor validation rows, or was not scored yet")
    elif scores.tuned is None:
        found.append("the tuned model is not scored yet")
    elif scores.base is None:
        found.append("the base model was not scored")
    if settings is None:
        found.append("its settings are not in the folder, so they can't be compared")
    return found
