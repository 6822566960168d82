"""Checks the first rows of a data file: columns, values, chat template and length in tokens. `preflight/entrypoint.py`
calls `check_rows` for each data file.

The rows pass through the functions that also make the examples of a training run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePosixPath

from finetune_core.api.dataset import DatasetSpec
from finetune_core.api.sources import DataSource, S3Source
from finetune_core.errors import UserError
from finetune_core.layout import parse_uri
from finetune_trainer.data.chat.chat_template import use_chat_template
from finetune_trainer.data.dataset import NoRowsError, check_columns, length_limit, make_examples
from finetune_trainer.data.formats import format_columns
from finetune_trainer.data.prompts import base_prompt_columns
from finetune_trainer.data.reader import DATA_SUFFIXES, Row, content_bytes, first_rows, read_rows
from finetune_trainer.data.tokenizer import model_stop_ids, stop_ids, tokenize_functions
from finetune_trainer.pod.settings import Paths
from finetune_trainer.preflight.model_check import ModelFacts
from finetune_trainer.sources.hub_datasets import fetch_first_file
from finetune_trainer.sources.inputs import data_file, data_token, source_name
from finetune_trainer.storage.client import Store

HEAD_ROWS = 1000
"""Largest number of rows of a data file that are turned into examples."""
HEAD_BYTES = 4 * 1024 * 1024
"""Largest number of bytes that are read of a text file in the object store. What was read of a longer file is cut off
after its last whole row."""
HEAD_CONTENT_BYTES = 8 * 1024 * 1024
"""Largest number of bytes of content in the rows that are turned into examples. The content is limited too, because a
compressed file may hold much content in few bytes."""
LARGEST_HEAD_EXPANSION = 100
"""A data source is refused if its first rows hold at least HEAD_CONTENT_BYTES, and more than this many times the bytes
of its files. Compression makes ordinary text about ten times smaller at best, so a file that expands so much holds the
same bytes again and again."""
WHOLE_FILE_BYTES = 64 * 1024 * 1024
"""Largest file in bytes that is downloaded as a whole. This concerns parquet files, whose schema is at the end, and all
files of the Hugging Face Hub. The rows of a larger file are not checked.
"""


@dataclass(frozen=True)
class FileHead:
    """The beginning of a data file, as a local file or folder."""

    path: Path
    is_whole: bool
    """Whether ``path`` holds all rows of the data source."""


def check_rows(
    dataset: DatasetSpec,
    source: DataSource,
    field: str,
    paths: Paths,
    store: Store,
    folder: Path,
    model: ModelFacts | None,
    *,
    today: date | None = None,
    base_prompt: str | None = None,
) -> list[str]:
    """Check the first rows of ``source``, and return notices for the user, such as how many rows will be skipped.

    ``field`` is the path of the source in the spec, for example `dataset.train`, ``today`` is the date that a chat
    template gets, and ``base_prompt`` is `evaluation.basePrompt`. If ``model`` is None, only the columns
    are checked, because rows can't be tokenized. Raises UserError with file and line for a row that would end the
    training, and OutsideFailure if the source can't be read.
    """
    head = _fetch_head(source, field, paths, store, folder)
    if head is None:
        return [f"{field}: its first row is too far from the beginning to be checked before the training"]
    check_columns(head.path, field, dataset.format, base_prompt_columns(dataset, field, base_prompt))
    if model is None:
        return []
    use_chat_template(model.tokenizer, dataset.format, model.folder)
    ends = stop_ids(model.tokenizer, dataset.format, model_stop_ids(model.folder))
    columns = format_columns(dataset.format)
    found = first_rows(read_rows(head.path, field, columns=columns), most_rows=HEAD_ROWS, most_bytes=HEAD_CONTENT_BYTES)
    rows = list(found)
    _check_expansion(head.path, rows, field)
    try:
        _, notices = make_examples(
            rows,
            source_name(source),
            field,
            dataset,
            tokenize_functions(model.tokenizer, model.added_tokens, ends=ends, today=today),
            limit=length_limit(dataset, model.context),
        )
    except NoRowsError as error:
        if head.is_whole and len(rows) < HEAD_ROWS and _content(rows) < HEAD_CONTENT_BYTES:
            raise
        # This is only a notice, because rows that can be trained on may follow behind the rows that were read.
        return [str(error)]
    return notices


def _check_expansion(path: Path, rows: Sequence[Row], field: str) -> None:
    """Raise UserError if the rows hold much more than the files from which they were read."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix.lower() in DATA_SUFFIXES]
    size, content = sum(file.stat().st_size for file in files), _content(rows)
    if content >= HEAD_CONTENT_BYTES and content > LARGEST_HEAD_EXPANSION * size:
        raise UserError(
            field,
            f"{path.name} has {size} bytes, and its first {len(rows)} rows alone hold {content}: a file that expands to"
            f" more than {LARGEST_HEAD_EXPANSION} times its size is not read",
        )


def _content(rows: Sequence[Row]) -> int:
    return sum(content_bytes(row.fields) for row in rows)


def _fetch_head(source: DataSource, field: str, paths: Paths, store: Store, folder: Path) -> FileHead | None:
    """Fetch the beginning of a data file. Return None if no whole row can be read without downloading too much."""
    if source.s3 is not None:
        return _fetch_object_head(source.s3, field, store, folder)
    if source.hugging_face is not None:
        token = data_token(source.hugging_face, field, paths)
        found = fetch_first_file(source.hugging_face, field, token, folder, most_bytes=WHOLE_FILE_BYTES)
        return FileHead(*found) if found is not None else None
    return FileHead(data_file(source, field, paths, store, folder), is_whole=True)


def _fetch_object_head(source: S3Source, field: str, store: Store, folder: Path) -> FileHead | None:
    location = parse_uri(source.uri)
    is_text = PurePosixPath(location.prefix).suffix.lower() != ".parquet"
    limit = HEAD_BYTES if is_text else WHOLE_FILE_BYTES
    data = store.read_range(location.bucket, location.prefix, 0, limit + 1)
    if data is None:
        raise UserError(f"{field}.s3.uri", f"there is no object {source.uri}")
    is_whole = len(data) <= limit
    if not is_whole:
        data = complete_rows(data, quoted=location.prefix.endswith(".csv")) if is_text else b""
        if not data:
            return None
    folder.mkdir()
    path = folder / PurePosixPath(location.prefix).name
    path.write_bytes(data)
    return FileHead(path, is_whole)


def complete_rows(data: bytes, *, quoted: bool) -> bytes:
    """Return ``data`` up to the end of the last row that is complete, or empty bytes if no row is complete.

    With ``quoted`` (csv), a line break between double quotes belongs to a field. So a line break ends a row only if an
    even number of quotes precedes it.
    """
    end = data.rfind(b"\n") + 1
    quotes = data.count(b'"', 0, end) if quoted else 0
    while end and quotes % 2:
        before = data.rfind(b"\n", 0, end - 1) + 1
        quotes -= data.count(b'"', before, end)
        end = before
    return data[:end]
