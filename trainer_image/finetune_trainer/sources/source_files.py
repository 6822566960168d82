"""What the rest of the trainer sees of the data files of a source, wherever they lie. `data_files.py` and
`hub_datasets.py` implement it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from finetune_trainer.data.files.index import DataFile
from finetune_trainer.data.files.kinds import Kind, kind_of


class SourceFile(NamedTuple):
    """A data file of a source."""

    path: str
    """Key in the bucket, or path in the volume or the repository."""
    name: str
    """Name for messages about the file, for example `s3://bucket/rows/part-1.jsonl`. The name of a source's only file
    is its last part: `train.jsonl`."""
    bytes: int


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

    def fetch_head(self, file: SourceFile, folder: Path, *, most_bytes: int, whole_bytes: int) -> DataFile | None:
        """Return the first ``most_bytes`` bytes of a file as a local file.

        A file whose beginning has no rows of its own is fetched as a whole. None is returned if it has more than
        ``whole_bytes`` bytes.
        """


def has_head(name: str) -> bool:
    """Return whether the beginning of the file called ``name`` has rows of its own. It has none in a parquet file,
    whose schema is at its end."""
    found = kind_of(name)
    return found is not None and found.kind is not Kind.PARQUET


def head_limit(name: str, most_bytes: int, whole_bytes: int) -> int:
    """Return how many bytes of the file called ``name`` are fetched at most."""
    return most_bytes if has_head(name) else whole_bytes
