"""Starts the worker processes of a pod, one per GPU or CPU rank, forwards SIGTERM to them, and waits until all of them
have exited. `launcher.py` calls this module.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from finetune_core.contract import ExitCode, Outcome, Result
from finetune_trainer.pod.outcomes import WorkerExit, WorkerOutcome, read_heartbeat, read_outcome
from finetune_trainer.pod.plan import WorkerPlan, rendezvous_nonce
from finetune_trainer.pod.settings import ALL_LEAVE_SECONDS, PEERS_LEAVE_SECONDS
from finetune_trainer.pod.signals import STOP_SIGNALS
from finetune_trainer.ranks.device_environment import device_environment
from finetune_trainer.ranks.device_errors import DeviceFault, fault_of_signal
from finetune_trainer.ranks.gate import Rendezvous

SUPERVISION_SECONDS = 1.0
"""Longest time in seconds between two checks of the workers when no signal arrives."""


def worker_environments(
    environment: Mapping[str, str], plan: WorkerPlan, *, rendezvous: Rendezvous, threads: int
) -> list[dict[str, str]]:
    """Return the environment variables of this pod's workers, in the order of their local ranks.

    ``rendezvous`` is where the workers find the rendezvous store, and ``threads`` is the number of compute threads of
    each worker. Where there is one node, gloo and NCCL use the loopback interface only. What else depends on the device
    is in `device_environment.py`. Variables that ``environment`` has already, which the user may have set, win.
    """
    world = plan.config.world
    base = dict(environment)
    base.setdefault("OMP_NUM_THREADS", str(threads))
    base.setdefault("MKL_NUM_THREADS", base["OMP_NUM_THREADS"])
    if world.nodes == 1:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            base.setdefault(variable, "lo")
    settings = device_environment(world.device, ranks=world.size, scratch=plan.paths.scratch, given=environment)
    base |= settings.environment
    base |= {
        "MASTER_ADDR": rendezvous.address,
        "MASTER_PORT": str(rendezvous.port),
        "RENDEZVOUS_NONCE": rendezvous_nonce(plan.identity, plan.paths),
        "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(world.processes_per_node),
        "DS_ACCELERATOR": "cuda" if world.device == "GPU" else "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    first = plan.identity.node_rank * world.processes_per_node
    return [{**base, "RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(world.processes_per_node)]


class WorkerProcesses:
    """The worker processes, one per GPU or CPU rank, that the launcher (PID 1 of the pod) starts and supervises."""

    def __init__(self, folder: Path, *, heartbeat_timeout: float = math.inf, gpu_ranks: int = 0) -> None:
        """The workers write outcome files and heartbeats into ``folder``. A worker is killed when it has written no new
        heartbeat for ``heartbeat_timeout`` seconds after its last one. ``gpu_ranks`` is the number of ranks of the job
        in all pods where the job computes on GPUs, otherwise 0.
        """
        self._gpu_ranks = gpu_ranks
        self._folder = folder
        self._heartbeat_timeout = heartbeat_timeout
        self._frozen: set[int] = set()
        self._heartbeats: dict[int, tuple[float, float]] = {}
        """Time stamp of each rank's newest heartbeat, and the monotonic time at which the launcher first saw it."""
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._killed: set[int] = set()

    def run(
        self, plan: WorkerPlan, environments: Sequence[Mapping[str, str]], *, stop: Callable[[], bool]
    ) -> list[WorkerExit]:
        """Start one worker per environment, wait for all workers, and return their exits in the order of ranks.

        ``stop`` returns whether this process received SIGTERM before this call. If it did, the workers receive SIGTERM
        directly after their start, and only report the stop to the ranks of the other pods.
        """
        with _collect_signals() as received:
            self._start(plan, environments)
            # `stop` is asked only now, while `received` has every signal. A signal between the two would be lost.
            if stop():
                self._terminate()
            self._wait(received)
        return [self._exit_of(rank) for rank in sorted(self._children)]

    def _exit_of(self, rank: int) -> WorkerExit:
        heartbeat = read_heartbeat(self._folder, rank)
        status = self._children[rank].returncode
        return WorkerExit(
            rank,
            status,
            read_outcome(self._folder, rank) or signal_outcome(rank, status, gpu_ranks=self._gpu_ranks),
            killed_by_launcher=rank in self._killed,
            frozen=rank in self._frozen,
            last_seen=heartbeat[0] if heartbeat else "",
        )

    def _start(self, plan: WorkerPlan, environments: Sequence[Mapping[str, str]]) -> None:
        path = self._folder / "plan.json"
        path.write_text(plan.to_json())
        # Block the stop signals while the workers are started. A worker inherits the block. A SIGTERM that arrives
        # before the worker has installed its handler is then kept until the worker unblocks the signal.
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

    def _wait(self, received: _ReceivedSignals) -> None:
        """Wait until every worker has exited, and forward SIGTERM and SIGINT to the workers as SIGTERM.

        Once a worker has exited, the remaining workers have a bounded time to exit before they are killed. Without the
        bound, a worker that waits in a collective for the exited worker would wait for the collective's whole timeout.
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
            self._kill_frozen(running)
            if any(number in STOP_SIGNALS for number in received()):
                self._terminate()

    def _kill_frozen(self, running: Sequence[int]) -> None:
        """Kill workers whose heartbeats have stopped, because a frozen worker can't exit by itself and blocks all other
        ranks.
        """
        for rank in running:
            heartbeat = read_heartbeat(self._folder, rank)
            if heartbeat is None or rank in self._frozen:
                continue
            # The age of a heartbeat is measured with this process's monotonic clock, because the wall clock may be
            # changed in between.
            stamp, since = self._heartbeats.get(rank, (None, 0.0))
            if stamp != heartbeat[1]:
                self._heartbeats[rank] = (heartbeat[1], time.monotonic())
            elif time.monotonic() - since > self._heartbeat_timeout:
                self._frozen.add(rank)
                self._children[rank].kill()


def signal_outcome(rank: int, status: int, *, gpu_ranks: int) -> WorkerOutcome | None:
    """Return the outcome of a worker that left none, where the signal that ended the worker tells the cause. Return
    None otherwise.

    ``status`` is the negated number of the signal. ``gpu_ranks`` is the number of ranks of a job on GPUs, 0 for another
    job.
    """
    if status >= 0 or gpu_ranks == 0:
        return None
    fault = fault_of_signal(-status, ranks=gpu_ranks)
    if fault is DeviceFault.PEER_LEFT:
        message = f"another rank left: NCCL ended rank {rank} by SIGABRT; its log has the details"
        return WorkerOutcome(result=Result(outcome=Outcome.OUTSIDE_FAILURE, message=message), caused_by_peer=True)
    if fault is DeviceFault.WRONG_SETUP:
        message = f"rank {rank} was ended by SIGBUS, because /dev/shm is full: raise resources.sharedMemory"
        return WorkerOutcome(result=Result(outcome=Outcome.OUTSIDE_FAILURE, message=message))
    return None


@contextlib.contextmanager
def _collect_signals() -> Iterator[_ReceivedSignals]:
    """While the block runs, collect the stop signals and SIGCHLD, which the kernel sends when a worker has exited.
    Python writes the number of each signal into a pipe, and this wakes the loop that supervises the workers.

    Python writes to one pipe at a time. In this process the other one is that of `StopFlag`, whose handler is replaced
    too. The pipe of this function is there before the handlers are replaced, and the former pipe is back before the
    former handlers are. So a stop signal at any moment is in one of the two pipes. A signal that comes after the last
    worker has exited stays in the pipe of this function, because nothing is left to stop.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = (*STOP_SIGNALS, signal.SIGCHLD)
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield _ReceivedSignals(reader)
    finally:
        signal.set_wakeup_fd(previous_fd, warn_on_full_buffer=False)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


class _ReceivedSignals:
    """A callable: waits until a signal arrives, at most `SUPERVISION_SECONDS`, and returns the numbers of the signals
    that arrived, one byte each. The bytes are empty if none arrived."""

    def __init__(self, reader: int) -> None:
        self._reader = reader

    def __call__(self) -> bytes:
        ready, _, _ = select.select([self._reader], [], [], SUPERVISION_SECONDS)
        return os.read(self._reader, 64) if ready else b""
