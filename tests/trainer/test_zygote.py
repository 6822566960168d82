"""A program that is forked from a process with torch finds the same at its start, and ends in the same way, as one that
an interpreter starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.process_state import ENDS
from tests.trainer.zygote import zygote

MODULE = "tests.trainer.process_state"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("end", ENDS)
def test_a_forked_program_begins_and_ends_as_a_started_one(end: str, unbuffered: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": unbuffered}
    started, forked = tmp_path / "started", tmp_path / "forked"
    command = [sys.executable, "-m", MODULE, end]
    with started.open("wb") as log:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    program = zygote().start(MODULE, [end], environment=environment, log=forked)
    assert program.wait() == done.returncode
    (first, expected), (second, found) = (parts(log.read_text()) for log in (started, forked))
    assert found == expected
    # The traceback of a forked program has more lines, because the process that forked it is on the stack.
    assert second.splitlines()[-1:] == first.splitlines()[-1:]


def parts(log: str) -> tuple[str, dict[str, object] | None]:
    """Return the text before or behind the state that the program printed, and the state. A program that ends at once
    does not write out what it has printed, unless its output is unbuffered."""
    lines = log.splitlines()
    states = [line for line in lines if line.startswith("{")]
    assert len(states) <= 1
    return "\n".join(line for line in lines if line not in states), json.loads(states[0]) if states else None
