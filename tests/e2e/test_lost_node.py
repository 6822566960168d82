"""Two trainers of one job run at the same time, and the job loses no committed step.

The test kills the kubelet of a node and deletes the job's pod by force, so that the old trainer keeps running beside
the new one. The old trainer must find the record of the new run in the object store, and stop committing.

The time that Kubernetes needs to notice a lost node is measured in test_rows.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from examples.demo import steps
from finetune_cli.state import condition
from finetune_core.api.conditions import ConditionType
from finetune_core.layout import COMMIT
from tests.cluster import Cluster, wait_for
from tests.cluster.layout import SECOND_NODE
from tests.cluster.second_node import TOLERATION, SecondNode
from tests.e2e.bucket import RunFolder
from tests.e2e.jobs import MakeJob, has_checkpoint_of_run, has_started_exactly

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1800)]

NEXT_ATTEMPT_SECONDS = 3 * 24
NAME = "orphaned"
PREFERS_THE_SECOND_NODE = {
    "tolerations": [TOLERATION],
    "affinity": {
        "nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 100,
                    "preference": {
                        "matchExpressions": [
                            {"key": "kubernetes.io/hostname", "operator": "In", "values": [SECOND_NODE.name]}
                        ]
                    },
                }
            ]
        }
    },
}
ENDLESS = {
    "spec__training__maxSteps": 100_000,
    "spec__evaluation__everySteps": 100_000,
    "spec__storage__checkpoint": {"everySteps": 25, "keepLast": 3},
    "spec__resources__nodes": 1,
    "spec__podTemplate": PREFERS_THE_SECOND_NODE,
}
RACE = timedelta(seconds=2)
"""Time after the start of the new run in which the old trainer may still commit. The old trainer looks for a newer run
shortly before each commit, so the new run may start between this look and the commit. Besides, the object store's times
are whole seconds."""


@pytest.fixture
def second_node(installed: Cluster) -> Iterator[SecondNode]:
    node = installed.second_node()
    yield node
    node.stop()
    installed.kubectl("delete", "node", node.name)


def _trainers(node: SecondNode) -> list[int]:
    """Return the ids of all processes on ``node`` that run the trainer."""
    found = []
    for pid in node.processes():
        try:
            if b"finetune_trainer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # The process has ended since it was listed.
    return found


def test_two_trainers_of_one_job_do_no_harm(
    installed: Cluster, namespace: str, second_node: SecondNode, tiny_job: MakeJob
) -> None:
    steps.apply(installed, tiny_job(NAME, **ENDLESS), namespace)
    job = steps.wait_for_job(installed, namespace, NAME, "a checkpoint of run 1", has_checkpoint_of_run(1), 600)
    assert job.status is not None
    assert job.status.attempts.current is not None
    assert [pod.node for pod in job.status.attempts.current.pods] == [second_node.name]
    root = RunFolder(installed, f"s3://{steps.BUCKET}/runs/{namespace}/{NAME}/{job.metadata.uid}")
    orphans = _trainers(second_node)
    assert orphans

    second_node.components["kubelet"].stop()
    installed.kubectl("cordon", second_node.name)
    pod = job.status.attempts.current.pods[0].name
    installed.kubectl("delete", "pod", pod, "-n", namespace, "--force", "--grace-period=0")
    deleted = time.monotonic()
    steps.wait_for_job(installed, namespace, NAME, "attempt 2", has_started_exactly(2), NEXT_ATTEMPT_SECONDS)
    print(f"attempt 2 started {time.monotonic() - deleted:.1f} s after the deletion")
    assert set(_trainers(second_node)) == set(orphans), "nobody has stopped the old trainer"
    with installed.enter():
        assert len(root.runs()) == 1
        alive = max(_commits(root, run=1).values())

    job = steps.wait_for_job(installed, namespace, NAME, "a checkpoint of run 2", has_checkpoint_of_run(2), 300)
    wait_for("the old trainer to find that it is fenced off", lambda: not _trainers(second_node), 120)
    with installed.enter():
        taken = root.times("runs/")["runs/000002.json"]
        assert alive < taken, "the old trainer still committed while the new one was not there"
        late = {key: at for key, at in _commits(root, run=1).items() if at > taken + RACE}
        assert late == {}, f"committed behind the fence, which fell at {taken}"
        parent = root.runs()[1]["parent"]
        assert parent["run"] == 1
        assert parent["step"] == max(_step(key) for key, at in _commits(root, run=1).items() if at <= taken)
    assert job.status is not None
    assert (job.status.attempts.charged, job.status.attempts.free) == (0, 1)

    patch = json.dumps({"spec": {"runPolicy": {"cancel": True}}})
    installed.kubectl("patch", "finetunejob", NAME, "-n", namespace, "--type=merge", "--patch", patch)
    job = steps.wait_for_condition(installed, namespace, NAME, ConditionType.STALLED, timeout=180)
    ended = condition(job, ConditionType.SUCCEEDED)
    assert ended is not None
    assert ended.reason == "Cancelled"
    assert job.status is not None
    assert [past.verdict for past in job.status.attempts.recent] == ["Free", "Permanent"]


def _commits(root: RunFolder, run: int) -> dict[str, datetime]:
    """Return when each checkpoint of run ``run`` was committed, by the key of its object COMMIT."""
    times = root.times("checkpoints/")
    return {key: at for key, at in times.items() if key.endswith(f"/{COMMIT}") and _run(key) == run}


def _run(key: str) -> int:
    return int(key.split("/")[1].split("-")[0])


def _step(key: str) -> int:
    return int(key.split("/")[1].split("-")[1])
