"""One program of a cluster, such as etcd or the kubelet. It runs inside the namespaces of the cluster or of its second
node, and writes a log file of its own. Tests stop, freeze and restart such programs to cause failures."""

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
    """A program of a cluster: how it is started, where it logs, and how to find out whether it is ready.

    ``ready`` returns whether the program is ready for its work. It is called inside the network namespace of
    ``namespaces``. An error that says that a server did not answer counts as "not ready yet" (see
    ``waiting.was_not_answered``). Any other error ends the wait.
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
        """Start the program and return at once. ``wait_ready`` waits until the program is ready."""
        if self.running:
            raise ClusterError(f"{self.name} is already running")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.namespaces.command([str(argument) for argument in self.argv]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.environment),
                # The program gets a session of its own, so that Ctrl-C in a terminal does not end it directly. Ctrl-C
                # ends only the owner of the cluster, and then the watcher (`watcher.py`) ends all programs.
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the program in the machine's PID namespace. The process that `start` has started is
        ``nsenter``, and the program is its child process."""
        if self._process is None:
            raise ClusterError(f"{self.name} was not started")
        wrapper = self._process.pid
        return wait_for(f"{self.name} to have a process", lambda: children(wrapper), 10, evidence=self.evidence)[0]

    def wait_ready(self) -> None:
        """Wait until the program is ready.

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
        """Send a signal to the program and wait until it has ended.

        The default is SIGKILL, because after SIGTERM an API server waits for the end of its open watches. A cluster's
        data may be lost, because it is deleted at the end anyway.
        """
        if self._process is None or not self.running:
            return
        os.kill(self.pid, signal_number)
        process = self._process
        wait_for(f"{self.name} to end after signal {signal_number}", lambda: process.poll() is not None, timeout)

    def freeze(self) -> None:
        """Pause the program with SIGSTOP. The program stops working, but its network connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the program go on after `freeze`, by SIGCONT. SIGCONT is also sent to ``nsenter``, the program's parent
        process. ``nsenter`` stopped together with the program, and must run so that it can reap the program later."""
        frozen = self.pid
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGCONT)
        os.kill(frozen, signal.SIGCONT)

    def restart(self) -> None:
        """Kill the program, start it again, and wait until it is ready."""
        self.stop()
        self.start()
        self.wait_ready()

    def evidence(self) -> str:
        return tail(self.log)
