"""Runs the operator as a program on the test machine, and not in a pod, with the token of a service account.

The program is started again when it ends by itself, as the kubelet restarts a container.
"""

from __future__ import annotations

import json
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster import Cluster
from tests.cluster.api import answers
from tests.cluster.audit import credential_of
from tests.cluster.component import Component
from tests.cluster.layout import API_URL

RESTART_SECONDS = 1.0
"""Seconds between two checks of whether the program still runs. A program that has ended by itself is started again at
the next check."""


@dataclass
class OperatorProgram(Component):
    """One replica of the operator, run as a program."""

    credential: str = ""
    """Identifier of the replica's token in the API server's audit log."""
    restarts: int = 0
    """How often the program has ended by itself and was started again."""
    _stopped: threading.Event = field(default_factory=threading.Event, repr=False)
    _keeper: threading.Thread | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start the program, and restart the program whenever it ends by itself."""
        self._stopped.clear()
        super().start()
        self._keeper = threading.Thread(target=self._keep, name=f"keep-{self.name}", daemon=True)
        self._keeper.start()

    def stop(self, *arguments: float, **options: float) -> None:
        """End the program with a signal (SIGKILL by default) and do not restart the program."""
        self._stopped.set()
        if self._keeper is not None:
            self._keeper.join()
        super().stop(*arguments, **options)  # type: ignore[arg-type]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Kill the program for the block, then start it again and wait until it is ready."""
        self.stop()
        try:
            yield
        finally:
            self.start()
            self.wait_ready()

    def _keep(self) -> None:
        while not self._stopped.wait(RESTART_SECONDS):
            if not self.running:
                self.restarts += 1
                super().start()


def operator_program(
    cluster: Cluster,
    folder: Path,
    *,
    namespace: str,
    account: str,
    health_port: int,
    api_url: str = API_URL,
    name: str = "operator",
    settings: Mapping[str, str] | None = None,
) -> OperatorProgram:
    """Return a replica of the operator, which is not started yet.

    The replica belongs to the release in ``namespace`` and uses the service account ``account``. ``settings`` are
    environment variables that override the defaults set here.
    """
    token = cluster.kubectl("create", "token", account, "-n", namespace, "--duration=8h").strip()
    config = json.loads(cluster.kubectl("config", "view", "--raw", "--output=json"))
    config["users"][0]["user"] = {"token": token}
    config["clusters"][0]["cluster"]["server"] = api_url
    kubeconfig = folder / f"{name}.kubeconfig"
    kubeconfig.write_text(json.dumps(config))
    variables = {
        "FINETUNE_TRAINER_IMAGE": "localhost/busybox:1",
        # The stand-in images can't run the preflight check. Tests of the check set `runPolicy.preflight` in the job.
        "FINETUNE_PREFLIGHT": "Skip",
        "FINETUNE_NAMESPACE": namespace,
        "FINETUNE_CERTIFICATE_SECRET": f"{account}-certificates",
        "FINETUNE_LEASE": account,
        "FINETUNE_REPORT_SERVICE": account,
        "FINETUNE_POD_NAME": name,
        # The pod's uid is the same at every start of the program, as for a container that the kubelet restarts.
        "FINETUNE_POD_UID": str(uuid.uuid4()),
        "FINETUNE_HEALTH_PORT": str(health_port),
        "FINETUNE_KUBECONFIG": str(kubeconfig),
        "FINETUNE_RESYNC_SECONDS": "30",
    }
    ready = f"http://127.0.0.1:{health_port}/readyz"
    return OperatorProgram(
        name,
        [sys.executable, "-m", "finetune_operator"],
        lambda: answers(ready),
        cluster.namespaces,
        folder / f"{name}.log",
        {"PATH": "/usr/bin:/bin", "HOME": str(folder), **variables, **(settings or {})},
        credential=credential_of(token),
    )
