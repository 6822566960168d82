"""Starts and ends the watcher of a cluster, which is the process that removes the cluster (`watcher.py`).

`cluster.py` starts the watcher before anything else of the cluster, and ends the watcher to end the cluster.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

from tests.cluster.layout import Layout
from tests.cluster.progress import say
from tests.cluster.waiting import ClusterError, tail, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
STOP_QUIET_SECONDS = 120
"""`WatcherProcess.end` gives up when the watcher has written no line about its progress for this many seconds."""


class WatcherProcess:
    """The running watcher of a cluster. The watcher creates the cluster's namespaces, and removes the cluster when
    `end` is called or the process that started the cluster ends."""

    def __init__(self, layout: Layout, cgroup: str) -> None:
        """Start the watcher of the cluster whose files are in ``layout`` and whose cgroups are named ``cgroup``."""
        self._layout = layout
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.watcher", str(layout.state), cgroup, str(os.getpid())],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until the namespaces exist. Raises ClusterError if the watcher cannot create them."""
        init_log = self._layout.logs / "init.log"

        def ready() -> bool:
            if self._process.poll() is not None:
                errors = self._process.communicate()[1].decode(errors="replace")
                raise ClusterError(f"no namespaces: {errors}\n{tail(init_log)}")
            return self._layout.namespaces_ready.exists() and self._layout.init_pid.exists()

        wait_for("the namespaces", ready, 20, evidence=lambda: tail(init_log))

    def end(self, *, verbose: bool) -> None:
        """Let the watcher remove the cluster, and wait until it has done so. Print its progress if ``verbose``.

        Raises:
            ClusterError: something of the cluster is left on the machine; the message says what.
        """
        watcher = self._process
        if watcher.stdin is None:
            raise ValueError("the watcher is started with a pipe")
        watcher.stdin.close()
        watcher.stdin = None  # Without this, communicate() would flush the closed pipe and raise ValueError.
        self._follow(verbose=verbose)
        _, errors = watcher.communicate()
        if watcher.returncode != 0:
            raise ClusterError(f"ending the cluster failed:\n{errors.decode(errors='replace')}")

    def _follow(self, *, verbose: bool) -> None:
        """Read the lines that the watcher writes about its progress until the watcher ends. Print them if ``verbose``.

        Raises:
            ClusterError: the watcher has written no line for ``STOP_QUIET_SECONDS``, which means that it has stopped
            making progress.
        """
        watcher = self._process
        if watcher.stdout is None:
            raise ValueError("the watcher is started with a pipe")
        while select.select([watcher.stdout], [], [], STOP_QUIET_SECONDS)[0]:
            told = os.read(watcher.stdout.fileno(), 4096).decode()
            if not told:
                return
            for line in told.splitlines() if verbose else ():
                say(f"cluster: {line}")
        raise ClusterError(
            f"the cluster is not cleared away: its watcher {watcher.pid} made no progress for {STOP_QUIET_SECONDS} s"
        )
