"""Makes the examples of a data source as `dataset.make_examples` does, with the same examples, notices and errors, in
less time: chunk by chunk, and in several processes.

The processes work on the chunks in any order. What a row becomes depends on the rows before it in one respect only: a
chat template is checked once for each kind of field (`recorded_kinds.py`). A chunk is rendered with the kinds that were
known when its work began. If one of the kinds whose check failed in the chunk is known by the time when all chunks
before it are done, the chunk is rendered once more. So the result is the same with any number of processes.

`node_examples.py` calls `prepare_rows`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, closing
from itertools import islice

import numpy as np
import numpy.typing as npt

from finetune_core.api.dataset import DatasetSpec
from finetune_trainer.data.dataset import LengthLimit, RowOutcome, collect_examples
from finetune_trainer.data.examples import Example, ExampleSet, ExampleWriter
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.formats import TokenizeFunctions
from finetune_trainer.data.prepared.chunk_outcomes import ChunkRenderer, PackedOutcomes
from finetune_trainer.data.prepared.chunk_workers import ChunkWorkers, SignOfLife
from finetune_trainer.data.prepared.recorded_kinds import Kind
from finetune_trainer.data.reader import content_bytes
from finetune_trainer.data.spooled_numbers import SpooledNumbers
from finetune_trainer.pod.errors import StopAgreed

CHUNK_ROWS = 256
CHUNK_BYTES = 1024 * 1024
"""A chunk has at most CHUNK_ROWS rows, and fewer if these have more than about CHUNK_BYTES bytes of text."""
MOST_PROCESSES = 32
"""Largest number of processes that work on rows. The first process, which reads the rows and collects the examples,
could not keep more of them busy."""
MEMORY_BYTES = 1 << 30
"""There is at most one process for each so many bytes of the pod's memory. A process shares most of its memory with the
first one, and needs about a tenth of this for the rows and texts that it works on, and for the process of its chat
template."""


def process_count(cpus: float, memory: int | None = None) -> int:
    """Return the number of processes for `prepare_rows` where ``cpus`` CPUs are free, one of which the first process
    needs. 0 means that the first process does all the work. ``memory`` is the memory limit of the pod in bytes, of
    which each process may need up to MEMORY_BYTES; None means no limit."""
    most = MOST_PROCESSES if memory is None else memory // MEMORY_BYTES
    return max(0, min(int(cpus) - 1, most, MOST_PROCESSES))


@dataclasses.dataclass(frozen=True)
class Origins:
    """The rows from which examples were made."""

    files: Sequence[str]
    """Names of the data files, as in `Row.file`. If the source is a single file, its name is empty."""
    file: npt.NDArray[np.integer]
    """For each example the number of its file in `files`; shape (examples,)."""
    number: npt.NDArray[np.integer]
    """For each example the number of its row (`Row.number`); shape (examples,)."""


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """The examples of a data source, and what was noticed about its rows."""

    examples: ExampleSet
    notices: list[str]
    """The notices of `make_examples`."""
    rows: int
    """Number of rows that were read."""
    origins: Origins


def prepare_rows(
    rows: Iterable[Row],
    source: str,
    field: str,
    dataset: DatasetSpec,
    tokenize: TokenizeFunctions,
    *,
    limit: LengthLimit,
    keep_rows: bool = False,
    processes: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> PreparedRows:
    """Return the examples of ``rows``. All arguments but the last two, and the errors about rows, are those of
    `make_examples`. With a `BatchPieceTokenizer` in ``tokenize``, many texts are tokenised with one call.

    ``processes`` is the number of processes that work beside this one, which reads the rows and collects the examples.
    If it is 0, or if there is only one chunk of rows, this process does all the work, and there are no more processes
    than chunks. Raises StopAgreed soon after ``stop`` returns True, and the errors of `ChunkWorkers.results`.
    """
    work = _Work(ChunkRenderer(dataset, tokenize, limit))
    chunks = chunks_of(rows)
    made = _OriginWriter()
    head = list(islice(chunks, max(2, processes)))
    count = 0

    def outcomes() -> Generator[tuple[Row, RowOutcome], None, None]:
        nonlocal count
        with closing(work.packed_in_order(head, chunks, processes, stop)) as done:
            for chunk, packed in done:
                for row, outcome in zip(chunk.rows, packed.outcomes(), strict=False):
                    made.row = row
                    count += 1
                    yield row, outcome
                if chunk.error is not None:
                    raise chunk.error

    # An error ends the processes at once, and not only when nobody has the error any more.
    with closing(outcomes()) as found:
        examples, notices = collect_examples(found, source, field, dataset, limit=limit, keep_rows=keep_rows, made=made)
    return PreparedRows(examples, notices, count, made.origins())


@dataclasses.dataclass
class Chunk:
    """Rows that follow each other."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    error: Exception | None = None
    """The error that was raised by the reader behind the last of the rows."""


def chunks_of(rows: Iterable[Row]) -> Iterator[Chunk]:
    """Yield ``rows`` in chunks. An error of the iterator ``rows`` is not raised, but is a part of the last chunk,
    because the rows before it may have an error that comes first."""
    chunk, size = Chunk(), 0
    source = iter(rows)
    while True:
        try:
            row = next(source)
        except StopIteration:
            break
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  (raised by `prepare_rows` after the rows before it)
            chunk.error = error
            break
        chunk.rows.append(row)
        size += content_bytes(row.fields)
        if len(chunk.rows) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = Chunk(), 0
    if chunk.rows or chunk.error is not None:
        yield chunk


class _Work:
    """Renders the chunks of a data source, in this process or in others."""

    def __init__(self, render: ChunkRenderer) -> None:
        self._render = render
        self._known: set[Kind] = set()
        """Kinds of fields that the template was seen to render in the chunks that are done."""

    def packed_in_order(
        self, head: Sequence[Chunk], rest: Iterable[Chunk], processes: int, stop: Callable[[], bool]
    ) -> Generator[tuple[Chunk, PackedOutcomes], None, None]:
        """Yield the chunks of ``head`` and then those of ``rest``, each with what its rows become."""
        with ExitStack() as stack:
            done: Iterator[tuple[Chunk, PackedOutcomes]]
            if processes < 1 or len(head) < 2:
                done = self._here([*head], rest, stop)
            else:
                workers = stack.enter_context(
                    ChunkWorkers[Chunk, PackedOutcomes](min(processes, len(head)), self._in_worker, self._render.end)
                )
                done = workers.results(_chained(head, rest), self._asked, stop)
            for chunk, packed in done:
                yield chunk, self._exact(chunk, packed)

    def _here(
        self, head: Sequence[Chunk], rest: Iterable[Chunk], stop: Callable[[], bool]
    ) -> Iterator[tuple[Chunk, PackedOutcomes]]:
        for chunk in _chained(head, rest):
            if stop():
                raise StopAgreed
            yield chunk, self._render(chunk.rows, self._known)

    def _asked(self, chunk: Chunk) -> tuple[list[Row], Set[Kind]]:
        return chunk.rows, frozenset(self._known)

    def _in_worker(self, asked: tuple[list[Row], Set[Kind]], alive: SignOfLife) -> PackedOutcomes:
        return self._render(*asked, alive)

    def _exact(self, chunk: Chunk, packed: PackedOutcomes) -> PackedOutcomes:
        """Return ``packed`` if the chunk would become the same with all kinds that are known now, or else what it
        becomes with them. All chunks before this one must be done."""
        if packed.failed & self._known:
            packed = self._render(chunk.rows, self._known)
        self._known |= packed.found
        return packed


def _chained(head: Sequence[Chunk], rest: Iterable[Chunk]) -> Iterator[Chunk]:
    yield from head
    yield from rest


class _OriginWriter(ExampleWriter):
    """Collects examples, and the row of each."""

    def __init__(self) -> None:
        super().__init__()
        self.row: Row | None = None
        """The row of the examples that are added next."""
        self._files: dict[str, int] = {}
        self._file, self._number = SpooledNumbers(np.int32), SpooledNumbers(np.int64)

    def add(self, example: Example, row: Row | None = None) -> None:
        """Append an example of `self.row`."""
        super().add(example, row)
        if self.row is not None:
            self._file.extend([self._files.setdefault(self.row.file, len(self._files))])
            self._number.extend([self.row.number])

    def origins(self) -> Origins:
        """Return the rows of the examples."""
        return Origins(list(self._files), self._file.finish(), self._number.finish())
