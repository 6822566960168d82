"""A process that imports torch once and then forks the ranks of `many_runs`.

A group of forked ranks starts within a second, and can therefore be started and killed many times. A rank that imports
torch itself needs five seconds. The process reads one JSON line from standard input for each rank to start, and writes
one JSON line with rank and exit status for each rank that has ended.
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
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.trainer.objectstore import free_port

END_SECONDS = 120.0


class Zygote:
    """The test's handle on the process: starts groups of ranks and waits until they have ended."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._told = b""

    def gang(self, plans: Sequence[Path], logs: Path, *, seconds: float = END_SECONDS) -> list[int]:
        """Run one rank for each file in ``plans``, wait until all have ended, and return their exit statuses.

        The status of a rank that a signal killed is the negated number of the signal, for example -9. The output of a
        rank goes to the file `rank-<rank>.log` in the folder ``logs``. After ``seconds`` all ranks that still run are
        killed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        port = free_port()
        for rank, file in enumerate(plans):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": str(len(plans)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            order = {"file": str(file), "environment": environment, "log": str(logs / f"rank-{rank}.log")}
            self._process.stdin.write(f"{json.dumps(order)}\n".encode())
        ends: dict[int, int] = {}
        deadline = time.monotonic() + seconds
        while len(ends) < len(plans):
            while b"\n" not in self._told:
                ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
                if not ready:
                    self.kill()
                    zygote.cache_clear()
                    raise AssertionError(f"ranks still run after {seconds} s; these have ended: {ends}")
                self._told += os.read(self._process.stdout.fileno(), 65536)
            line, _, self._told = self._told.partition(b"\n")
            told = json.loads(line)
            ends[told["rank"]] = told["status"]
        return [ends[rank] for rank in range(len(plans))]

    def kill(self) -> None:
        """Kill the process and all ranks that it has forked."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@functools.cache
def zygote() -> Zygote:
    """Return the process that forks ranks. It is started at the first call and runs until the tests end."""
    environment = {
        **os.environ,
        "PATH": "/nonexistent",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", "tests.trainer.zygote"]
    # The process begins a session, and so a process group, of its own. `kill` ends the whole group, which the ranks
    # belong to.
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
    )
    running = Zygote(process)
    atexit.register(running.kill)
    return running


def _fork(order: dict[str, Any]) -> int:
    """Fork a rank and return its process id."""
    child = os.fork()
    if child:
        return child
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environment"])
    sys.argv = ["many_runs", order["file"]]
    status = 1
    try:
        from tests.trainer import many_runs

        many_runs.main()
        status = 0
    finally:
        # The rank ends with os._exit, so that it leaves the inherited files and buffers of its parent process
        # untouched.
        if status:
            import traceback

            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Fork ranks and report their exits until standard input ends."""
    from finetune_trainer.ranks import process

    process.prepare_environment(Path(tempfile.mkdtemp(prefix="zygote-")))
    import deepspeed  # noqa: F401
    import peft  # noqa: F401

    from tests.trainer import faults  # noqa: F401

    ranks: dict[int, int] = {}
    pending = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.02)
        if ready:
            data = os.read(0, 65536)
            if not data:
                return
            pending += data
            *lines, pending = pending.split(b"\n")
            for line in lines:
                order = json.loads(line)
                ranks[_fork(order)] = int(order["environment"]["RANK"])
        while ranks:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if not ended:
                break
            told = {"rank": ranks.pop(ended), "status": os.waitstatus_to_exitcode(status)}
            os.write(1, f"{json.dumps(told)}\n".encode())


if __name__ == "__main__":
    main()
