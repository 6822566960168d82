"""The operator as a program beside the cluster: with a service account's token, a setting for each test, and started
again when it ends by itself, as the kubelet does with a container."""

from __future__ import annotations

import json
import sys
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster import Cluster
from tests.cluster.api import answers
from tests.cluster.audit import credential_of
from tests.cluster.component import Component
from tests.cluster.layout import API_URL

RESTART_SECONDS = 1.0
"""Pause before a program that ended by itself is started again."""


@dataclass
class OperatorProgram(Component):
    """A replica of the operator."""

    credential: str = ""
    """Of its token, as the audit log names it."""
    restarts: int = 0
    """How often it ended by itself and was started again."""
    _stopped: threading.Event = field(default_factory=threading.Event, repr=False)
    _keeper: threading.Thread | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it, and again whenever it ends by itself."""
        self._stopped.clear()
        super().start()
        self._keeper = threading.Thread(target=self._keep, name=f"keep-{self.name}", daemon=True)
        self._keeper.start()

    def stop(self, *arguments: float, **options: float) -> None:
        """End it with a signal, SIGKILL unless told otherwise; it stays down."""
        self._stopped.set()
        if self._keeper is not None:
            self._keeper.join()
        super().stop(*arguments, **options)  # type: ignore[arg-type]

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
    """Return a replica, not started yet: installed by the chart into ``namespace`` with service account ``account``.

    ``settings`` are environment variables that win over those here.
    """
    token = cluster.kubectl("create", "token", account, "-n", namespace, "--duration=8h").strip()
    config = json.loads(cluster.kubectl("config", "view", "--raw", "--output=json"))
    config["users"][0]["user"] = {"token": token}
    config["clusters"][0]["cluster"]["server"] = api_url
    kubeconfig = folder / f"{name}.kubeconfig"
    kubeconfig.write_text(json.dumps(config))
    variables = {
        "FINETUNE_TRAINER_IMAGE": "localhost/busybox:1",
        # The stand-ins check nothing; the tests of the check ask for it in the job.
        "FINETUNE_PREFLIGHT": "Skip",
        "FINETUNE_NAMESPACE": namespace,
        "FINETUNE_CERTIFICATE_SECRET": f"{account}-certificates",
        "FINETUNE_LEASE": account,
        "FINETUNE_REPORT_SERVICE": account,
        "FINETUNE_POD_NAME": name,
        # The same at every start, as for a container that the kubelet restarts.
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
