"""The grader of SQL. In this task, the model answers a question about tables with a query. The grader runs the query.

`evaluation/scorer.py` calls `grade` for every generated answer. The queries of model and data set run in a child
process (`sql_child.py`), which judges many answers. Whatever a query does, its grade comes within a few seconds: a
child that takes too long or too much memory is ended, and the next answer gets a new one.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from finetune_core.row_templates import text_or_none
from finetune_core.tasks import SQL
from finetune_trainer.evaluation.graders.grades import Grade

COMMAND = [sys.executable, "-m", "finetune_trainer.evaluation.graders.sql_child"]
GRADE_SECONDS = 4.0
"""Longest time in seconds for judging an answer. An ordinary query takes a tenth of a second at most, so it stays below
the limit even on a machine that is busy with ten other programs."""
START_SECONDS = 120.0
"""Longest time in seconds that a new child process may take to start."""
PROBLEM = "takes too long or too much memory"
"""Problem in the grade if the child process was ended, or ended itself, while it judged an answer. The text follows
`the query` or `the gold row`. It is always the same, so that equal problems can be counted."""
LONGEST_QUERY = 10_000
"""Largest number of characters of a query, as in `sql_sandbox.py`."""
LONGEST_CONTEXT = 1_000_000
"""Largest number of characters of the CREATE TABLE statements of a row."""
READY, REFERENCE_DONE = "ready", "reference done"
"""Lines that `sql_child.py` writes before a grade: the first one when the process has started, and the second one when
the work on the reference query is done."""


def grade(answer: str, row: Mapping[str, object]) -> Grade:
    """Return the grade of ``answer``, which `sql_judge.judge` determines in a child process.

    The answer is wrong if its query takes too long or too much memory. The row can't be used if its tables or its
    reference query take too long or too much memory.
    """
    with _LOCK:
        context, query = (text_or_none(row.get(column)) or "" for column in ("context", "answer"))
        return _JUDGE.grade(answer, context, query)


def close() -> None:
    """End the child process, if there is one. The next call of `grade` starts another one."""
    with _LOCK:
        _JUDGE.close()


class ChildError(Exception):
    """The child process has ended, or did not read or answer a request in time."""


class Judge:
    """Judges answers in a child process. Starts the process at the first answer, and a new one at the next answer if
    the process has ended."""

    def __init__(self, seconds: float = GRADE_SECONDS) -> None:
        """Allow ``seconds`` for judging one answer."""
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._parent = 0
        self._told = b""

    def grade(self, answer: str, context: str, query: str) -> Grade:
        """Return the grade of ``answer``. ``context`` has the CREATE TABLE statements, and ``query`` is the reference
        query.
        """
        if len(context) > LONGEST_CONTEXT or len(query) > LONGEST_QUERY:
            return Grade.left_out("the gold row is too long")
        # The child refuses every query that is longer than LONGEST_QUERY, so the rest of the answer is not sent.
        answer = answer[: LONGEST_QUERY + 1]
        process = self._running_child()
        request = json.dumps([answer, context, query]).encode() + b"\n"
        deadline = time.monotonic() + self._seconds
        at_fault = "reference"
        try:
            self._send(process, request, deadline)
            while (told := self._line(process, deadline)) == REFERENCE_DONE:
                at_fault = "answer"
            return Grade(scores=told["scores"], problem=told["problem"])
        except ChildError:
            self.close()
            if at_fault == "reference":
                return Grade.left_out(f"the gold row {PROBLEM}")
            return Grade.of(SQL, {}, problem=f"the query {PROBLEM}")

    @property
    def process_id(self) -> int | None:
        """Id of the child process. None if there is none."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End the child process, if there is one."""
        process, self._process, self._told = self._process, None, b""
        if process is not None and self._parent == os.getpid():
            process.kill()
            process.communicate()

    def _running_child(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._parent == os.getpid() and self._process.poll() is not None:
            # The child was ended from outside between two answers. The next answer gets a new child, because the end
            # was not its fault.
            self.close()
        # A process that was forked from this one must not use the pipes of its parent's child.
        if self._process is None or self._parent != os.getpid():
            self._told, self._parent = b"", os.getpid()
            self._process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
            os.set_blocking(self._process.stdin.fileno(), False)  # type: ignore[union-attr]
            try:
                self._line(self._process, time.monotonic() + START_SECONDS)
            except ChildError as error:
                self.close()
                raise RuntimeError("the process that runs the queries of the SQL task did not start") from error
        return self._process

    def _send(self, process: subprocess.Popen[bytes], request: bytes, deadline: float) -> None:
        assert process.stdin is not None
        left = memoryview(request)
        while left:
            _, ready, _ = select.select([], [process.stdin], [], max(0.0, deadline - time.monotonic()))
            if not ready or time.monotonic() > deadline:
                raise ChildError
            try:
                left = left[os.write(process.stdin.fileno(), left) :]
            except OSError as error:
                raise ChildError from error

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> Any:
        """Return the next line that the child writes, decoded. Raise ChildError if it does not come in time."""
        assert process.stdout is not None
        while b"\n" not in self._told:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(process.stdout.fileno(), 65536) if ready else b""
            if not piece:
                raise ChildError
            self._told += piece
        line, _, self._told = self._told.partition(b"\n")
        return json.loads(line)


_JUDGE = Judge()
_LOCK = threading.Lock()
