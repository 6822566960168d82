"""The worker processes of a pod: started together, told to stop together, none left behind."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from finetune_core.contract import ExitCode
from finetune_trainer.pod.outcomes import WorkerEnd, read_outcome, read_sign_of_life
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.pod.settings import ALL_LEAVE_SECONDS, PEERS_LEAVE_SECONDS

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
HEARTBEAT_SECONDS = 1.0
"""The longest sleep of the supervision when no signal wakes it."""


def worker_environment(
    environment: Mapping[str, str], plan: WorkerPlan, *, address: str, port: str, threads: int
) -> list[dict[str, str]]:
    """Return the environments of this pod's workers, in the order of local ranks."""
    world = plan.config.world
    base = dict(environment)
    base.setdefault("OMP_NUM_THREADS", str(threads))
    base.setdefault("MKL_NUM_THREADS", base["OMP_NUM_THREADS"])
    base |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(world.processes_per_node),
        "DS_ACCELERATOR": "cuda" if world.device == "GPU" else "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    first = plan.identity.node_rank * world.processes_per_node
    return [{**base, "RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(world.processes_per_node)]


class Workers:
    """The children of PID 1."""

    def __init__(self, folder: Path, *, silence_seconds: float = math.inf) -> None:
        """Workers leave their outcomes in ``folder``, and signs of life at least every ``silence_seconds``."""
        self._folder = folder
        self._silence = silence_seconds
        self._frozen: set[int] = set()
        self._signs: dict[int, tuple[float, float]] = {}
        """Newest sign of life of each rank, and when it was first seen (monotonic)."""
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._killed: set[int] = set()

    def run(
        self, plan: WorkerPlan, environments: Sequence[Mapping[str, str]], *, told: bool = False
    ) -> list[WorkerEnd]:
        """Start one worker per environment, wait for all, and return how they ended, in the order of ranks.

        With ``told`` they are told to stop at once: all that they do is to tell the other pods' workers.
        """
        with _wakeup() as woken:
            self._start(plan, environments)
            if told:
                self._terminate()
            self._wait(woken)
        return [self._end(rank) for rank in sorted(self._children)]

    def _end(self, rank: int) -> WorkerEnd:
        sign = read_sign_of_life(self._folder, rank)
        return WorkerEnd(
            rank,
            self._children[rank].returncode,
            read_outcome(self._folder, rank),
            ended_by_launcher=rank in self._killed,
            frozen=rank in self._frozen,
            last_seen=sign[0] if sign else "",
        )

    def _start(self, plan: WorkerPlan, environments: Sequence[Mapping[str, str]]) -> None:
        path = self._folder / "plan.json"
        path.write_text(plan.to_json())
        # A child inherits the mask: a signal that comes before it can listen waits until it does.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for environment in environments:
                command = [sys.executable, "-m", "finetune_trainer.worker", str(path), str(os.getpid())]
                self._children[int(environment["RANK"])] = subprocess.Popen(command, env=dict(environment))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _terminate(self) -> None:
        for child in self._children.values():
            if child.poll() is None:
                child.terminate()

    def _wait(self, woken: _Woken) -> None:
        """Wait until every worker has ended.

        SIGTERM and SIGINT are passed on. Once a worker has ended, the others get a bounded time to follow; then
        they are killed, because a worker that waits for a dead one waits for its timeout.
        """
        deadline: float | None = None
        while running := [rank for rank, child in self._children.items() if child.poll() is None]:
            ended = [child.returncode for rank, child in self._children.items() if rank not in running]
            if ended and deadline is None:
                failed = any(status not in (0, ExitCode.STOPPED) for status in ended)
                deadline = time.monotonic() + (PEERS_LEAVE_SECONDS if failed else ALL_LEAVE_SECONDS)
            if deadline is not None and time.monotonic() > deadline:
                for rank in running:
                    self._killed.add(rank)
                    self._children[rank].kill()
            self._end_frozen(running)
            if any(number in STOP_SIGNALS for number in woken()):
                self._terminate()

    def _end_frozen(self, running: Sequence[int]) -> None:
        """Kill workers that give no sign of life: a stopped process can't end itself, and holds all others."""
        for rank in running:
            sign = read_sign_of_life(self._folder, rank)
            if sign is None or rank in self._frozen:
                continue
            # How long it has not changed is measured here: the machine's clock may be set meanwhile.
            stamp, since = self._signs.get(rank, (None, 0.0))
            if stamp != sign[1]:
                self._signs[rank] = (sign[1], time.monotonic())
            elif time.monotonic() - since > self._silence:
                self._frozen.add(rank)
                self._children[rank].kill()


@contextlib.contextmanager
def _wakeup() -> Iterator[_Woken]:
    """Collect signals while the block runs: each wakes the supervision through a pipe."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = (*STOP_SIGNALS, signal.SIGCHLD)
    previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
    previous_fd = signal.set_wakeup_fd(writer)
    try:
        yield _Woken(reader)
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


class _Woken:
    """Waits for signals, bounded, and returns their numbers."""

    def __init__(self, reader: int) -> None:
        self._reader = reader

    def __call__(self) -> bytes:
        ready, _, _ = select.select([self._reader], [], [], HEARTBEAT_SECONDS)
        return os.read(self._reader, 64) if ready else b""
