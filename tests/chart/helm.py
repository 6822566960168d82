"""Runs the real helm program for the chart's tests.

helm is taken from FINETUNE_HELM, or from the test cluster's cache, into which it is downloaded once.
"""

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
    """Return the path of helm. The test is skipped where helm can't be downloaded."""
    if own := os.environ.get("FINETUNE_HELM"):
        return own
    try:
        return str(clients()["helm"])
    except ClusterError as error:
        # helm is downloaded. A developer without a network can still run the tests that need no helm.
        pytest.skip(f"helm can't be had (set FINETUNE_HELM to its path): {error}")


def helm(*arguments: str, stdin: str = "") -> str:
    """Run helm and return its output. Raises CalledProcessError where helm fails."""
    done = subprocess.run(
        [helm_program(), *arguments], input=stdin, text=True, capture_output=True, check=True, timeout=60
    )
    return done.stdout
