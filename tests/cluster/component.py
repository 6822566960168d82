"""One program of the cluster: started inside its namespaces, with a log of its own, stopped and started again by
tests that need it to fail."""

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
    """A program, its log file, and how to see that it serves.

    ``ready`` is asked from inside the network namespace and answers without raising.
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
        """Start the program; ``wait_ready`` waits for it."""
        if self.running:
            raise ClusterError(f"{self.name} is already running")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.namespaces.command([str(argument) for argument in self.argv]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.environment),
                # Ctrl-C in a terminal is for the owner, who then ends the cluster in order.
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The id of the program itself, as the machine counts (``nsenter`` is its parent)."""
        if self._process is None:
            raise ClusterError(f"{self.name} was not started")
        wrapper = self._process.pid
        return wait_for(f"{self.name} to have a process", lambda: children(wrapper), 10, evidence=self.evidence)[0]

    def wait_ready(self) -> None:
        """Wait until it serves.

        Raises:
            ClusterError: with the end of the log, when it ends early or is not ready in time.
        """

        def ready() -> bool:
            if not self.running:
                code = self._process.returncode if self._process else None
                raise ClusterError(f"{self.name} ended with {code} before it was ready\n{self.evidence()}")
            with self.namespaces.network():
                return self.ready()

        wait_for(f"{self.name} to be ready", ready, self.ready_timeout, evidence=self.evidence, interval=0.2)

    def stop(self, signal_number: int = signal.SIGKILL, timeout: float = 30) -> None:
        """End the program with a signal and wait until it is gone.

        SIGKILL unless told otherwise, because a cluster is thrown away, and because an API server that is asked
        kindly waits for its open watches.
        """
        if self._process is None or not self.running:
            return
        os.kill(self.pid, signal_number)
        process = self._process
        wait_for(f"{self.name} to end after signal {signal_number}", lambda: process.poll() is not None, timeout)

    def freeze(self) -> None:
        """Stop it with SIGSTOP: it does nothing, and its connections stay."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on; also ``nsenter``, which stops with the program that it waits for: the cluster could not end,
        because nobody would wait for the killed program."""
        frozen = self.pid
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGCONT)
        os.kill(frozen, signal.SIGCONT)

    def restart(self) -> None:
        """Kill it, start it again, and wait until it serves."""
        self.stop()
        self.start()
        self.wait_ready()

    def evidence(self) -> str:
        return tail(self.log)
