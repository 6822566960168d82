"""Folders of runs for the tests of `finetune compare`, written by the trainer's own writers: run records, step logs,
scores, settings, checkpoints and artifacts. The numbers are made up, and equal in every run of the tests.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_core.contract import EvaluationRecord, RunConfig, ScoreRecord
from finetune_core.contract.same_training import TrainingRecord
from finetune_core.layout import Location, Manifest, checkpoint_folder
from finetune_core.tasks import TASKS
from finetune_trainer.storage.artifact import publish
from finetune_trainer.storage.checkpoint_folders import TrainerState
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.commit import commit_folder, upload_files
from finetune_trainer.storage.evaluation_file import AnswerRecord, EvaluationFile, write_evaluation
from finetune_trainer.storage.lineage import ParentRecord, Rollback, RunRecord, claim_run_number
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.run_store import ListedObject, ObjectDigest
from finetune_trainer.storage.settings_file import write_settings
from finetune_trainer.storage.step_log import StepRow, write_segment

TASK = "ViGGO"
GOLD = [{"sentence": f"What is game {index}?", "mr": f"request(name[game {index}])"} for index in range(2)]
"""Rows with stored answers."""
SEGMENT_STEPS = 100
TIME = datetime(2026, 1, 1, tzinfo=UTC)


class FolderStore(Store):
    """A folder on this machine behind the interface of the trainer's client of the object store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, bucket: str, key: str) -> bytes | None:
        path = self.folder / key
        return path.read_bytes() if path.is_file() else None

    def write(self, bucket: str, key: str, data: bytes) -> None:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def create(self, bucket: str, key: str, data: bytes) -> bool:
        if (self.folder / key).exists():
            return self.read(bucket, key) == data
        self.write(bucket, key, data)
        return True

    def upload(self, bucket: str, key: str, path: Path) -> ObjectDigest:
        data = path.read_bytes()
        self.write(bucket, key, data)
        return ObjectDigest(len(data), hashlib.sha256(data).hexdigest())

    def list_objects(self, bucket: str, prefix: str, *, most: int | None = None) -> list[ListedObject]:
        files = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        found = ((path.relative_to(self.folder).as_posix(), path.stat().st_size) for path in files)
        return [ListedObject(key, count, TIME) for key, count in found if key.startswith(prefix)][:most]


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a written run is like."""

    method: str = "LoRA"
    rate: float = 1e-4
    steps: int = 200
    seed: int = 0
    base: float = 0.2
    """Share of right answers of the base model."""
    tuned: float = 0.8
    rows: int = 200
    floor: float = 0.3
    """Loss to which the training comes down."""
    seconds: float = 1.0
    memory: int = 4_000_000_000
    artifact_bytes: int = 40_000
    explodes_at: int | None = None
    """First step of a rise of the loss that lasts for 60 steps."""
    not_finite: Sequence[int] = ()
    """Steps whose loss is not finite."""
    finished: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    """Changes of the run file, as `written` merges them."""
    artifact_file: str = ""
    processes: int = 2
    peak: float = 1.0
    """By which factor the peak of the memory rises with the first checkpoint."""
    overfit: float = 0.1
    """How much the logarithm of the validation perplexity rises over the training, beside its fall."""


def root_of(folder: Path) -> RunRoot:
    """Return ``folder`` as the folder of all runs of a job."""
    folder.mkdir(parents=True, exist_ok=True)
    return RunRoot(FolderStore(folder), Location("bucket", ""))


def run_config(made: Made) -> RunConfig:
    """Return the run file of a run."""
    document: dict[str, Any] = {
        "version": 1,
        "world": {"nodes": made.processes, "processesPerNode": 1, "device": "CPU"},
        "model": {"s3": {"uri": "s3://finetune/models/smollm2-135m"}},
        "dataset": {
            "train": {"s3": {"uri": "s3://finetune/data/train.jsonl"}},
            "test": {"s3": {"uri": "s3://finetune/data/test.jsonl"}},
            "format": {
                "promptCompletion": {"promptField": "sentence", "completionField": "mr", "template": "{prompt}\n"}
            },
            "maxLength": 512,
            "task": {"name": TASK},
        },
        "method": made.method,
        "optimization": {
            "learningRate": made.rate,
            "maxSteps": made.steps,
            "globalBatchSize": 16,
            "microBatchSize": 4,
            "schedule": "Linear",
            "warmupSteps": 10,
            "weightDecay": 0.0,
            "gradientClipping": 1.0,
            "precision": "bf16",
            "gradientCheckpointing": True,
            "seed": 42,
            "zeroStage": 2,
        },
        "evaluation": {"artifactFrom": "Best"},
        "storage": {
            "uri": "s3://finetune/runs",
            "endpoint": "http://minio.storage.svc:9000",
            "region": "us-east-1",
            "checkpointEverySteps": 100,
            "keepLast": 2,
        },
    }
    if made.method == "LoRA":
        document["lora"] = {"rank": 8, "alpha": 16}
    return RunConfig.model_validate(merged(document, made.settings))


def merged(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``document`` with ``changes``: objects are merged, other values replaced."""
    found = dict(document)
    for key, value in changes.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


def rows_of(made: Made, first: int = 1, last: int | None = None, factor: float = 1.0) -> list[StepRow]:
    """Return the rows of the steps ``first`` to ``last``. ``factor`` multiplies the learning rate."""
    source = random.Random(f"{made.seed} {first}")
    found = []
    for step in range(first, (last or made.steps) + 1):
        loss = made.floor + 2.5 * math.exp(-6 * step / made.steps) + source.gauss(0, 0.03)
        if made.explodes_at is not None and made.explodes_at <= step < made.explodes_at + 60:
            loss += 2.5
        bad = step in made.not_finite
        evaluated = step % max(1, made.steps // 10) == 0
        level = made.floor + 2.5 * math.exp(-6 * step / made.steps)
        found.append(
            StepRow(
                step=step,
                epoch=step / 100,
                loss=None if bad else max(0.001, loss),
                learning_rate=factor * made.rate * min(1.0, step / 10),
                gradient_norm=None if bad else abs(source.gauss(1, 0.2)),
                applied=not bad,
                tokens=600,
                real_tokens=2400,
                padded_tokens=3000,
                seconds=made.seconds,
                checkpoint_seconds=0.5 if step % 100 == 1 and step > 1 else 0.0,
                memory_bytes=made.memory // 2,
                memory_peak_bytes=int(made.memory * (made.peak if step > 100 else 1)),
                perplexity=math.exp(level + made.overfit * step / made.steps) if evaluated else None,
            )
        )
    return found


def write_rows(root: RunRoot, run: int, rows: Sequence[StepRow]) -> None:
    """Write ``rows`` as segments of the step log of ``run``."""
    for segment, start in enumerate(range(0, len(rows), SEGMENT_STEPS), 1):
        write_segment(root, run, segment, rows[start : start + SEGMENT_STEPS])


def begin(
    root: RunRoot, made: Made, run: int = 1, parent: ParentRecord | None = None, rollbacks: Sequence[Rollback] = ()
) -> None:
    """Take the run number ``run``, and write the settings of the run."""
    digest = hashlib.sha256(b"rows").hexdigest()
    training = TrainingRecord(settings_sha256=digest, inputs={"model": digest, "dataset.train": digest})
    record = RunRecord(
        attempt=run, pod_uid=f"pod-{run}", uid="u", training=training, parent=parent, rollbacks=list(rollbacks)
    )
    assert claim_run_number(root, run, record)
    write_settings(root, run, run_config(made))


def checkpoint(root: RunRoot, made: Made, run: int, step: int) -> None:
    """Commit a checkpoint."""
    folder = checkpoint_folder(run, step)
    state = TrainerState(
        step=step,
        epoch=0,
        batch_in_epoch=0,
        seed=42,
        updates=step,
        tokens=step * 600,
        world_size=made.processes,
        zero_stage=2,
        rows=1000,
        base_sha256="0" * 64 if made.method == "LoRA" else None,
    )
    scratch = root_scratch(root) / "trainer.json"
    scratch.write_text(state.to_json())
    weights = scratch.with_name("state-000000.safetensors")
    weights.write_bytes(b"\0" * 6 * made.artifact_bytes)
    files = upload_files(root, folder, [weights, scratch])
    commit_folder(root, folder, Manifest(kind="Checkpoint", run=run, step=step, files=files))


def root_scratch(root: RunRoot) -> Path:
    """Return a folder beside the folder of runs for files that are uploaded."""
    store = root.store
    assert isinstance(store, FolderStore)
    folder = store.folder.with_name(f".{store.folder.name}.scratch")
    folder.mkdir(exist_ok=True)
    return folder


def score_record(share: float, rows: int) -> ScoreRecord:
    """Return scores of which ``share`` of the answers is right."""
    scores = dict.fromkeys(TASKS[TASK].score_names, share)
    return ScoreRecord(
        perplexity=4 - 2 * share, all_token_perplexity=9 - share, task_score=share, scores=scores, graded=rows
    )


def grades_of(share: float, rows: int) -> dict[str, float]:
    """Return the grades of single rows, of which the first ``share`` are right."""
    return {f"row-{index:05}": float(index < share * rows) for index in range(rows)}


def evaluate(root: RunRoot, made: Made, run: int, step: int) -> None:
    """Write the scores of base model and tuned model."""
    base, tuned = score_record(made.base, made.rows), score_record(made.tuned, made.rows)
    evaluation = EvaluationRecord(rows="Test", examples=made.rows, base=base, tuned=tuned, tuned_step=step)
    file = EvaluationFile(
        rows_sha256="1" * 64,
        evaluation=evaluation,
        base_answers=[AnswerRecord(answer="no idea", gold=gold, scores={"strict": False}) for gold in GOLD],
        tuned_answers=[AnswerRecord(answer=gold["mr"], gold=gold, scores={"strict": True}) for gold in GOLD],
        base_grades=grades_of(made.base, made.rows),
        tuned_grades=grades_of(made.tuned, made.rows),
    )
    write_evaluation(root, run, file)


def finish(root: RunRoot, made: Made, run: int, step: int) -> None:
    """Write scores, a checkpoint and the artifact of ``run``."""
    evaluate(root, made, run, step)
    checkpoint(root, made, run, step)
    name = made.artifact_file or ("adapter_config.json" if made.method == "LoRA" else "config.json")
    files = [root_scratch(root) / name, root_scratch(root) / "model.safetensors"]
    files[0].write_text("{}")
    files[1].write_bytes(b"\0" * made.artifact_bytes)
    publish(root, run, step, files)


def write_run(folder: Path, made: Made) -> Path:
    """Write a job with one run into ``folder`` and return the folder."""
    root = root_of(folder)
    begin(root, made)
    write_rows(root, 1, rows_of(made))
    if made.finished:
        finish(root, made, 1, made.steps)
    return folder


def write_rolled_back(folder: Path, made: Made) -> Path:
    """Write a job with three runs: the second resumed after a lost pod at step 60, and the third after a rollback from
    step 150 to step 100. Return the folder."""
    root = root_of(folder)
    begin(root, made)
    write_rows(root, 1, rows_of(made, 1, 80))
    begin(root, made, 2, ParentRecord(run=1, step=60))
    write_rows(root, 2, rows_of(made, 61, 150))
    rollback = Rollback(step=100, rate_factor=0.3, skip_from=145, skip_to=158, reason="step 150: the loss jumped to 9")
    begin(root, made, 3, ParentRecord(run=2, step=100), [rollback])
    rows = [
        row.model_copy(update={"loss": None, "gradient_norm": None, "applied": False, "tokens": 0, "real_tokens": 0})
        if 145 <= row.step <= 158
        else row
        for row in rows_of(made, 101, None, factor=0.3)
    ]
    write_rows(root, 3, rows)
    finish(root, made, 3, made.steps)
    return folder
