"""Opens data files as streams of bytes or text, decompressed, with limits on what a small file may expand to.

`reader.py` catches `FileProblem` and raises a UserError instead. It also catches `HeadEnded`, and yields no further row
then.
"""

from __future__ import annotations

import gzip
import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from finetune_trainer.data.files.kinds import Compression

BLOCK_BYTES = 1024 * 1024
"""How many bytes of a file are read at once."""
ROW_CHARACTERS = 64 * 1024 * 1024
"""Largest number of characters in one row of a text file, and in one field of a csv file. The limit of a row is half of
this number if Python takes four bytes for each character of the row (see `most_characters`), and in a csv file already
if the row is not ASCII. For csv fields this number replaces Python's own limit, 131,072 characters, which is shorter
than some prompts."""
ROW_BYTES = 256 * 1024 * 1024
"""Largest memory in bytes that the values of one row may take besides their text. Python's objects for empty lists or
short fields take many times as many bytes as the text of these values."""
EXPANDED_BYTES = 256 * 1024 * 1024
LARGEST_EXPANSION = 10_000
"""A compressed file or a parquet file is refused once more than EXPANDED_BYTES bytes of it were decoded, and these are
also more than LARGEST_EXPANSION times the bytes of the file. Rows that all have the same long prompt stay far below
this limit."""
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_WIDE = re.compile("[^\x00-\uffff]")
"""A character that makes Python use four bytes of memory for each character of a text that contains it."""
_BAD_BYTE = re.compile("[\udc80-\udcff]")
"""The characters that the error handler `surrogateescape` puts in the place of bytes that are no UTF-8. Valid UTF-8
never contains these characters."""


class FileProblem(Exception):  # noqa: N818  (the whole file is at fault, and `reader.py` makes the error of it)
    """What is wrong with a file as a whole, as a phrase that follows the name of the file."""


class HeadEnded(Exception):  # noqa: N818
    """A reader has reached the end of a local file that is only the beginning of a data file."""


def check_expansion(decoded: int, size: int) -> None:
    """Raise FileProblem if a file of ``size`` bytes has expanded to ``decoded`` bytes, and this is too much."""
    if decoded > max(EXPANDED_BYTES, LARGEST_EXPANSION * size):
        raise FileProblem(f"has {size} bytes and expands to more than {decoded}: it is not read further")


def most_characters(text: str, most: int) -> int:
    """Return how many characters a row that contains ``text`` may have: ``most``, or half of it if ``text`` has a
    character such as an emoji, which makes each character of the row take four bytes of memory."""
    return most if text.isascii() or _WIDE.search(text) is None else most // 2


@contextmanager
def open_bytes(path: Path, compression: Compression, *, is_head: bool) -> Iterator[BinaryIO]:
    """Open a file and yield its decompressed bytes as a stream, which need not be able to seek. With ``is_head`` the
    file is only the beginning of a longer one, so that its end raises HeadEnded.

    Reading raises FileProblem where the file expands to too much, and whatever the decompressor raises where the file
    is damaged: OSError, EOFError, zlib.error.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        # The end of the raw file itself must raise HeadEnded. Otherwise the readers that use it would take the end of
        # the bytes for the end of the last row.
        raw = cast(BinaryIO, io.BufferedReader(_Head(file) if is_head else file, BLOCK_BYTES))
        if compression is Compression.NONE:
            yield raw
        else:
            yield cast(BinaryIO, io.BufferedReader(_Expanded(_decompressed(raw, compression), size), BLOCK_BYTES))


@contextmanager
def open_text(path: Path, compression: Compression, *, is_head: bool) -> Iterator[TextIO]:
    """Open a file as `open_bytes` does, and yield its text. Line breaks stay as they are, and a byte order mark at the
    beginning is left out.

    A byte that is no UTF-8 becomes half of a surrogate pair, which `bad_byte` finds. So only the row with the byte is
    bad, and not the whole file. Raises FileProblem for UTF-16.
    """
    with open_bytes(path, compression, is_head=is_head) as stream:
        if cast(io.BufferedReader, stream).peek(2)[:2] in _UTF_16_MARKS:
            raise FileProblem("is UTF-16 text: it must be saved as UTF-8")
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        try:
            yield text
        finally:
            text.detach()


@contextmanager
def open_seekable(path: Path, compression: Compression) -> Iterator[Path | BinaryIO]:
    """Yield ``path`` itself if the file is not compressed, else an open temporary file with the decompressed bytes."""
    if compression is Compression.NONE:
        yield path
        return
    with tempfile.TemporaryFile() as whole, open_bytes(path, compression, is_head=False) as stream:
        shutil.copyfileobj(stream, whole, BLOCK_BYTES)
        whole.seek(0)
        yield cast(BinaryIO, whole)


def bad_byte(text: str, start: int = 0, end: int | None = None) -> int | None:
    """Return the number, counted from 1, of the first byte of ``text`` (from `open_text`) that is no UTF-8. Return None
    if there is no such byte. Only the characters from ``start`` up to ``end`` are looked at, and bytes are counted from
    ``start`` on."""
    found = None if text.isascii() else _BAD_BYTE.search(text, start, len(text) if end is None else end)
    return len(text[start : found.start()].encode("utf-8", "surrogatepass")) + 1 if found is not None else None


def _decompressed(raw: BinaryIO, compression: Compression) -> BinaryIO:
    if compression is Compression.GZIP:
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    import pyarrow

    return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))


class _Head(io.RawIOBase):
    """The beginning of a file. Reading beyond it raises HeadEnded."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read bytes into ``buffer`` and return their number. Raises HeadEnded where there are no more."""
        count = self._file.readinto(buffer)
        if not count:
            raise HeadEnded
        return count


class _Expanded(io.RawIOBase):
    """A decompressed stream that counts the bytes that were read from it, and checks the expansion."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self._decoded = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read bytes into ``buffer`` and return their number. Raises FileProblem where there are too many."""
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._decoded += len(data)
        check_expansion(self._decoded, self._size)
        return len(data)
