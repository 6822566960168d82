"""Checks the first rows of a data source: columns, values, chat template and length in tokens.
`preflight/entrypoint.py` calls `check_rows` for each data source.

The rows pass through the functions that also make the examples of a training run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from finetune_core.api.dataset import DatasetSpec
from finetune_core.api.sources import DataSource
from finetune_core.errors import UserError
from finetune_trainer.data.chat.chat_template import use_chat_template
from finetune_trainer.data.dataset import NoRowsError, check_columns, columns_read, length_limit, make_examples
from finetune_trainer.data.examples import graded_fields
from finetune_trainer.data.files.index import DataFile, write_index
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.prompts import answer_reader, base_prompt_columns
from finetune_trainer.data.reader import content_bytes, first_rows, read_rows
from finetune_trainer.data.tokenizer import model_stop_ids, stop_ids, tokenize_functions
from finetune_trainer.pod.settings import Paths
from finetune_trainer.preflight.model_check import ModelFacts
from finetune_trainer.preflight.preview import write_first_examples
from finetune_trainer.preflight.task_check import TaskCheck
from finetune_trainer.sources.data_files import find_data_files
from finetune_trainer.sources.inputs import source_name
from finetune_trainer.sources.source_files import DataFiles, HeadLimits
from finetune_trainer.storage.client import Store

HEAD_ROWS = 1000
"""Largest number of rows of a data source that are turned into examples."""
HEAD_BYTES = 4 * 1024 * 1024
"""Once the local files of a data source have this many bytes together, no further file is fetched. If a text file has
more bytes than are left of this number, only those of its rows are read that end within the bytes left."""
HEAD_CONTENT_BYTES = 8 * 1024 * 1024
"""Once the rows that are turned into examples hold this many bytes of content together, no further row is read. The
content is limited too, because a compressed file may hold much content in few bytes."""
LARGEST_HEAD_EXPANSION = 100
"""A data source is refused if its first rows hold at least HEAD_CONTENT_BYTES, and more than this many times the bytes
of the local files from which they were read. Compression makes ordinary text about ten times smaller at best, so a file
that expands so much holds the same bytes again and again."""
WHOLE_FILE_BYTES = 64 * 1024 * 1024
"""Largest size in bytes of a parquet file that is downloaded as a whole. From a larger file only two parts are
downloaded: the schema, and of the first row group those columns that the job reads. A part with more bytes than this
number is left out."""


MOST_HEADS = 8
"""Largest number of files of a data source whose first rows are checked."""


@dataclass(frozen=True)
class SourceHead:
    """The beginning of a data source, as local files."""

    path: Path
    """Folder with the index of the files, for `read_rows`."""
    is_whole: bool
    """Whether ``path`` holds all rows of the data source."""
    bytes: int
    """Size of the local files in bytes."""
    has_schema: bool
    """Whether one of the local files is the schema of a parquet file without its rows. The columns are then known even
    if no row could be read."""


def check_rows(
    dataset: DatasetSpec,
    source: DataSource,
    field: str,
    paths: Paths,
    store: Store,
    folder: Path,
    model: ModelFacts | None,
    task: TaskCheck | None = None,
    *,
    today: date | None = None,
    base_prompt: str | None = None,
    measured: Callable[[int], None] = lambda _: None,
    has_tokens: Callable[[int], None] = lambda _: None,
    first_examples: Path | None = None,
) -> list[str]:
    """Check the first rows of ``source``, and return notices for the user, such as how many rows will be skipped.

    ``field`` is the path of the source in the spec, for example `dataset.train`, ``today`` is the date that a chat
    template gets, and ``base_prompt`` is `evaluation.basePrompt`. If ``model`` is None, only the columns are checked,
    because rows can't be tokenized. ``task`` is None where the job's grader can't be loaded. ``measured`` is called
    with the size of all data files of the source in bytes, and ``has_tokens`` with the number of tokens of the longest
    example that the checked rows became. ``first_examples`` is a file into which the first examples are written as
    text; None for no file.

    Raises UserError with file and line for a row that would end the training, and OutsideFailure if the source can't be
    read.
    """
    folder.mkdir()
    files = find_data_files(source, field, paths, store, folder)
    measured(sum(file.bytes for file in files.files))
    asked = base_prompt_columns(dataset, field, base_prompt)
    named = [*asked, *(task.columns(field) if task is not None else ())]
    columns = columns_read(dataset, field, base_prompt, task.columns_read if task is not None else ())
    head = _fetch_head(files, folder, columns)
    if head is None:
        return [*files.notices, f"{field}: its first file is too large to be checked before the training"]
    if not head.is_whole and next(read_rows(head.path, field, columns=columns), None) is None:
        if head.has_schema:
            check_columns(head.path, field, dataset.format, named)
        sentence = f"{field}: its first row is too far from the beginning to be checked before the training"
        return [*files.notices, sentence]
    check_columns(head.path, field, dataset.format, named)
    if model is None:
        return list(files.notices)
    use_chat_template(model.tokenizer, dataset.format, model.folder)
    ends = stop_ids(model.tokenizer, dataset.format, model_stop_ids(model.folder))
    found = first_rows(read_rows(head.path, field, columns=columns), most_rows=HEAD_ROWS, most_bytes=HEAD_CONTENT_BYTES)
    rows = list(found)
    _check_expansion(head, source_name(source), rows, field)
    tokenize = tokenize_functions(model.tokenizer, model.added_tokens, ends=ends, today=today)
    limit = length_limit(dataset, model.context, model.rows)
    if first_examples is not None:
        write_first_examples(first_examples, rows, source_name(source), dataset, tokenize, limit, model)
    try:
        examples, notices = make_examples(
            rows, source_name(source), field, dataset, tokenize, limit=limit, keep_rows=task is not None
        )
    except NoRowsError as error:
        if head.is_whole and len(rows) < HEAD_ROWS and _content(rows) < HEAD_CONTENT_BYTES:
            raise
        # This is only a notice, because rows that can be trained on may follow behind the rows that were read.
        return [*files.notices, str(error)]
    has_tokens(max(examples.lengths))
    form = dataset.format.prompt_completion
    if task is not None and form is not None:
        whole = head.is_whole and len(rows) < HEAD_ROWS and _content(rows) < HEAD_CONTENT_BYTES
        graded = [graded_fields(row) for row in examples.rows]
        read_completion = answer_reader(form, model.tokenizer, model.added_tokens, ends)
        notices += task.notices(field, graded, read_completion, whole=whole)
    return [*files.notices, *notices]


def _check_expansion(head: SourceHead, name: str, rows: Sequence[Row], field: str) -> None:
    """Raise UserError if the rows hold much more than the files from which they were read."""
    content = _content(rows)
    if content >= HEAD_CONTENT_BYTES and content > LARGEST_HEAD_EXPANSION * head.bytes:
        raise UserError(
            field,
            f"{name} has {head.bytes} bytes, and its first {len(rows)} rows alone hold {content}: a file that expands"
            f" to more than {LARGEST_HEAD_EXPANSION} times its size is not read",
        )


def _content(rows: Sequence[Row]) -> int:
    return sum(content_bytes(row.fields) for row in rows)


def _fetch_head(files: DataFiles, folder: Path, columns: Collection[str]) -> SourceHead | None:
    """Fetch the beginning of a data source: at most MOST_HEADS of its first files, until HEAD_BYTES bytes are fetched
    or a file is fetched only in part. Return None if not even the first file can be read without downloading too
    much."""
    heads: list[DataFile] = []
    left = HEAD_BYTES
    for file in files.files[:MOST_HEADS]:
        head = files.fetch_head(file, folder, HeadLimits(left, WHOLE_FILE_BYTES, columns))
        if head is None:
            break
        heads.append(head)
        left -= head.path.stat().st_size
        if head.is_head or left <= 0:
            break
    if not heads:
        return None
    write_index(folder, heads)
    is_whole = len(heads) == len(files.files) and not heads[-1].is_head
    has_schema = any(not head.has_rows for head in heads)
    return SourceHead(folder, is_whole, sum(head.path.stat().st_size for head in heads), has_schema)
