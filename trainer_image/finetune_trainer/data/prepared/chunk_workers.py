"""Does work in several processes, which are forked from this one, and returns the results in the order of the work.
`prepared_rows.py` turns chunks of rows into examples with it.

The processes are forked because everything that they need, such as a tokenizer, is in memory already, so that each is
there in milliseconds and takes little memory of its own. As `chat/template_process.py`, which forks too, they use no
torch and no thread of the first process. Each process has one piece of work at a time, and waits for the next one. So a
process that sends a long result never meets one that sends long work.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

from finetune_trainer.pod.errors import OutsideFailure, StopAgreed, first_line

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 2
"""How many pieces of work for each process may be begun and not yet returned. A slow piece holds all later results
back, and these would fill the memory without a bound."""
LOOK_SECONDS = 0.2
"""Longest time between two looks at whether the work shall stop."""
FINISH_SECONDS = 5.0
"""How long a process that has no work may take to end by itself, before it is ended."""
_PR_SET_PDEATHSIG = 1


class WorkerProcessError(RuntimeError):
    """A process failed or was ended, and the reason lies in no row of the job."""


class _Kind(Enum):
    RESULT = "What the work returned."
    OUTSIDE = "The message of an OutsideFailure."
    MEMORY = "Nothing, because the work had no memory left."
    FAILED = "The first line of any other error."


class ChunkWorkers(Generic[Item, Result]):
    """Several processes that do one kind of work. A `with` block around them ends all processes at its end."""

    def __init__(self, count: int, work: Callable[[Any], Result], finish: Callable[[], None] = lambda: None) -> None:
        """Fork ``count`` processes, which must be at least 1. ``work`` is called in them with values that can be
        pickled, and so must be its results. ``finish`` is called in a process before it ends, unless it is ended while
        it works. Raises OutsideFailure if no process can be started."""
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
        if the kernel killed a process, and WorkerProcessError if the work raises any other error or a process ends in
        another way. Errors of ``items`` and ``work_of`` are raised as they are.
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
                worker, number = busy.pop(connection)
                done[number] = worker.result()
                idle.append(worker)
            if stop():
                raise StopAgreed


class _Worker:
    """A forked process that does one piece of work after the other."""

    def __init__(
        self, work: Callable[[Any], Any], finish: Callable[[], None], name: str, others: list[Connection]
    ) -> None:
        """Fork this process. ``name`` is the name of the process in messages, and ``others`` are connections of this
        process that the new process must not hold open."""
        self.asking, answering = multiprocessing.Pipe()
        self._name, self._parent = name, os.getpid()
        self._is_busy = self._is_ended = False
        self.process = os.fork()
        if self.process == 0:
            for connection in (self.asking, *others):
                connection.close()
            _run(work, finish, answering, self._parent)
        answering.close()

    def begin(self, argument: Any) -> None:
        """Let the process work on ``argument``."""
        self._is_busy = True
        try:
            self.asking.send((argument,))
        except OSError:
            raise self._ended_error() from None

    def result(self) -> Any:
        """Return the result of the work that was begun last."""
        try:
            kind, value = self.asking.recv()
        except (EOFError, OSError):
            raise self._ended_error() from None
        self._is_busy = False
        if kind is _Kind.RESULT:
            return value
        if kind is _Kind.MEMORY:
            raise MemoryError
        if kind is _Kind.OUTSIDE:
            raise OutsideFailure(value)
        raise WorkerProcessError(f"process {self._name} that tokenises the rows failed: {value}")

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
        if not self._is_busy and not self._is_ended:
            with contextlib.suppress(OSError):
                self.asking.send(())

    def end(self) -> int:
        """End the process if it still runs, and return its status (man 2 wait). A process that was dismissed gets some
        time to end by itself."""
        if self._is_ended or os.getpid() != self._parent:
            return 0
        self._is_ended = True
        if not self._is_busy:
            self.asking.poll(FINISH_SECONDS)  # the process closes its end of the connection
        self.asking.close()
        ended, status = os.waitpid(self.process, os.WNOHANG)
        if not ended:
            # The signal does not change the status of a process that is ending by itself.
            os.kill(self.process, signal.SIGKILL)
            _, status = os.waitpid(self.process, 0)
        return status


def _run(work: Callable[[Any], Any], finish: Callable[[], None], asked: Connection, parent: int) -> NoReturn:
    """Work in the forked process until the first process dismisses it or closes the connection. The forked process ends
    without Python's cleanup, which would clean up what belongs to the first process."""
    try:
        _end_with(parent)
        # The first process only notes a SIGTERM, and its handlers were inherited. It also ends this process itself.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # A search for garbage among the objects of the first process would copy their memory.
        gc.freeze()
        with contextlib.suppress(EOFError, OSError):
            while argument := asked.recv():
                asked.send_bytes(_answer(work, *argument))
        finish()
    finally:
        os._exit(0)


def _end_with(parent: int) -> None:
    """Let the kernel end this process when the thread that forked it ends, for whatever reason (man 2 prctl)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def _answer(work: Callable[[Any], Any], argument: Any) -> bytes:
    """Return what the first process gets, in the form of `Connection.send`: the kind of the answer, and its value."""
    kind, value = _worked(work, argument)
    try:
        return bytes(ForkingPickler.dumps((kind, value)))
    except MemoryError:
        return bytes(ForkingPickler.dumps((_Kind.MEMORY, None)))
    except Exception:  # noqa: BLE001  (a value can make multiprocessing raise anything)
        traceback.print_exc()
        return bytes(ForkingPickler.dumps((_Kind.FAILED, "its result can't be sent")))


def _worked(work: Callable[[Any], Any], argument: Any) -> tuple[_Kind, Any]:
    try:
        return _Kind.RESULT, work(argument)
    except MemoryError:
        return _Kind.MEMORY, None
    except OutsideFailure as error:
        return _Kind.OUTSIDE, str(error)
    except Exception as error:  # noqa: BLE001  (the first process raises an error with the reason)
        traceback.print_exc()
        return _Kind.FAILED, f"{type(error).__name__}: {first_line(error)}"
