"""Fixtures of tests/api: the test cluster's API server with the CRD. No operator is running, so only the tests
change the jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import celpy  # noqa: F401  (here, because it sets the recursion limit, which Hypothesis wants to stay as it is in a test)
import pytest

from finetune_core.api.crd import CRD_FILE
from tests.api.server import NAMESPACE, Server
from tests.cluster import Cluster
from tests.cluster.waiting import wait_for

CRD = Path(__file__).resolve().parents[2] / "crds" / CRD_FILE


def served(cluster: Cluster) -> bool:
    """Return whether the API server serves FineTuneJobs."""
    command: list[str | Path] = [cluster.layout.programs / "kubectl", "get", "finetunejobs.finetune.dev"]
    return cluster.run(command, check=False).returncode == 0


@pytest.fixture(scope="session")
def server(cluster: Cluster) -> Iterator[Server]:
    """The test cluster's API server with the CRD, and an empty namespace for the tests' jobs."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=CRD.read_text(encoding="utf-8"))
    wait_for("FineTuneJobs to be served", lambda: served(cluster), 60)
    cluster.kubectl("create", "namespace", NAMESPACE)
    server = Server(cluster)
    yield server
    server.close()
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
