"""Runs the operator as a process that tests kill and restart, with the service account that the chart installs.

The operator is forked from a process that has already imported all modules, so that hundreds of restarts take little
time.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.cluster import Cluster, wait_for
from tests.cluster.api import answers
from tests.cluster.layout import API_URL, HOST_ADDRESS
from tests.cluster.namespaces import children
from tests.cluster.waiting import ClusterError, tail
from tests.operator.builders import REPOSITORY
from tests.operator.operator_program import operator_program

NAMESPACE = "operator-tests"
RELEASE = "under-test"
SERVICE_ACCOUNT = "under-test-finetune-operator"

_NURSERY = """
import os, sys
import finetune_operator.__main__ as program
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        log = os.open(line.strip(), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2), os.close(0)
        os.setsid()
        sys.argv = ["finetune_operator"]
        try:
            program.main()
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print("started", flush=True)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
"""Program that forks an operator for each line on standard input. The line is the path of the operator's log.

The program prints ``started`` after the fork, and the exit code after the operator has ended.
"""


def install(cluster: Cluster) -> None:
    """Install the chart with zero replicas: CRD, roles, service account and Secret, but no pod of the operator."""
    chart = str(REPOSITORY / "charts/finetune-operator")
    options = ["--set", "replicas=0"]
    cluster.helm("install", RELEASE, chart, "-n", NAMESPACE, "--create-namespace", *options)
    cluster.learn_new_kinds()


class OperatorProcess:
    """One operator process, which can be started and stopped any number of times."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *,
        server: str = API_URL,
        ports: tuple[int, int] = (18443, 18080),
        source: Path = REPOSITORY,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare an operator without starting it. ``server`` is the URL of the API server that the operator gets. By
        default it is the real API server without a proxy.

        ``ports`` are the report port and the health port. ``source`` is the checkout whose operator runs. ``settings``
        become environment variables, for example ``resync_seconds="4"`` becomes `FINETUNE_RESYNC_SECONDS=4`.
        """
        self.log = folder / "operator.log"
        self.started_at = 0.0
        """Time of the last start of the operator, on the monotonic clock."""
        self._cluster = cluster
        self._health = f"http://127.0.0.1:{ports[1]}"
        self._nursery: subprocess.Popen[str] | None = None
        self._waiting = False
        program = operator_program(
            cluster,
            folder,
            namespace=NAMESPACE,
            account=SERVICE_ACCOUNT,
            health_port=ports[1],
            api_url=server,
            settings={"FINETUNE_REPORT_HOST": HOST_ADDRESS, "FINETUNE_REPORT_PORT": str(ports[0])}
            | {f"FINETUNE_{name.upper()}": value for name, value in (settings or {}).items()},
        )
        packages = [str(source / part) for part in ("core", "operator")]
        self._environment = {**program.environment, "PYTHONPATH": os.pathsep.join(packages)}

    def start(self) -> None:
        """Start the operator without waiting until it is ready; `wait_ready` waits."""
        if self._nursery is None:
            self._nursery = subprocess.Popen(
                self._cluster.namespaces.command([sys.executable, "-c", _NURSERY]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
                start_new_session=True,
            )
        assert self._nursery.stdin is not None
        self.started_at = time.monotonic()
        self._nursery.stdin.write(f"{self.log}\n")
        self._nursery.stdin.flush()
        assert self._nursery.stdout is not None
        # This line waits for the fork. Before the fork `pid` is None, which would look as if the operator had ended.
        assert self._nursery.stdout.readline() == "started\n", self.evidence()
        self._waiting = True

    @property
    def pid(self) -> int | None:
        """Process id of the operator in the test machine's PID namespace; None where no operator runs."""
        if self._nursery is None:
            return None
        # The process tree is: nsenter, the forking program, the operator.
        nursery = children(self._nursery.pid)
        running = children(nursery[0]) if nursery else []
        return running[0] if running else None

    def wait_end(self, timeout: float = 60) -> int:
        """Wait until the operator has ended and return its exit code; -9 means that signal 9 killed the operator."""
        wait_for("the operator to end", lambda: self.pid is None, timeout, evidence=self.evidence)
        assert self._nursery is not None
        assert self._nursery.stdout is not None
        self._waiting = False
        return int(self._nursery.stdout.readline())

    def send(self, number: int) -> None:
        """Send signal ``number`` to the operator; raises ClusterError where no operator runs."""
        pid = self.pid
        if pid is None:
            raise ClusterError(f"no operator runs\n{self.evidence()}")
        os.kill(pid, number)

    def stop(self, number: int = signal.SIGKILL) -> None:
        """End the operator with signal ``number`` and wait until it has ended."""
        if self._waiting:
            if self.pid is not None:
                self.send(number)
            self.wait_end()

    def close(self) -> None:
        """End the operator and the program that forks it."""
        self.stop()
        if self._nursery is not None:
            assert self._nursery.stdin is not None
            self._nursery.stdin.close()
            self._nursery.wait(10)
            self._nursery = None

    def restart(self) -> None:
        """Kill the operator, start it again, and wait until it is ready."""
        self.stop()
        self.start()
        self.wait_ready()

    def wait_ready(self, timeout: float = 60) -> None:
        """Wait until /readyz succeeds. It succeeds when the operator is the leader and has listed all jobs, and also
        when the operator has read the Lease of another leader and waits."""
        self.wait_for_health("the operator to be ready", lambda: self.answers("/readyz"), timeout)

    def wait_for_health(self, what: str, reached: Callable[[], bool], timeout: float) -> None:
        """Wait until ``reached``, a function that sends a request to the health server, returns True. It is called only
        five times per second, because each request takes processor time from the operator."""
        wait_for(what, reached, timeout, evidence=self.evidence, interval=0.2)

    def answers(self, path: str) -> bool:
        """Return whether the health server answers ``path`` with success."""
        with self._cluster.enter():
            return answers(self._health + path)

    def metric(self, name: str, labels: str = "") -> float:
        """Return the sum of a metric over its series whose labels contain the text ``labels``. Return 0 where there is
        no such series."""
        with self._cluster.enter(), urllib.request.urlopen(f"{self._health}/metrics", timeout=10) as answer:  # noqa: S310
            lines = answer.read().decode().splitlines()
        series = [line.rsplit(" ", 1) for line in lines if re.match(rf"{name}(\{{|\s)", line) and labels in line]
        return sum(float(value) for _, value in series)

    def memory(self) -> Mapping[str, int]:
        """Return the current and the highest resident memory in bytes, with the keys VmRSS and VmHWM."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}

    def evidence(self) -> str:
        """Return the last lines of the operator's log."""
        return tail(self.log)
