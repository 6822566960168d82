"""Parses and renders chat templates in a child process, whose time and memory are limited. `chat_template.py` and
`template_variables.py` make a `TemplateProcess`.

A template is a program of a stranger. No code in the same process can stop it at every point: a single expression such
as `'a' * 10 ** 10` takes all memory, even where Jinja only compiles it, and a signal does not interrupt the
interpreter's own work. The kernel can stop a process at any point, so the template has a process of its own. Whatever
the template does there becomes a text, or a message about the row or about the job.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import resource
import signal
import weakref
from collections.abc import Callable
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from finetune_trainer.pod.errors import OutsideFailure, first_line, library_boundary
from finetune_trainer.pod.forked_process import set_patience

SECONDS = 10.0
"""Processor time in seconds that a template may take. Templates of published models take milliseconds."""
MEMORY_BYTES = 256 << 20
"""Memory in bytes that a template may take. The longest row of a text file (`ROW_CHARACTERS` in `streams.py`) takes at
most half of this memory."""
PATIENCE_SECONDS = 300.0
"""Longest time in seconds that this process waits until the child process takes a question, and for its answer. The
limit is far higher than SECONDS, because other processes may keep the processor busy."""


class TemplateLimitError(Exception):
    """A template has reached a limit. The message is a phrase that follows "the chat template"."""


class _Answer(Enum):
    VALUE = "What the function returned."
    FAILED = "The first line of the error that the function raised."
    MEMORY = "Nothing, because the function had no memory left."


class TemplateProcess:
    """A child process that calls a function which reads or runs templates. The child is forked from this process at the
    first call, and has everything that this process has in memory at that time. If the child has ended, the next call
    forks another one."""

    def __init__(self, function: Callable[..., Any], *, seconds: float) -> None:
        """Prepare calls of ``function``. Each call may take ``seconds`` of processor time."""
        self._function, self._seconds = function, seconds
        self._child: _Child | None = None

    def call(self, *arguments: Any) -> Any:
        """Return what the function returns for ``arguments``. The arguments and the result must be values that can be
        pickled.

        Raises ValueError with the reason if the function fails or ends the child process, TemplateLimitError if it
        reaches a limit, MemoryError if the pod has no memory left, and OutsideFailure if the child process gives no
        answer in time or can't be started.
        """
        # A process that was forked from this one must not ask the child of this one: the answers would get mixed.
        if self._child is None or self._child.parent != os.getpid():
            try:
                self._child = _Child(self._work)
            except OSError as error:
                problem = f"no process can be started for the chat template: {error.strerror}"
                raise OutsideFailure(problem) from error
            weakref.finalize(self, self._child.end)
        try:
            kind, value = self._child.ask(arguments)
        except BlockingIOError:
            self.end()
            problem = f"the process that renders the chat template stood still for {PATIENCE_SECONDS:.0f} s"
            raise OutsideFailure(problem) from None
        except (EOFError, OSError):
            kind, value = _Answer.FAILED, self._why_it_ended()
        if kind is _Answer.VALUE:
            return value
        if kind is _Answer.MEMORY:
            raise TemplateLimitError(f"takes more than {MEMORY_BYTES >> 20} MiB of memory")
        raise ValueError(value)

    def end(self) -> None:
        """End the child process that this process has forked, if there is one. The next call forks another one."""
        if self._child is not None and self._child.parent == os.getpid():
            self._child.end()
            self._child = None

    def _why_it_ended(self) -> str:
        """Return why the child process ended. Raises TemplateLimitError if the child took too much processor time, and
        MemoryError if the pod had no memory left."""
        assert self._child is not None
        child, self._child = self._child, None
        status = child.end()
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if number == signal.SIGPROF:
            raise TemplateLimitError(f"takes more than {self._seconds:.0f} s")
        if number == signal.SIGKILL:
            # Only the kernel kills the child before its answer: when the pod has no memory left, the kernel kills the
            # process that holds most of the memory.
            raise MemoryError
        return f"it ends the process that reads it ({signal.Signals(number).name if number else 'without a signal'})"

    def _work(self, asked: Connection) -> None:
        """Run in the child process: receive arguments from ``asked``, call the function, and send what it returned,
        again and again."""
        most = _data_bytes() + MEMORY_BYTES
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        # The objects that this process shares with its parent are never garbage. A search for garbage among them would
        # copy their memory.
        gc.freeze()
        while True:
            arguments = asked.recv()
            signal.setitimer(signal.ITIMER_PROF, self._seconds)
            try:
                answer = self._answer(arguments)
            except MemoryError as error:
                # Python also raises MemoryError for code that is nested too deeply, with a message.
                answer = (_Answer.FAILED, first_line(error)) if str(error) else (_Answer.MEMORY, None)
            signal.setitimer(signal.ITIMER_PROF, 0)
            asked.send(answer)

    def _answer(self, arguments: tuple[Any, ...]) -> tuple[_Answer, Any]:
        try:
            # A template can raise any exception, and so can Jinja for a text that is no template.
            with library_boundary(lambda error: ValueError(first_line(error))):
                return _Answer.VALUE, self._function(*arguments)
        except ValueError as error:
            return _Answer.FAILED, str(error)


class _Child:
    """A forked process that answers questions."""

    def __init__(self, work: Callable[[Connection], None]) -> None:
        """Fork this process. ``work`` is called in the child with the connection on which the questions arrive."""
        self._asking, answering = multiprocessing.Pipe()
        set_patience(self._asking, PATIENCE_SECONDS)
        self.parent = os.getpid()
        self._process = os.fork()
        if self._process == 0:
            self._asking.close()
            _run(work, answering)
        answering.close()
        self._status: int | None = None

    def ask(self, question: object) -> Any:
        """Return the answer to ``question``. Raises EOFError or OSError if the process ends before it has answered, and
        BlockingIOError if it stands still for PATIENCE_SECONDS."""
        self._asking.send(question)
        return self._asking.recv()

    def end(self) -> int:
        """End the process if it still runs, and return its status (man 2 wait)."""
        if self._status is None and os.getpid() == self.parent:
            self._asking.close()
            ended, self._status = os.waitpid(self._process, os.WNOHANG)
            if not ended:
                # The signal does not change the status of a process that is ending by itself.
                os.kill(self._process, signal.SIGKILL)
                _, self._status = os.waitpid(self._process, 0)
        return self._status or 0


def _run(work: Callable[[Connection], None], asked: Connection) -> NoReturn:
    """Call ``work`` in the child, and end the child without Python's cleanup, because this would clean up what belongs
    to the parent."""
    try:
        work(asked)
    finally:
        os._exit(0)


def _data_bytes() -> int:
    """Return the size in bytes of this process's address space for data, which RLIMIT_DATA limits (man 2 setrlimit)."""
    (kibibytes,) = re.findall(r"^VmData:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kibibytes) << 10
