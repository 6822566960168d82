"""Runs sections in a process of their own, within their bounds. `__main__.py` calls `run_sections`.

All sections share one process as long as they end by themselves and give their GPU memory back. After any other end the
next section gets a new process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from tests.gpu.catalogue import Section
from tests.gpu.report import READY, End, Line, SectionEnd, from_json

IMPORT_SECONDS = 60.0
"""After this time the import of a section's module is cut off. The first import of torch and transformers on a new
machine reads gigabytes."""
GRACE_SECONDS = 1.0
"""Time that a section has after its bound, in which its process writes the stacks of its threads."""
LEFT_GIB = 1.0
"""A process that still holds more GPU memory than this is replaced, because the peaks of the next section would be
wrong."""
LEAVE_SECONDS = 5.0
DRY_SLACK = 4.0
"""Factor for the bounds in a dry run, because the CPU may be busy with other work."""
PIECE_BYTES = 1 << 16
STANDARD_ERROR = 2
PROGRAM = (sys.executable, "-m", "tests.gpu.section_process")


class SectionProcess:
    """A process that runs sections (`section_process.py`)."""

    def __init__(self, *, dry: bool) -> None:
        """Start the process."""
        self._reading, writing = os.pipe()
        self._process = subprocess.Popen(
            [*PROGRAM, str(writing), str(os.getpid()), *(["--dry"] if dry else [])],
            stdin=subprocess.PIPE,
            # Standard output belongs to the lines of the check.
            stdout=STANDARD_ERROR,
            pass_fds=(writing,),
            # With a session of its own, the process can be killed together with its children.
            start_new_session=True,
            text=True,
        )
        os.close(writing)
        self._unread = b""

    def run(self, section: Section, *, seconds: float, import_seconds: float) -> Iterator[Line]:
        """Import the module of ``section`` within ``import_seconds``, run the section within ``seconds``, and yield its
        lines. The last one is a `SectionEnd`."""
        began = time.monotonic()
        deadline, ready = began + import_seconds, False
        order = {"name": section.name, "module": section.module, "function": section.function, "seconds": seconds}
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            while True:
                text = self._read_line(deadline)
                if text == READY:
                    began, ready = time.monotonic(), True
                    deadline = began + seconds + GRACE_SECONDS
                    continue
                line = from_json(text)
                yield line
                if isinstance(line, SectionEnd):
                    return
        except TimeoutError:
            how, problem = End.CUT, f"took longer than {seconds:.0f} s"
            if not ready:
                problem = f"its import took longer than {import_seconds:.0f} s"
        except (EOFError, OSError):
            self.kill()
            how, problem = End.DIED, f"its process ended with status {self._process.returncode}"
            # At its bound a section writes its stack. Python reads the stack of a thread that goes on, which may end
            # the process.
            if ready and time.monotonic() - began > seconds:
                how, problem = End.CUT, f"took longer than {seconds:.0f} s"
        yield SectionEnd(section.name, how, round(time.monotonic() - began, 1), problem=problem)

    def _read_line(self, deadline: float) -> str:
        """Return the next line from the process. Raises TimeoutError at ``deadline``, and EOFError where the process
        has ended."""
        if time.monotonic() > deadline:
            raise TimeoutError
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            piece = os.read(self._reading, PIECE_BYTES)
            if not piece:
                raise EOFError
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def leave(self) -> None:
        """Let the process end, and kill it where it does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        os.close(self._reading)

    def kill(self) -> None:
        """Kill the process and its children."""
        # Once the process has been waited for, the kernel may give its number to another process.
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def run_sections(
    sections: Sequence[Section], *, dry: bool, seconds: float, write: Callable[[Line], None]
) -> list[Line]:
    """Run ``sections`` in their order within ``seconds`` in all, and return all lines. Each line goes to ``write`` as
    soon as it is known.

    A section for which less time is left than its bound is skipped. In a dry run the bounds are DRY_SLACK times as
    long, and a section gets the time that is left.
    """
    ends_at, slack = time.monotonic() + seconds, DRY_SLACK if dry else 1.0
    lines: list[Line] = []

    def keep(line: Line) -> None:
        lines.append(line)
        write(line)

    process: SectionProcess | None = None
    try:
        for section in sections:
            left = ends_at - time.monotonic()
            if left < (0 if dry else section.seconds):
                keep(SectionEnd(section.name, End.SKIPPED, 0.0, problem=_skipped(left, section)))
                continue
            process = process or SectionProcess(dry=dry)
            end: Line | None = None
            bound, import_bound = (min(slack * each, left) for each in (section.seconds, IMPORT_SECONDS))
            for line in process.run(section, seconds=bound, import_seconds=import_bound):
                keep(line)
                end = line
            if isinstance(end, SectionEnd) and (end.how is not End.DONE or end.left_gib > LEFT_GIB):
                process.kill()
                process.leave()
                process = None
    finally:
        if process is not None:
            process.leave()
    return lines


def _skipped(left: float, section: Section) -> str:
    return f"{max(0.0, left):.0f} s were left, and it may take {section.seconds:.0f} s"
