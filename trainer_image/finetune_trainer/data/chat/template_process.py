"""Reads and runs chat templates in a child process, which may use little time and memory. `chat_template.py` and
`template_variables.py` make a `TemplateProcess`.

A template is a program of a stranger. Nothing inside of a process can stop it everywhere: a single expression such as
`'a' * 10 ** 10` takes all memory, also where Jinja only compiles it, and a signal interrupts no work of the interpreter
itself. The kernel can stop a process at any place, so the template has a process of its own, and whatever it does is a
sentence about its row or about the job.
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

SECONDS = 10.0
"""Processor time in seconds that a template may take. Templates of published models take milliseconds."""
MEMORY_BYTES = 256 << 20
"""Memory in bytes that a template may take. The text of a conversation of the largest size takes a half of it."""
PATIENCE_SECONDS = 300.0
"""Largest time in seconds that the process waits for a template. It is far longer than the processor time that a
template may take, because other processes may keep the processor busy."""


class TemplateLimitError(Exception):
    """A template has reached a limit. The message is a phrase that follows "the chat template"."""


class _Answer(Enum):
    VALUE = "What the function returned."
    FAILED = "The first line of the error that the function raised."
    MEMORY = "Nothing, because the function had no memory left."


class TemplateProcess:
    """A child process that calls a function which reads or runs templates. The process is a fork of this one, made for
    the first call, and has all that this process had then."""

    def __init__(self, function: Callable[..., Any], *, seconds: float) -> None:
        """Call ``function``. A call may take ``seconds`` of processor time."""
        self._function, self._seconds = function, seconds
        self._child: _Child | None = None

    def call(self, *arguments: Any) -> Any:
        """Return what the function returns for ``arguments``. Both must be values that can be pickled.

        Raises ValueError with the reason if the function fails, TemplateLimitError if it reaches a limit,
        MemoryError if the pod has no memory left, and OutsideFailure if the child process stands still or can't be
        started.
        """
        if self._child is None:
            try:
                self._child = _Child(self._work)
            except OSError as error:
                problem = f"no process can be started for the chat template: {error.strerror}"
                raise OutsideFailure(problem) from error
            weakref.finalize(self, self._child.end)
        try:
            kind, value = self._child.ask(arguments)
        except (EOFError, OSError):
            kind, value = _Answer.FAILED, self._why_it_ended()
        if kind is _Answer.VALUE:
            return value
        if kind is _Answer.MEMORY:
            raise TemplateLimitError(f"takes more than {MEMORY_BYTES >> 20} MiB of memory")
        raise ValueError(value)

    def _why_it_ended(self) -> str:
        """Return what ended the child process, as a reason. Raise what `call` raises."""
        assert self._child is not None
        child, self._child = self._child, None
        status = child.end()
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if number == signal.SIGPROF:
            raise TemplateLimitError(f"takes more than {self._seconds:.0f} s")
        if number == signal.SIGKILL:
            # Nobody but the kernel does this, to the process that holds most of the memory of a pod without any left.
            raise MemoryError
        return f"it ends the process that reads it ({signal.Signals(number).name if number else 'without a signal'})"

    def _work(self, asked: Connection) -> None:
        """Answer one question after the other, in the child process."""
        most = _data_bytes() + MEMORY_BYTES
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        # What this process shares with its parent is never garbage, and looking through it would copy it.
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
            # What a template raises, and what Jinja raises for a text that is no template, is not specified.
            with library_boundary(lambda error: ValueError(first_line(error))):
                return _Answer.VALUE, self._function(*arguments)
        except ValueError as error:
            return _Answer.FAILED, str(error)


class _Child:
    """A forked process that answers questions."""

    def __init__(self, work: Callable[[Connection], None]) -> None:
        """Fork this process. ``work`` is called in the child with the connection on which the questions arrive."""
        self._asking, answering = multiprocessing.Pipe()
        self._parent = os.getpid()
        self._process = os.fork()
        if self._process == 0:
            self._asking.close()
            _run(work, answering)
        answering.close()
        self._status: int | None = None

    def ask(self, question: object) -> Any:
        """Return the answer to ``question``. Raises EOFError or OSError if the process ends before it has answered."""
        self._asking.send(question)
        if not self._asking.poll(PATIENCE_SECONDS):
            self.end()
            raise OutsideFailure(f"the process that renders the chat template stood still for {PATIENCE_SECONDS:.0f} s")
        return self._asking.recv()

    def end(self) -> int:
        """End the process if it still runs, and return its status (man 2 wait)."""
        if self._status is None and os.getpid() == self._parent:
            self._asking.close()
            ended, self._status = os.waitpid(self._process, os.WNOHANG)
            if not ended:
                # A process that is about to end by itself keeps its own status.
                os.kill(self._process, signal.SIGKILL)
                _, self._status = os.waitpid(self._process, 0)
        return self._status or 0


def _run(work: Callable[[Connection], None], asked: Connection) -> NoReturn:
    """Call ``work`` in the child, and end the child without the cleanup of Python, which would be that of the
    parent."""
    try:
        work(asked)
    finally:
        os._exit(0)


def _data_bytes() -> int:
    """Return the size in bytes of this process's address space for data, which RLIMIT_DATA limits (man 2 setrlimit)."""
    (kibibytes,) = re.findall(r"^VmData:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kibibytes) << 10
