"""`finetune metrics` writes the step log in the bucket: the same rows that the trainer itself reads when it resumes, as
CSV, JSON and parquet."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from finetune_cli.bucket.object_store import AccessKey, ObjectStoreReader
from finetune_cli.bucket.step_files import Format, csv_lines, json_lines, write_rows
from finetune_cli.bucket.step_log import columns_of, read_steps
from finetune_cli.commands.metrics_command import format_of
from finetune_core.errors import UserError
from finetune_core.layout import Location, metrics_key, run_key
from finetune_trainer.storage.lineage import ParentRecord, RunRecord
from finetune_trainer.storage.step_log import StepRow, read_history
from tests.cli.test_download import put, spec
from tests.trainer.objectstore import ACCESS_KEY, BUCKET, SECRET_KEY, ObjectStore

RECORDS = {
    1: RunRecord(attempt=1, pod_uid="a"),
    2: RunRecord(attempt=2, pod_uid="b", parent=ParentRecord(run=1, step=4)),
    3: RunRecord(attempt=3, pod_uid="c", parent=ParentRecord(run=1, step=2)),
}
"""Run 2 resumed from step 4 of run 1, and run 3 went back to step 2 of run 1, so that it left run 2 behind."""
STEPS = {1: [(1, 2), (3, 4), (5, 6)], 2: [(5, 7)], 3: [(2, 3), (4, 5)]}
"""For each run, the first and the last step of each file of its step log. Runs 1 and 3 both have a row of step 2."""


def row(run: int, step: int) -> StepRow:
    perplexity = 2.5 if step % 2 == 0 else None
    return StepRow(
        step=step,
        epoch=step / 4,
        loss=run + step / 10,
        learning_rate=1e-4,
        tokens=7,
        seconds=0.5,
        perplexity=perplexity,
    )


@pytest.fixture
def root(store: ObjectStore, tmp_path: Path) -> Location:
    """The folder of a job's runs with three runs."""
    place = Location(BUCKET, f"logged/{tmp_path.name}")
    for run, record in RECORDS.items():
        put(store, place.key(run_key(run)), record.to_json().encode())
        for segment, (first, last) in enumerate(STEPS[run], 1):
            rows = [row(run, step) for step in range(first, last + 1)]
            put(store, place.key(metrics_key(run, segment)), "".join(f"{item.to_json()}\n" for item in rows).encode())
    return place


@pytest.fixture
def source(store: ObjectStore) -> ObjectStoreReader:
    return ObjectStoreReader(spec(store), AccessKey(ACCESS_KEY, SECRET_KEY))


class Bucket:
    """What `read_history` needs of the trainer's `RunRoot`, on the store of the tests."""

    def __init__(self, source: ObjectStoreReader, place: Location) -> None:
        self.source, self.place = source, place

    def list_objects(self, prefix: str) -> list[Any]:
        entries = self.source.entries(self.place.bucket, self.place.key(prefix.rstrip("/")) + "/")
        return [type("Listed", (), {"key": entry.key[len(self.place.key()) + 1 :]}) for entry in entries]

    def read(self, key: str) -> bytes:
        return self.source.read(self.place.bucket, self.place.key(key))


def test_the_rows_are_those_that_the_trainer_resumes_with(source: ObjectStoreReader, root: Location) -> None:
    told: list[str] = []
    rows = read_steps(source, root, every_run=False, progress=told.append)
    bucket: Any = Bucket(source, root)
    history = read_history(bucket, RECORDS, 3, 10**9)
    assert [{name: value for name, value in found.items() if name != "run"} for found in rows] == [
        json.loads(found.to_json()) for found in history
    ]
    assert [(found["run"], found["step"]) for found in rows] == [(1, 1), (3, 2), (3, 3), (3, 4), (3, 5)]
    assert all(file.startswith(root.uri("metrics")) for file in told)


def test_every_run_has_the_branches_that_were_left(source: ObjectStoreReader, root: Location) -> None:
    rows = read_steps(source, root, every_run=True, progress=lambda file: None)
    expected = [(run, step) for run in STEPS for first, last in STEPS[run] for step in range(first, last + 1)]
    assert [(found["run"], found["step"]) for found in rows] == expected


def test_all_formats_have_the_same_figures(source: ObjectStoreReader, root: Location, tmp_path: Path) -> None:
    rows = read_steps(source, root, every_run=False, progress=lambda file: None)
    names = columns_of(rows)
    assert names[:2] == ["run", "step"]
    files = {form: tmp_path / f"steps.{form.value}" for form in Format}
    for form, file in files.items():
        write_rows(rows, form, file)
    assert json.loads(files[Format.JSON].read_text()) == json.loads("\n".join(json_lines(rows))) == rows
    from_csv = list(csv.DictReader(files[Format.CSV].read_text().splitlines()))
    assert csv_lines(rows) == files[Format.CSV].read_text().splitlines()
    table = parquet.read_table(files[Format.PARQUET])
    assert table.column_names == names == list(from_csv[0])
    assert {str(table.schema.field(name).type) for name in ("run", "step", "tokens")} == {"int64"}
    assert {str(table.schema.field(name).type) for name in ("loss", "perplexity", "seconds")} == {"double"}
    assert str(table.schema.field("applied").type) == "bool"
    for stored, text, typed in zip(rows, from_csv, table.to_pylist(), strict=True):
        assert typed == {name: stored.get(name) for name in names}
        assert float(text["loss"]) == stored["loss"]
        assert text["perplexity"] == ("" if stored.get("perplexity") is None else "2.5")
        assert text["applied"] == "true"


def test_columns_of_another_version_are_kept_and_figures_that_are_none_are_absent(
    source: ObjectStoreReader, store: ObjectStore, tmp_path: Path
) -> None:
    place = Location(BUCKET, f"strange/{tmp_path.name}")
    lines = [
        '{"step": 1, "loss": NaN, "flavour": "sweet\\u001b[2J", "big": 1}',
        '{"step": 2, "loss": 1e999, "big": 1' + "0" * 400 + "}",
    ]
    put(store, place.key(metrics_key(1, 1)), "\n".join(lines).encode())
    rows = read_steps(source, place, every_run=False, progress=lambda file: None)
    assert [found["loss"] for found in rows] == [None, None]
    assert columns_of(rows) == ["run", "step", "loss", "flavour", "big"]
    for form in Format:
        write_rows(rows, form, tmp_path / f"x.{form.value}")
    table = parquet.read_table(tmp_path / "x.parquet")
    assert str(table.schema.field("big").type) == "string"
    assert math.isclose(float(table["big"].to_pylist()[0]), 1)
    assert "\x1b" not in (tmp_path / "x.json").read_text()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "is no row of a step log; the file was changed or is cut off"),
        (b"[1]", "has no whole number as its `step`"),
        (b'{"step": true}', "has no whole number as its `step`"),
        (b'{"step": 1, "loss": [1]}', "`loss` is neither a number nor a text"),
        (b'{"step": ' + b"9" * 5000 + b"}", "is no row of a step log"),
        (b"\xff\xfe", "is no row of a step log"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(
    source: ObjectStoreReader, store: ObjectStore, tmp_path: Path, content: bytes, problem: str
) -> None:
    place = Location(BUCKET, f"damaged/{tmp_path.name}")
    put(store, place.key(metrics_key(1, 1)), b'{"step": 1}\n\n' + content + b"\n")
    with pytest.raises(UserError, match=r"metrics/000001-000001\.jsonl:3: ") as error:
        read_steps(source, place, every_run=False, progress=lambda file: None)
    assert problem in str(error.value)


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"parent": {"run": "x", "step": 1}}', b'{"parent": 7}'])
def test_a_damaged_record_says_how_to_do_without(
    source: ObjectStoreReader, store: ObjectStore, tmp_path: Path, record: bytes
) -> None:
    place = Location(BUCKET, f"record/{tmp_path.name}")
    put(store, place.key(metrics_key(1, 1)), b'{"step": 1}\n')
    put(store, place.key(run_key(1)), record)
    with pytest.raises(UserError, match="--every-run"):
        read_steps(source, place, every_run=False, progress=lambda file: None)
    assert len(read_steps(source, place, every_run=True, progress=lambda file: None)) == 1


def test_a_job_without_a_step_log_says_when_one_comes(source: ObjectStoreReader, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no step log yet; the trainer writes its first rows with the first check"):
        read_steps(source, Location(BUCKET, f"none/{tmp_path.name}"), every_run=False, progress=lambda file: None)


def test_the_format_follows_from_option_or_name() -> None:
    assert format_of(None, None) is Format.CSV
    assert format_of("json", None) is Format.JSON
    assert format_of(None, Path("a.PARQUET")) is Format.PARQUET
    assert format_of("csv", Path("a.txt")) is Format.CSV
    with pytest.raises(UserError, match=r"--to: must end in one of \.csv, \.json, \.parquet"):
        format_of(None, Path("a.txt"))
    with pytest.raises(UserError, match="needs a file"):
        format_of("parquet", None)


def test_a_file_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "no" / "file.csv"):
        with pytest.raises(UserError, match="cannot be written"):
            write_rows([{"run": 1, "step": 1}], Format.CSV, target)
    assert list(tmp_path.iterdir()) == []
