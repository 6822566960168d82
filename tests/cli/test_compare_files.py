"""`finetune compare` reads the files of the trainer, of other versions, and files that are none of either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from finetune_cli.compare import stored_files
from finetune_cli.compare.compared_run import Tuning, read_run
from finetune_cli.compare.folders import LocalFolder
from finetune_cli.compare.stored_files import STEP_FIELDS, StoredModel, parse, settings_of, steps_of
from finetune_core.contract import EvaluationRecord, RunConfig, ScoreRecord
from finetune_core.contract.same_training import TrainingRecord
from finetune_core.errors import UserError
from finetune_core.layout import ArtifactPointer, Manifest, ManifestFile
from finetune_trainer.storage.checkpoint_folders import TrainerState
from finetune_trainer.storage.evaluation_file import AnswerRecord, EvaluationFile
from finetune_trainer.storage.lineage import ParentRecord, Rollback, RunRecord
from finetune_trainer.storage.step_log import StepRow
from tests.cli.written_runs import (
    Made,
    begin,
    checkpoint,
    evaluate,
    root_of,
    rows_of,
    run_config,
    write_rolled_back,
    write_rows,
    write_run,
)

WRITERS: dict[type[StoredModel], type[BaseModel]] = {
    stored_files.ParentPoint: ParentRecord,
    stored_files.StoredRollback: Rollback,
    stored_files.StoredTraining: TrainingRecord,
    stored_files.StoredRun: RunRecord,
    stored_files.ModelScores: ScoreRecord,
    stored_files.StoredEvaluation: EvaluationRecord,
    stored_files.StoredAnswer: AnswerRecord,
    stored_files.StoredScores: EvaluationFile,
    stored_files.StoredFile: ManifestFile,
    stored_files.StoredManifest: Manifest,
    stored_files.StoredPointer: ArtifactPointer,
    stored_files.StoredState: TrainerState,
}
"""The trainer's model whose files each model of the command reads."""
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=12,
)


def test_each_model_of_the_command_has_fields_of_the_trainers_model_only() -> None:
    assert set(WRITERS) == set(StoredModel.__subclasses__())
    for reader, writer in WRITERS.items():
        assert set(reader.model_fields) <= set(writer.model_fields), reader.__name__
    assert set(STEP_FIELDS) <= {to_camel(name) for name in StepRow.model_fields}


def test_a_row_of_the_step_log_is_read_as_it_was_written() -> None:
    row = rows_of(Made(steps=20))[9]
    steps, bad = steps_of(row.to_json().encode() + b"\n", run=3)
    assert bad == 0
    (step,) = steps
    assert step.run == 3
    for name in STEP_FIELDS:
        field = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
        assert getattr(step, field) == getattr(row, field), name


def test_a_cut_off_line_and_foreign_lines_are_counted_and_left_out() -> None:
    rows = rows_of(Made(steps=3))
    data = "\n".join(
        [rows[0].to_json(), "no JSON", '{"step": -4}', "[1]", "", rows[1].to_json(), rows[2].to_json()[:40]]
    )
    steps, bad = steps_of(data.encode(), run=1)
    assert ([step.step for step in steps], bad) == ([1, 2], 4)


def test_values_that_are_not_finite_are_no_values() -> None:
    values = '"loss": NaN, "learningRate": 1e999, "tokens": 5, "seconds": -Infinity, "mfu": "x", "applied": false'
    line = f'{{"step": 4, {values}}}'
    (step,), bad = steps_of(line.encode(), run=1)
    assert (bad, step.loss, step.learning_rate, step.seconds, step.mfu) == (0, None, None, 0.0, None)
    assert step.is_trained
    assert not step.is_finite


@given(st.binary(max_size=200) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_read_without_an_error(data: bytes) -> None:
    steps_of(data, run=1)
    settings_of(data)
    for model in WRITERS:
        parse(model, data)


@given(st.dictionaries(st.sampled_from([*STEP_FIELDS, "other"]), JSON_VALUES))
def test_any_values_of_a_step_are_read_without_an_error(values: dict[str, Any]) -> None:
    steps, bad = steps_of(json.dumps(values).encode(), run=1)
    assert len(steps) + bad == 1
    for step in steps:
        assert step.step > 0
        assert step.seconds >= 0


def test_settings_are_the_fields_of_the_run_file_by_their_paths() -> None:
    found = settings_of(run_config(Made()).to_json().encode())
    assert found is not None
    assert found["optimization.learningRate"] == "0.0001"
    assert found["dataset.task.name"] == "ViGGO"
    assert found["optimization.gradientCheckpointing"] == "true"


def test_a_password_in_an_address_is_no_setting() -> None:
    document = json.loads(run_config(Made()).to_json())
    document["storage"]["endpoint"] = "https://user:secret@minio.example.com"
    found = settings_of(json.dumps(document).encode())
    assert found is not None
    assert found["storage.endpoint"] == "https://minio.example.com"


def test_a_run_of_the_trainer_is_read_whole(tmp_path: Path) -> None:
    made = Made(method="Full", steps=120)
    run = read_run(LocalFolder(write_run(tmp_path / "run", made)), "run")
    assert (run.tuning, run.task_name, run.processes, run.on_gpu) == (Tuning.FULL, "ViGGO", 2, False)
    assert [step.step for step in run.training.steps] == list(range(1, 121))
    assert run.artifact is not None
    assert run.artifact.bytes == made.artifact_bytes + 2
    assert run.scores is not None
    assert run.scores.tuned is not None
    assert run.scores.tuned.scores["strict"] == made.tuned
    assert len(run.scores.base_grades) == made.rows
    assert run.checkpoint_bytes is not None
    assert run.checkpoint_bytes > 6 * made.artifact_bytes
    assert run.notices == ()


def test_a_resumed_and_rolled_back_run_counts_each_step_once(tmp_path: Path) -> None:
    run = read_run(LocalFolder(write_rolled_back(tmp_path / "run", Made(steps=200))), "run")
    steps = run.training.steps
    assert [step.step for step in steps] == list(range(1, 201))
    assert {step.run for step in steps if step.step <= 60} == {1}
    assert {step.run for step in steps if 60 < step.step <= 100} == {2}
    assert {step.run for step in steps if step.step > 100} == {3}
    assert [(step.run, step.step) for step in run.training.discarded] == [
        *((1, step) for step in range(61, 81)),
        *((2, step) for step in range(101, 151)),
    ]
    assert run.training.restarts == 1
    assert [rollback.skip_to for rollback in run.training.rollbacks] == [158]
    assert run.training.not_finite == ()


def test_a_run_without_an_end_has_notices_and_no_scores(tmp_path: Path) -> None:
    root = root_of(tmp_path / "run")
    begin(root, Made())
    run = read_run(LocalFolder(tmp_path / "run"), "run")
    assert run.training.steps == ()
    assert run.artifact is None
    assert any("no step" in notice for notice in run.notices)
    assert any("no model was scored" in notice for notice in run.notices)


def test_half_written_and_foreign_files_become_notices(tmp_path: Path) -> None:
    made, folder = Made(steps=250), tmp_path / "run"
    write_run(folder, made)
    (folder / "metrics/000001-000002.jsonl").write_bytes(b'{"step": 101, "loss": 0.5, "tok')
    (folder / "evaluation/000001.json").write_text('{"version": 9, "evaluation": 4}')
    (folder / "settings/000001.json").write_text("[]")
    (folder / "ARTIFACT").write_text("{")
    (folder / "runs/000002.json").write_text("not a record")
    (folder / "checkpoints/000001-000000250/manifest.json").write_bytes(b"\xff\xfe")
    (folder / "metrics/notes.txt").write_text("mine")
    (folder / "link").symlink_to("/etc/passwd")
    notices = "\n".join(read_run(LocalFolder(folder), "run").notices)
    for key in (
        "metrics/000001-000002.jsonl",
        "evaluation/000001.json",
        "settings/000001.json",
        "ARTIFACT",
        "runs/000002.json",
        "manifest.json",
    ):
        assert key in notices, key
    assert "100 steps between the first and the last one are in no step log" in notices
    assert "notes.txt" not in notices


def test_an_object_that_is_too_large_is_left_out_with_a_notice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", Made(steps=150))
    with (folder / "metrics/000001-000001.jsonl").open("ab") as file:
        file.truncate(17 << 20)
    run = read_run(LocalFolder(folder), "run")
    assert any("metrics/000001-000001.jsonl is left out: it is larger" in notice for notice in run.notices)
    assert run.training.steps[0].step == 101


def test_files_of_an_older_version_are_compared_without_what_they_lack(tmp_path: Path) -> None:
    folder, made = tmp_path / "run", Made()
    write_run(folder, made)
    (folder / "settings/000001.json").unlink()
    record = json.loads((folder / "runs/000001.json").read_text())
    (folder / "runs/000001.json").write_text(json.dumps({"attempt": 1, "podUid": "p", "future": record}))
    scores = json.loads((folder / "evaluation/000001.json").read_text())
    del scores["baseGrades"], scores["tunedGrades"]
    (folder / "evaluation/000001.json").write_text(json.dumps(scores))
    run = read_run(LocalFolder(folder), "run")
    assert (run.tuning, run.task_name, run.settings, run.inputs) == (Tuning.LORA, "ViGGO", None, {})
    assert run.processes == 2
    assert run.scores is not None
    assert run.scores.tuned_grades == {}
    assert any("settings are not in the folder" in notice for notice in run.notices)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "has no run: a folder of a job has runs/<run>.json"),
        ({"adapter_config.json": "{}"}, "has no run: a folder of a job has runs/<run>.json"),
        ({"runs/000001.json": "{"}, "has only run records that this version can't read"),
        ({"team/job/uid/runs/000001.json": "{}"}, "give the folder of one job, such as team/job/uid/"),
    ],
)
def test_a_folder_without_a_run_is_refused_with_what_it_should_be(
    tmp_path: Path, files: dict[str, str], sentence: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_run(LocalFolder(tmp_path), "run")
    assert str(tmp_path) in str(caught.value)
    assert sentence in str(caught.value)


def test_a_circle_of_parents_ends(tmp_path: Path) -> None:
    folder, made = tmp_path / "run", Made(steps=20)
    root = root_of(folder)
    begin(root, made)
    begin(root, made, 2, ParentRecord(run=1, step=10))
    write_rows(root, 1, rows_of(made, 1, 10))
    write_rows(root, 2, rows_of(made, 11))
    evaluate(root, made, 1, 10)
    checkpoint(root, made, 2, 20)
    record = json.loads((folder / "runs/000001.json").read_text()) | {"parent": {"run": 2, "step": 20}}
    (folder / "runs/000001.json").write_text(json.dumps(record))
    run = read_run(LocalFolder(folder), "run")
    assert [step.step for step in run.training.steps] == list(range(1, 21))
    assert run.scores is not None


def test_the_run_file_keeps_the_fields_that_the_command_reads() -> None:
    document = json.loads(RunConfig.model_validate(run_config(Made())).to_json())
    assert {"nodes", "processesPerNode", "device"} <= document["world"].keys()
    assert {"rank", "alpha"} <= document["lora"].keys()
    assert {"learningRate", "weightDecay", "schedule", "seed"} <= document["optimization"].keys()
