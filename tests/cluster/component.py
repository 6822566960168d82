"""One program of a cluster, such as etcd or the kubelet. The program runs inside the cluster's namespaces and writes a
log file of its own. Tests stop, freeze and restart components to cause failures."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.namespaces import Namespaces, children
from tests.cluster.waiting import ClusterError, tail, wait_for


@dataclass
class Component:
    """A program with its command line, its log file and a check of readiness.

    ``ready`` is called from inside the network namespace, returns whether the program serves, and never raises.
    """

    name: str
    argv: Sequence[str | Path]
    ready: Callable[[], bool]
    namespaces: Namespaces
    log: Path
    environment: Mapping[str, str]
    ready_timeout: float = 60
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start the program without waiting. ``wait_ready`` waits until the program serves."""
        if self.running:
            raise ClusterError(f"{self.name} is already running")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.namespaces.command([str(argument) for argument in self.argv]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.environment),
                # A session of its own keeps Ctrl-C in a terminal away from the program, because the cluster's owner
                # ends all programs in order.
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The program's process id in the machine's PID namespace. ``nsenter`` is the parent process of the program."""
        if self._process is None:
            raise ClusterError(f"{self.name} was not started")
        wrapper = self._process.pid
        return wait_for(f"{self.name} to have a process", lambda: children(wrapper), 10, evidence=self.evidence)[0]

    def wait_ready(self) -> None:
        """Wait until the program serves.

        Raises:
            ClusterError: the program ended or was not ready in time; the message holds the end of the log.
        """

        def ready() -> bool:
            if not self.running:
                code = self._process.returncode if self._process else None
                raise ClusterError(f"{self.name} ended with {code} before it was ready\n{self.evidence()}")
            with self.namespaces.network():
                return self.ready()

        wait_for(f"{self.name} to be ready", ready, self.ready_timeout, evidence=self.evidence, interval=0.2)

    def stop(self, signal_number: int = signal.SIGKILL, timeout: float = 30) -> None:
        """Send a signal to the program and wait until the program has ended.

        The default is SIGKILL because the cluster's data is thrown away anyway, and because an API server that receives
        SIGTERM first waits for its open watches.
        """
        if self._process is None or not self.running:
            return
        os.kill(self.pid, signal_number)
        process = self._process
        wait_for(f"{self.name} to end after signal {signal_number}", lambda: process.poll() is not None, timeout)

    def freeze(self) -> None:
        """Pause the program with SIGSTOP. The program does nothing, and its network connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen program go on with SIGCONT. ``nsenter``, which stopped together with the program, must also go
        on, because it has to reap the program when the cluster ends."""
        frozen = self.pid
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGCONT)
        os.kill(frozen, signal.SIGCONT)

    def restart(self) -> None:
        """Kill the program, start it again, and wait until it serves."""
        self.stop()
        self.start()
        self.wait_ready()

    def evidence(self) -> str:
        return tail(self.log)
