"""Runs the real helm program for the tests of the chart.

The environment variable FINETUNE_HELM names the program. Without this variable, the helm on the PATH is used. If there
is none, or if it is too old, helm is downloaded once.
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
    """Return the path of the helm program. The calling test is skipped if helm can't be downloaded."""
    if own := os.environ.get("FINETUNE_HELM"):
        return own
    try:
        return str(clients()["helm"])
    except ClusterError as error:
        # The test is skipped and does not fail, so that a developer without a network can run the tests that need no
        # helm.
        pytest.skip(f"helm can't be had (set FINETUNE_HELM to its path): {error}")


def helm(*arguments: str, stdin: str = "") -> str:
    """Run helm with ``arguments`` and return its output. Raises CalledProcessError if helm fails."""
    done = subprocess.run(
        [helm_program(), *arguments], input=stdin, text=True, capture_output=True, check=True, timeout=60
    )
    return done.stdout
