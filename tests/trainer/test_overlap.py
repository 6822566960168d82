"""Two attempts at the same time, as after a network partition.

The pods of the first attempt freeze, and continue after a second attempt has finished.
"""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.trainer.conftest import StartPods
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import Attempt, run_config
from tests.trainer.test_recovery import committed_steps

pytestmark = pytest.mark.long
CHANGES = {"optimization__maxSteps": 60, "storage__checkpointEverySteps": 5}


def send(attempt: Attempt, number: int) -> None:
    """Send a signal to every process of an attempt, workers first."""
    for pod in attempt.pods:
        for process in (*pod.workers(), pod.process.pid):
            os.kill(process, number)


def test_a_frozen_attempt_that_thaws_after_the_artifact_was_committed_changes_nothing(
    store: ObjectStore, pods: StartPods
) -> None:
    # The first attempt has more steps than the second, so that it is still training when its processes continue.
    first = pods(run_config(store, "frozen", **{**CHANGES, "optimization__maxSteps": 5000}))
    first.wait_for(lambda: bool(committed_steps(store, "frozen")), "the first checkpoint")
    send(first, signal.SIGSTOP)
    second = pods(run_config(store, "frozen", **CHANGES), attempt=2)
    assert second.wait() == [0, 0], second.output
    base = "runs/default/frozen/uid-1"
    pointer = store.read(f"{base}/ARTIFACT")
    before = {key: store.read(key) for key in store.keys(f"{base}/") if "/000002" in key or key.endswith("ARTIFACT")}
    assert json.loads(pointer)["run"] == 2

    send(first, signal.SIGCONT)
    assert first.wait() == [75, 75], first.output
    for pod in first.pods:
        assert pod.result.message == "run 2 of this job has started, so run 1 stopped writing to the bucket"
    assert {key: store.read(key) for key in before} == before
    third = pods(run_config(store, "frozen", **CHANGES), attempt=3)
    assert third.wait() == [0, 0]
    assert third.pods[0].result.artifact == second.pods[0].result.artifact
