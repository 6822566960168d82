"""Starts Python programs as forks of a process that has already imported torch (`zygote_process.py`).

A forked program starts within a fraction of a second, while a program that imports torch itself needs five seconds of
processor time. Tests that are about the start of a program, for example about a signal during the imports, start an
interpreter instead.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.trainer.objectstore import free_port

END_SECONDS = 120.0
OF_RANKS = {
    "PATH": "/nonexistent",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "DS_ACCELERATOR": "cpu",
}
"""Environment variables of the forking process and of the ranks of `Zygote.start_ranks`. These processes have the
variables of the tests too, except those that are replaced here, such as PATH."""


class Zygote:
    """Sends orders to the process that forks programs, and reads the answers of this process.

    ``Zygote.allowed`` is False while a test runs that has neither the marker `gang` nor `long` (see `conftest.py`).
    """

    allowed = True

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._told = b""
        self._forked: list[Forked] = []

    @property
    def pid(self) -> int:
        """The id of the process, which is the parent of all programs that it forks."""
        return self._process.pid

    def start(self, module: str, arguments: Sequence[str], *, environment: Mapping[str, str], log: Path) -> Forked:
        """Do what `python -m` does with ``module`` and ``arguments``, in a forked process and in the working folder of
        the tests. The process has only the environment variables in ``environment``, and appends its output and its
        errors to the file ``log``.
        """
        assert Zygote.allowed, "the test starts a process of a training, so it needs the marker pytest.mark.gang"
        assert self._process.stdin is not None
        # The caller may read the file before the forked process has opened it.
        log.touch()
        forked = Forked(self, [module, *arguments])
        order = {
            "number": len(self._forked),
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": str(Path.cwd()),
            "log": str(log),
        }
        self._forked.append(forked)
        self._process.stdin.write(f"{json.dumps(order)}\n".encode())
        deadline = time.monotonic() + END_SECONDS
        while not forked.pid:
            assert time.monotonic() < deadline, f"{module} was not forked in {END_SECONDS} s"
            self.listen(1.0)
        return forked

    def listen(self, seconds: float) -> None:
        """Read which programs have started or ended, and note it in their `Forked`. Wait for the next line of the
        forking process for at most ``seconds``."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, seconds))
        if not ready:
            return
        news = os.read(self._process.stdout.fileno(), 65536)
        assert news, "the process that forks programs has ended"
        *lines, self._told = (self._told + news).split(b"\n")
        for line in lines:
            told = json.loads(line)
            forked = self._forked[told["number"]]
            forked.pid = told.get("process", forked.pid)
            forked.returncode = told.get("status")

    def start_ranks(
        self, module: str, arguments: Sequence[Sequence[str]], logs: Path, *, per_node: int = 1
    ) -> list[Forked]:
        """Start one rank for each entry of ``arguments``. The rank runs ``module`` with the arguments in this entry.
        Each node has ``per_node`` ranks.

        The output of a rank goes to the file `rank-<rank>.log` in the folder ``logs``.
        """
        world = {"WORLD_SIZE": str(len(arguments)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [
            self.start(
                module,
                own,
                environment={**os.environ, **OF_RANKS, **world, "RANK": str(rank), "LOCAL_RANK": str(rank % per_node)},
                log=logs / f"rank-{rank}.log",
            )
            for rank, own in enumerate(arguments)
        ]

    def kill(self) -> None:
        """Kill the process and all programs that it has forked."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Forked:
    """A forked program, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, zygote: Zygote, arguments: list[str]) -> None:
        self._zygote, self.args = zygote, arguments
        self.pid = 0
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative after a signal; None while the program runs."""
        if self.returncode is None:
            self._zygote.listen(0.0)
        return self.returncode

    def wait(self, timeout: float = END_SECONDS) -> int:
        """Wait until the program has ended, and return its exit status. Raises TimeoutExpired after ``timeout``
        seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._zygote.listen(deadline - time.monotonic())
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def ends_of(ranks: Sequence[Forked], seconds: float = END_SECONDS) -> list[int]:
    """Wait until all ``ranks`` have ended, and return their exit statuses.

    The status of a rank that a signal killed is the negated number of the signal, for example -9. If ranks still run
    after ``seconds``, they are killed, and AssertionError is raised.
    """
    deadline = time.monotonic() + seconds
    try:
        return [rank.wait(deadline - time.monotonic()) for rank in ranks]
    except subprocess.TimeoutExpired:
        ends = {number: rank.poll() for number, rank in enumerate(ranks)}
        raise AssertionError(f"ranks still run after {seconds} s; these have ended: {ends}") from None
    finally:
        for rank in ranks:
            rank.kill()


@functools.cache
def zygote() -> Zygote:
    """Return the process that forks programs. The first call starts the process, which runs until the tests end."""
    command = [sys.executable, "-m", "tests.trainer.zygote_process"]
    # The process begins a session of its own, and with it a process group, to which all forked programs belong.
    # `Zygote.kill` ends the whole group.
    process = subprocess.Popen(
        command,
        env={**os.environ, **OF_RANKS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    running = Zygote(process)
    atexit.register(running.kill)
    return running
