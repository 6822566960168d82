"""The interface `DataFiles`, through which the rest of the trainer lists and fetches the data files of a source.
`data_files.py` implements it for the object store and for volumes, and `hub_datasets.py` for the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from finetune_trainer.data.files.index import DataFile
from finetune_trainer.data.files.kinds import Compression, Kind, kind_of
from finetune_trainer.sources.parquet_heads import Read, fetch_parquet_head


class SourceFile(NamedTuple):
    """A data file of a source."""

    path: str
    """Key in the bucket, or path in the volume or the repository."""
    name: str
    """Name for messages about the file, for example `s3://bucket/rows/part-1.jsonl`. If the source names
    the path of one file in the object store or on a volume, and no folder or glob, the name is only the last part of
    this path: `train.jsonl`."""
    bytes: int


@dataclass(frozen=True)
class HeadLimits:
    """How much of a file is fetched for a check of its first rows."""

    text_bytes: int
    """Largest number of bytes from the beginning of a text file, compressed or not, that are kept as the local file.
    One byte more is fetched, to find out whether the file is longer."""
    whole_bytes: int
    """Largest size in bytes of a parquet file that is fetched as a whole. Of a larger parquet file, the schema and the
    first row group are fetched, each only if it has no more bytes than this."""
    columns: Collection[str]
    """The columns that are fetched of a parquet file with more than `whole_bytes` bytes. All columns of other files are
    fetched."""


class DataFiles(Protocol):
    """The data files of one source."""

    @property
    def files(self) -> Sequence[SourceFile]:
        """The files, in the order in which their rows are read."""

    @property
    def notices(self) -> Sequence[str]:
        """Sentences for users, such as which files are left out."""

    def tag(self, file: SourceFile) -> str:
        """Return a text that differs where the content of the file differs."""

    def fetch(self, files: Sequence[SourceFile], folder: Path) -> list[DataFile]:
        """Return the local files of ``files``. What is not on a volume is downloaded into the existing ``folder``."""

    def fetch_head(self, file: SourceFile, folder: Path, limits: HeadLimits) -> DataFile | None:
        """Return the beginning of a file as a local file. None is returned if nothing of the file can be read without
        fetching more than ``limits`` allow."""


def fetch_head_by_ranges(file: SourceFile, local: DataFile, limits: HeadLimits, read: Read) -> DataFile | None:
    """Write the beginning of ``file`` to the local file ``local``. Return ``local`` with `is_head` and `has_rows` as
    they are after the fetch, or None where `DataFiles.fetch_head` returns None. ``read`` returns ranges of the bytes of
    ``file``."""
    kind = kind_of(file.name)
    is_parquet = kind is not None and kind.kind is Kind.PARQUET
    limit = limits.whole_bytes if is_parquet else limits.text_bytes
    if not is_parquet or file.bytes <= limit:
        # The byte behind the limit shows whether the file is longer, even where a store does not state the file's size.
        data = read(0, limit + 1)
        if is_parquet and len(data) > limit:
            return None
        local.path.write_bytes(data[:limit])
        return local._replace(is_head=len(data) > limit)
    if kind is None or kind.compression is not Compression.NONE:
        return None
    has_schema, has_rows = fetch_parquet_head(
        read, file.bytes, local.path, columns=limits.columns, most_bytes=limits.whole_bytes
    )
    return local._replace(is_head=True, has_rows=has_rows) if has_schema else None
