"""Checks the first rows of a data file as the trainer will read all of them: columns, fields, template, length."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from finetune_core.api.dataset import DatasetSpec
from finetune_core.api.sources import DataSource, S3Source
from finetune_core.errors import UserError
from finetune_core.layout import parse_uri
from finetune_trainer.data.dataset import NoRowsError, check_columns, limit_of, make_examples
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import tokenize_with
from finetune_trainer.pod.settings import Paths
from finetune_trainer.preflight.model_check import ModelFacts
from finetune_trainer.sources.hub_data import fetch_first_file
from finetune_trainer.sources.inputs import data_file, data_token, source_name
from finetune_trainer.storage.client import Store

SAMPLE_ROWS = 1000
SAMPLE_BYTES = 4 * 1024 * 1024
"""Read of a text file in the store; a shorter one is read whole."""
WHOLE_BYTES = 64 * 1024 * 1024
"""Largest file that is fetched whole for its first rows: parquet describes its columns at its end, and the hub's
files are fetched whole."""


@dataclass(frozen=True)
class Sample:
    """The beginning of a data file on this machine."""

    path: Path
    is_whole: bool


def check_rows(
    dataset: DatasetSpec,
    source: DataSource,
    name: str,
    paths: Paths,
    store: Store,
    folder: Path,
    model: ModelFacts | None,
) -> list[str]:
    """Check the first rows of ``source``; return what a person may want to know of them.

    ``name`` is the source's field path. Without a ``model`` rows can't become tokens, and only columns are checked.
    Raises UserError with file and row for what would end the training, OutsideFailure where the source can't be read.
    """
    sample = _sample(source, name, paths, store, folder)
    if sample is None:
        return [f"{name}: its first row is too far from the beginning to be checked before the training"]
    check_columns(sample.path, name, dataset.format)
    if model is None:
        return []
    rows = list(islice(read_rows(sample.path, name), SAMPLE_ROWS))
    try:
        _, notices = make_examples(
            rows,
            source_name(source),
            name,
            dataset,
            tokenize_with(model.tokenizer),
            limit=limit_of(dataset, model.context),
        )
    except NoRowsError as error:
        if sample.is_whole and len(rows) < SAMPLE_ROWS:
            raise
        # Rows to learn from may follow.
        return [str(error)]
    return notices


def _sample(source: DataSource, name: str, paths: Paths, store: Store, folder: Path) -> Sample | None:
    """Bring the beginning of a data file here; None where nothing can be told from a beginning."""
    if source.s3 is not None:
        return _stored_sample(source.s3, name, store, folder)
    if source.hugging_face is not None:
        token = data_token(source.hugging_face, name, paths)
        found = fetch_first_file(source.hugging_face, name, token, folder, most_bytes=WHOLE_BYTES)
        return Sample(*found) if found is not None else None
    return Sample(data_file(source, name, paths, store, folder), is_whole=True)


def _stored_sample(source: S3Source, name: str, store: Store, folder: Path) -> Sample | None:
    location = parse_uri(source.uri)
    is_text = PurePosixPath(location.prefix).suffix.lower() != ".parquet"
    limit = SAMPLE_BYTES if is_text else WHOLE_BYTES
    data = store.read_range(location.bucket, location.prefix, 0, limit + 1)
    if data is None:
        raise UserError(f"{name}.s3.uri", f"there is no object {source.uri}")
    is_whole = len(data) <= limit
    if not is_whole:
        data = whole_rows(data, quoted=location.prefix.endswith(".csv")) if is_text else b""
        if not data:
            return None
    folder.mkdir()
    path = folder / PurePosixPath(location.prefix).name
    path.write_bytes(data)
    return Sample(path, is_whole)


def whole_rows(data: bytes, *, quoted: bool) -> bytes:
    """Return ``data`` up to the end of its last whole row; empty where no row ends in it.

    Where fields are ``quoted`` they may hold line breaks; a row ends at one that an even number of quotes precedes.
    """
    end = data.rfind(b"\n") + 1
    quotes = data.count(b'"', 0, end) if quoted else 0
    while end and quotes % 2:
        before = data.rfind(b"\n", 0, end - 1) + 1
        quotes -= data.count(b'"', before, end)
        end = before
    return data[:end]
