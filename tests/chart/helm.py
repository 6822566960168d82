"""Real helm for the chart's tests: from FINETUNE_HELM, the PATH, or the test cluster's cache, fetched once."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.clients import clients
from tests.cluster.waiting import ClusterError

CHART = Path(__file__).resolve().parents[2] / "charts" / "finetune-operator"


@functools.cache
def helm_program() -> str:
    """Return the path of helm; skips the test where it can't be had."""
    if own := os.environ.get("FINETUNE_HELM"):
        return own
    try:
        return str(clients()["helm"])
    except ClusterError as error:
        # It comes over the network: without one a developer still runs the tests that need no helm.
        pytest.skip(f"helm can't be had (set FINETUNE_HELM to its path): {error}")


def helm(*arguments: str, stdin: str = "") -> str:
    """Run helm and return what it printed; raises CalledProcessError where it fails."""
    done = subprocess.run(
        [helm_program(), *arguments], input=stdin, text=True, capture_output=True, check=True, timeout=60
    )
    return done.stdout
