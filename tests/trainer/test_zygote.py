"""A program that is forked from a process with torch finds the same state at its start, and ends in the same way, as a
program that is started as a new Python process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune_trainer.pod.signals import STOP_SIGNALS
from tests.trainer.process_state import ENDS, WORKER
from tests.trainer.zygote import zygote

MODULE = "tests.trainer.process_state"


@pytest.mark.gang
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("end", ENDS)
def test_a_forked_program_begins_and_ends_as_a_started_one(end: str, unbuffered: str, tmp_path: Path) -> None:
    first, second = started_and_forked(end, unbuffered, tmp_path)
    assert second == first


@pytest.mark.gang
def test_a_worker_of_a_forked_launcher_begins_and_ends_as_a_started_one(tmp_path: Path) -> None:
    first, second = started_and_forked(WORKER, "", tmp_path)
    assert second == first
    assert first.status == 64
    assert first.state is not None
    assert first.state["blocked"] == sorted(STOP_SIGNALS)


@dataclass
class Run:
    """How a run of `process_state.py` ended: its exit status, what it found (``state``), and the last line of its other
    output."""

    status: int | None
    last_line: list[str]
    state: dict[str, object] | None
    """None where the program ended before it wrote out what it had printed."""


def started_and_forked(end: str, unbuffered: str, folder: Path) -> tuple[Run, Run]:
    """Run `process_state.py` once as a started and once as a forked program."""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": unbuffered}
    started, forked = folder / "started", folder / "forked"
    command = [sys.executable, "-m", MODULE, end]
    with started.open("wb") as log:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    program = zygote().start(MODULE, [end], environment=environment, log=forked)
    return run_of(done.returncode, started), run_of(program.wait(), forked)


def run_of(status: int, log: Path) -> Run:
    """Return how a program ended that had the exit status ``status`` and wrote its output into the file ``log``."""
    lines = log.read_text().splitlines()
    states = [line for line in lines if line.startswith("{")]
    assert len(states) <= 1
    # Of a traceback only the last line counts: the first lines show the process that forks programs.
    others = [line for line in lines if line not in states]
    return Run(status, others[-1:], json.loads(states[0]) if states else None)
