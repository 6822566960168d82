"""A SIGTERM that reaches the launcher at any line between the end of the downloads and the wait for the workers reaches
the workers, and the launcher knows of one that comes when it waits no more."""

from __future__ import annotations

import linecache
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from finetune_core.contract import Outcome, Result, RunConfig
from finetune_trainer import launcher, processes
from finetune_trainer.pod.outcomes import WorkerExit
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.pod.settings import Paths
from finetune_trainer.pod.signals import STOP_SIGNALS, StopFlag
from finetune_trainer.ranks import gate
from tests.trainer.objectstore import free_port
from tests.trainer.pods import run_config

WORKER = """#!{python} -IS
import signal, sys
sys.exit(143 if signal.sigtimedwait({{signal.SIGTERM}}, 60) else 1)
"""
"""A program in the place of a worker, without the seconds that torch takes to be imported."""
TRACED = {
    function.__code__
    for function in (
        launcher._attempt,
        gate.open_rendezvous.__wrapped__,  # type: ignore[attr-defined]
        processes.worker_environments,
        processes.WorkerProcesses.run,
        processes.WorkerProcesses._start,
        processes._collect_signals.__wrapped__,  # type: ignore[attr-defined]
    )
}
WAIT = processes.WorkerProcesses._wait.__code__


@pytest.fixture
def handlers() -> Iterator[None]:
    """Set the handlers and the wakeup pipe of this process back after the test."""
    pipe = signal.set_wakeup_fd(-1)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.set_wakeup_fd(pipe)


class Tracer:
    """Sends SIGTERM to this process at line ``number`` of the traced functions, counted from 1, or when the launcher
    waits for the workers, whatever comes first."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.lines = 0
        self._sent = self._waits = False

    def __call__(self, frame: FrameType, _event: str, _: Any) -> Any:
        if frame.f_code is WAIT:
            self._waits = True
            self._send()
        return self._line if frame.f_code in TRACED else None

    def _line(self, _frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and not self._waits:
            self.lines += 1
            if self.lines == self._number:
                self._send()
        return self._line

    def _send(self) -> None:
        if not self._sent:
            self._sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_sigterm_at_any_line_before_the_wait_for_the_workers_reaches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    program = tmp_path / "worker"
    program.write_text(WORKER.format(python=sys.executable))
    program.chmod(0o755)
    store: Any = type("Store", (), {"endpoint": "http://127.0.0.1:1"})
    config = RunConfig.model_validate(run_config(store, "told", world__processesPerNode=2))
    exits: list[WorkerExit] = []

    def result(found: list[WorkerExit], **_: Any) -> Result:
        exits.extend(found)
        return Result(outcome=Outcome.STOPPED, message="")

    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(launcher, "_prepare", lambda *_: Inputs(model=tmp_path, train=tmp_path))
    monkeypatch.setattr(launcher, "result_of_pod", result)
    monkeypatch.setattr(launcher, "read_run_file", lambda _: config)
    (tmp_path / "nonce").write_text("nonce")
    paths = Paths(nonce_file=tmp_path / "nonce", scratch=tmp_path / "scratch")
    environment = {
        "FTJ_NAMESPACE": "default",
        "FTJ_NAME": "told",
        "FTJ_UID": "uid",
        "FTJ_ATTEMPT": "1",
        "FTJ_POD_NAME": "told-0",
        "FTJ_POD_UID": "pod-uid",
        "PET_NODE_RANK": "0",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port()),
    }
    lines, number = 1, 0
    while number < lines:
        number += 1
        exits.clear()
        tracer = Tracer(number)
        stop = StopFlag()
        sys.settrace(tracer)
        try:
            launcher._attempt(paths, environment, stop)
        finally:
            sys.settrace(None)
        assert [found.status for found in exits] == [143, 143], f"line {number}"
        lines = max(lines, tracer.lines)
    assert number > 40


class CollectionTracer:
    """Sends SIGTERM to this process at line ``number`` of the collection of signals, counted from 1."""

    CODE = processes._collect_signals.__wrapped__.__code__  # type: ignore[attr-defined]

    def __init__(self, number: int) -> None:
        self._left = number
        self.line = ""
        """The line at which the signal was sent; empty before."""

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code is not self.CODE:
            return None
        if event == "line":
            self._left -= 1
            if self._left == 0:
                self.line = linecache.getline(self.CODE.co_filename, frame.f_lineno).strip()
                os.kill(os.getpid(), signal.SIGTERM)
        return self


def test_a_sigterm_at_any_line_of_the_collection_is_known(handlers: None) -> None:
    """The collection of signals has a pipe of its own. A signal is in this pipe, or the stop flag knows of the signal.
    When the last worker has exited, only a signal that comes before the flag has its own pipe back is told to nobody,
    because nothing is left to stop."""
    untold = []
    number = 0
    while True:
        number += 1
        tracer, stop, told = CollectionTracer(number), StopFlag(), b""
        sys.settrace(tracer)
        try:
            with processes._collect_signals() as received:
                if tracer.line and not stop():
                    told = received()
        finally:
            sys.settrace(None)
        if not tracer.line:
            break
        if not stop() and signal.SIGTERM not in told:
            untold.append(tracer.line)
    assert number > 10
    assert untold == ["signal.set_wakeup_fd(previous_fd, warn_on_full_buffer=False)"]
