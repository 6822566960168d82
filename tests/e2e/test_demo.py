"""The tuned model of `make demo` answers most held-out sentences exactly right, and the base model hardly any."""

from __future__ import annotations

import json
import subprocess

import pytest

from examples.demo import steps
from tests.cluster import unusable_because

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(3 * 25 * 60)]

LEAST_AFTER, MOST_BEFORE = 0.8, 0.05


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_tuned_model_answers_what_the_base_model_cannot(method: str) -> None:
    if reason := unusable_because():
        # The demo starts a cluster of its own, which is not possible on this machine.
        pytest.skip(reason)
    done = subprocess.run(["make", "demo", f"METHOD={method}"], cwd=steps.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    measured = json.loads((steps.REPOSITORY / "out" / "demo" / method / "measurements.json").read_text())
    assert measured["exactMatch"]["tuned"] >= LEAST_AFTER
    assert measured["exactMatch"]["base"] <= MOST_BEFORE
    assert "Traceback" not in done.stdout
