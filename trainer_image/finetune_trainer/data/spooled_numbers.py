"""A list of whole numbers that only grows, and that moves to a temporary file once it is long. `examples.py` collects
token ids in such lists, so that the memory of a large data set is bounded."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

SPOOL_BYTES = 16 * 1024 * 1024
"""As soon as this many bytes of a list are in memory, all of them are written to the file."""


class SpooledNumbers:
    """A growing list of whole numbers of one type."""

    def __init__(self, dtype: type[np.int32] | type[np.int64]) -> None:
        """Make an empty list of numbers of 4 or 8 bytes."""
        self._dtype = np.dtype(dtype)
        self._tail = array("i" if self._dtype.itemsize == 4 else "q")
        self._file: BinaryIO | None = None
        self._written = 0

    def __len__(self) -> int:
        """Return how many numbers the list has."""
        return self._written + len(self._tail)

    def extend(self, numbers: Iterable[int]) -> None:
        """Append ``numbers``. Raises OverflowError for a number that the type can't hold."""
        self._tail.extend(numbers)
        if len(self._tail) * self._tail.itemsize >= SPOOL_BYTES:
            self._write()

    def finish(self) -> npt.NDArray[np.integer]:
        """Return all numbers as an array. If the list never became long enough for the file, the array is in memory.
        Otherwise it is memory-mapped from the file, and the space of the file is freed with the array."""
        if self._file is None:
            return np.array(self._tail, dtype=self._dtype)
        self._write()
        self._file.flush()
        return np.memmap(self._file, dtype=self._dtype, mode="r", shape=(self._written,))

    def _write(self) -> None:
        if self._file is None:
            # The file stays open as long as the list, or the array that `finish` made of it, exists.
            self._file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
        self._file.write(self._tail.tobytes())
        self._written += len(self._tail)
        del self._tail[:]
