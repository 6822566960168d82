"""Writes rows as data files of every kind. `row_formats.py` says which format of rows is in which kind of file."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from finetune_trainer.data.files.index import DataFile, write_index
from tests.trainer.row_formats import Made, Row, RowFormat


def write_files(form: RowFormat, folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write rows into data files, and return the paths of the data sources: the sources of a mix, or the one source.
    Several files get about equally many rows each."""
    folder.mkdir(parents=True)
    suffixes = form.file.split(",")
    paths = []
    for number, suffix in enumerate(suffixes):
        paths.append(folder / f"part-{number}{suffix}")
        paths[-1].write_bytes(file_content(paths[-1].suffixes, rows[number :: len(suffixes)]))
    if form.mix or len(paths) == 1:
        return paths
    write_index(folder, [DataFile(path, path.name) for path in paths])
    return [folder]


def shares(form: RowFormat, made: Sequence[Made]) -> Iterator[list[Made]]:
    """Yield the rows of each file that `write_files` writes, in the order of the files."""
    count = len(form.file.split(","))
    yield from (list(made[number::count]) for number in range(count))


def file_content(suffixes: Sequence[str], rows: Sequence[Row]) -> bytes:
    """Return the content of a data file with the rows. ``suffixes`` are those of its name, for example `.csv` and
    `.gz`."""
    kind, *compression = suffixes
    data = _CONTENT[kind](rows)
    if compression == [".gz"]:
        return gzip.compress(data)
    if compression == [".zst"]:
        return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))
    return data


def _delimited(rows: Sequence[Row], delimiter: str) -> bytes:
    """Return a csv or tsv file, in which lists and objects are JSON."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows
    )
    return file.getvalue().encode()


def _parquet(rows: Sequence[Row]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file, row_group_size=4)
    return file.getvalue()


_CONTENT: Mapping[str, Callable[[Sequence[Row]], bytes]] = {
    ".jsonl": lambda rows: "".join(f"{json.dumps(row)}\n" for row in rows).encode(),
    ".json": lambda rows: json.dumps(list(rows)).encode(),
    ".csv": lambda rows: _delimited(rows, ","),
    ".tsv": lambda rows: _delimited(rows, "\t"),
    ".parquet": _parquet,
    ".txt": lambda rows: "".join(f"{row['text']}\n" for row in rows).encode(),
}
