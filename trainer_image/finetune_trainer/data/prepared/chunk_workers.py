"""Does work in several processes, which are forked from this one, and returns the results in the order of the work.
`prepared_rows.py` turns chunks of rows into examples with it.

The processes are forked because everything that they need, such as a tokenizer, is in memory already, so that each is
there in milliseconds and takes little memory of its own (`forked_process.py`). Each process has one piece of work at a
time, and waits for the next one. So a process that sends a long result never meets one that sends long work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Generic, TypeVar

from finetune_trainer.pod.errors import OutsideFailure, StopAgreed, first_line
from finetune_trainer.pod.forked_process import ForkedProcess

Item = TypeVar("Item")
Result = TypeVar("Result")
SignOfLife = Callable[[], None]
"""A function that shows the first process that the work goes on."""

IN_FLIGHT = 2
"""How many pieces of work for each process may be begun and not yet returned. A slow piece holds all later results
back, and these would fill the memory without a bound."""
LOOK_SECONDS = 0.2
"""Longest time between two looks at whether the work shall stop."""
FINISH_SECONDS = 5.0
"""How long a process that has no work may take to end by itself, before it is ended."""
SIGN_SECONDS = 1.0
"""Shortest time between two signs of life of a process that works."""
PATIENCE_SECONDS = 600.0
"""Longest time without a sign of life of a process that works. A process that makes examples gives one for each row,
and a row is a matter of milliseconds. The limit is twice that of `template_process.py`, so that a chat template whose
process stands still is named as the cause."""


class WorkerProcessError(RuntimeError):
    """A process failed or was ended, and the reason lies in no row of the job."""


class _Kind(Enum):
    ALIVE = "Nothing, because the work goes on."
    RESULT = "What the work returned."
    OUTSIDE = "The message of an OutsideFailure."
    MEMORY = "Nothing, because the work had no memory left."
    FAILED = "The first line of any other error."


class ChunkWorkers(Generic[Item, Result]):
    """Several processes that do one kind of work. A `with` block around them ends all processes at its end."""

    def __init__(
        self, count: int, work: Callable[[Any, SignOfLife], Result], finish: Callable[[], None] = lambda: None
    ) -> None:
        """Fork ``count`` processes, which must be at least 1. ``work`` is called in them with a value that can be
        pickled, and so must be its result, and with a function ``alive``. Work that may take longer than
        PATIENCE_SECONDS calls ``alive`` again and again. ``finish`` is called in a process before it ends, unless it is
        ended while it works. Raises OutsideFailure if no process can be started."""
        self._workers: list[_Worker] = []
        try:
            for number in range(1, count + 1):
                self._workers.append(
                    _Worker(work, finish, f"{number} of {count}", [each.asking for each in self._workers])
                )
        except OSError as error:
            self.end()
            raise OutsideFailure(f"no process can be started for the rows: {error.strerror}") from error

    def __enter__(self) -> ChunkWorkers[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all processes."""
        self.end()

    @property
    def process_ids(self) -> list[int]:
        """The ids of the processes, which exist until the `with` block ends."""
        return [worker.process for worker in self._workers]

    def end(self) -> None:
        """End all processes: at once those that work, and the others by themselves."""
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.end()

    def results(
        self,
        items: Iterable[Item],
        work_of: Callable[[Item], Any],
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[Item, Result]]:
        """Yield each of ``items`` with the result of its work, in the order of ``items``. ``work_of`` returns the
        argument of the work, and is called when a process can begin the work. At most IN_FLIGHT items for each process
        are taken from ``items`` before their results are yielded.

        Raises StopAgreed when ``stop`` returns True, MemoryError or OutsideFailure if the work raises one, MemoryError
        if the kernel killed a process, OutsideFailure if a process gives no sign of life for PATIENCE_SECONDS, and
        WorkerProcessError if the work raises any other error or a process ends in another way. Errors of ``items`` and
        ``work_of`` are raised as they are.
        """
        source = iter(items)
        idle = deque(self._workers)
        busy: dict[Connection, tuple[_Worker, int]] = {}
        begun: dict[int, Item] = {}
        done: dict[int, Result] = {}
        taken = returned = 0
        is_at_end = False
        while True:
            while idle and not is_at_end and taken - returned < IN_FLIGHT * len(self._workers):
                try:
                    item = next(source)
                except StopIteration:
                    is_at_end = True
                    break
                worker = idle.popleft()
                worker.begin(work_of(item))
                begun[taken], busy[worker.asking] = item, (worker, taken)
                taken += 1
            if returned in done:
                yield begun.pop(returned), done.pop(returned)
                returned += 1
                continue
            if not busy:
                return
            for connection in wait(list(busy), LOOK_SECONDS):
                assert isinstance(connection, Connection)
                worker, number = busy[connection]
                kind, result = worker.answer()
                if kind is _Kind.RESULT:
                    done[number] = result
                    del busy[connection]
                    idle.append(worker)
            for worker, _ in busy.values():
                worker.check()
            if stop():
                raise StopAgreed


class _Worker:
    """A forked process that does one piece of work after the other."""

    def __init__(
        self, work: Callable[[Any, SignOfLife], Any], finish: Callable[[], None], name: str, others: list[Connection]
    ) -> None:
        """Fork this process. ``name`` is the name of the process in messages, and ``others`` are connections of this
        process that the new process must not hold open."""
        self._name = name
        self._is_busy = False
        self._heard = 0.0
        """When this process last heard of the other one, on the monotonic clock."""
        self._forked = ForkedProcess(partial(_work, work, finish), patience=PATIENCE_SECONDS, not_for_it=others)
        self.process, self.asking = self._forked.id, self._forked.connection

    def begin(self, argument: Any) -> None:
        """Let the process work on ``argument``."""
        self._is_busy, self._heard = True, time.monotonic()
        try:
            self.asking.send((argument,))
        except BlockingIOError:
            raise self._stands_still() from None
        except OSError:
            raise self._ended_error() from None

    def answer(self) -> tuple[_Kind, Any]:
        """Return the next answer: a sign of life, or the result of the work that was begun last."""
        try:
            kind, value = self.asking.recv()
        except BlockingIOError:
            raise self._stands_still() from None
        except (EOFError, OSError):
            raise self._ended_error() from None
        self._heard = time.monotonic()
        if kind is _Kind.ALIVE:
            return kind, None
        self._is_busy = False
        if kind is _Kind.RESULT:
            return kind, value
        if kind is _Kind.MEMORY:
            raise MemoryError
        if kind is _Kind.OUTSIDE:
            raise OutsideFailure(value)
        raise WorkerProcessError(f"process {self._name} that tokenises the rows failed: {value}")

    def check(self) -> None:
        """Raise OutsideFailure if the process works and has given no sign of life for too long."""
        if self._is_busy and time.monotonic() - self._heard > PATIENCE_SECONDS and not self.asking.poll():
            raise self._stands_still()

    def _stands_still(self) -> OutsideFailure:
        self.end()
        return OutsideFailure(f"process {self._name} that tokenises the rows stood still for {PATIENCE_SECONDS:.0f} s")

    def _ended_error(self) -> Exception:
        status = self.end()
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        how = f"was ended by {signal.Signals(number).name}" if number else "ended by itself"
        problem = f"process {self._name} that tokenises the rows {how}"
        if number == signal.SIGKILL:
            return MemoryError(f"{problem}, as the kernel does where the pod has no memory left")
        return WorkerProcessError(problem)

    def dismiss(self) -> None:
        """Tell the process to end by itself, if it does not work."""
        if not self._is_busy:
            with contextlib.suppress(OSError):
                self.asking.send(())

    def end(self) -> int:
        """End the process if it still runs, and return its status (man 2 wait). A process that was dismissed gets some
        time to end by itself."""
        return self._forked.end(0.0 if self._is_busy else FINISH_SECONDS)


def _work(work: Callable[[Any, SignOfLife], Any], finish: Callable[[], None], asked: Connection) -> None:
    """Work in the forked process until the first process dismisses it or closes the connection."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    alive = _SignsOfLife(asked)
    with contextlib.suppress(EOFError, OSError):
        while arguments := asked.recv():
            asked.send_bytes(_answer(partial(_worked, work, arguments[0], alive)))
    finish()


class _SignsOfLife:
    """Sends a sign of life to the first process, but not more often than is useful."""

    def __init__(self, asked: Connection) -> None:
        self._asked, self._sent = asked, time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._sent > SIGN_SECONDS:
            self._sent = now
            self._asked.send((_Kind.ALIVE, None))


def _answer(worked: Callable[[], tuple[_Kind, Any]]) -> bytes:
    """Return what the first process gets, in the form of `Connection.send`: the kind of the answer, and its value."""
    try:
        return bytes(ForkingPickler.dumps(worked()))
    except MemoryError:
        return bytes(ForkingPickler.dumps((_Kind.MEMORY, None)))
    except Exception:  # noqa: BLE001  (a value can make multiprocessing raise anything)
        traceback.print_exc()
        return bytes(ForkingPickler.dumps((_Kind.FAILED, "its result can't be sent")))


def _worked(work: Callable[[Any, SignOfLife], Any], argument: Any, alive: SignOfLife) -> tuple[_Kind, Any]:
    try:
        return _Kind.RESULT, work(argument, alive)
    except MemoryError:
        return _Kind.MEMORY, None
    except OutsideFailure as error:
        return _Kind.OUTSIDE, str(error)
    except Exception as error:  # noqa: BLE001  (the first process raises an error with the reason)
        traceback.print_exc()
        return _Kind.FAILED, f"{type(error).__name__}: {first_line(error)}"
