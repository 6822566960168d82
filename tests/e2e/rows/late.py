"""The rows in which something outside the spec appears later than the job: the job says what it waits for, nothing is
charged, and it runs once the thing is there.

Where the times come from: the kubelet tries mounts and pulls again after pauses that double; a claim is
bound by the volume controller, which wakes the scheduler.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from examples.demo import steps
from tests.e2e.rows.observer import Manifest
from tests.e2e.rows.row import Milestone, Row, condition, on_job, settled
from tests.e2e.rows.scripts import DONE, IMAGE
from tests.e2e.rows.stage import Stage

LATE_SECRET = "late-keys"
LATE_CLAIM = "late-claim"
LATE_IMAGE = "localhost/late-trainer:1"
LATE_BUCKET = "late-bucket"
KUBELET_PAUSE = 40.0
"""Longest pause of the kubelet between two tries in the first minute."""
SCHEDULER_PAUSE = 10.0
VOLUME_PAUSE = 15.0
"""Between two looks of the volume controller (`--pvclaimbinder-sync-period`) at a claim it did not bind at once."""
RUN = 5.0
"""Two small pods from the moment at which nothing holds them to their end."""


def told(stage: Stage, *words: str) -> None:
    """Wait until the status says what the job waits for."""
    stage.job(f"{words}", lambda job: all(word in condition(job, "Running")["message"] for word in words))


def appears(make: Callable[[Stage], None], *words: str) -> Callable[[Stage], float]:
    """What the job waits for, and names with ``words``, is made by ``make``; the moment is that of its being there."""

    def fault(stage: Stage) -> float:
        told(stage, *words)
        make(stage)
        return stage.now()

    return fault


def make_secret(stage: Stage) -> None:
    """Create the Secret with the store's keys."""
    keys = ["--from-literal=AWS_ACCESS_KEY_ID=a", "--from-literal=AWS_SECRET_ACCESS_KEY=b"]
    stage.cluster.kubectl("create", "secret", "generic", LATE_SECRET, "-n", stage.namespace, *keys)


def make_image(stage: Stage) -> None:
    """Put the image on the node."""
    stage.cluster.import_image(replace(IMAGE, name=LATE_IMAGE))


def make_bucket(stage: Stage) -> None:
    """Create the bucket in the object store."""
    steps.make_bucket(stage.cluster, LATE_BUCKET)


def make_claim(stage: Stage) -> None:
    """Create the claim and a volume for it."""
    modes = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    folder = {"path": f"/var/lib/{stage.namespace}", "type": "DirectoryOrCreate"}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": stage.namespace},
        "spec": {**modes, "capacity": {"storage": "1Mi"}, "hostPath": folder, "claimRef": _claim_reference(stage)},
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": LATE_CLAIM, "namespace": stage.namespace},
        "spec": {**modes, "resources": {"requests": {"storage": "1Mi"}}, "volumeName": stage.namespace},
    }
    objects = {"apiVersion": "v1", "kind": "List", "items": [volume, claim]}
    stage.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(objects))


def _claim_reference(stage: Stage) -> dict[str, Any]:
    return {"name": LATE_CLAIM, "namespace": stage.namespace}


def _volume_deleted(stage: Stage, job: Manifest) -> None:
    """The volume belongs to no namespace: it is taken away here."""
    stage.cluster.kubectl("delete", "persistentvolume", stage.namespace, "--wait=false")


def _ends(bound: float) -> tuple[Milestone, ...]:
    return (on_job("job ended", bound, settled),)


FIRST_TIME_DONE = (("Succeeded", "Completed"),)

LATE = (
    Row(
        name="Secret that appears later",
        script=DONE,
        spec={"storage": {"credentialsSecretRef": {"name": LATE_SECRET}}},
        fault=appears(make_secret, LATE_SECRET, "not found"),
        attempts=FIRST_TIME_DONE,
        milestones=_ends(KUBELET_PAUSE + RUN),
    ),
    Row(
        name="image that appears later",
        script=DONE,
        spec={"podTemplate": {"image": LATE_IMAGE}},
        fault=appears(make_image, "can't be pulled", LATE_IMAGE),
        attempts=FIRST_TIME_DONE,
        milestones=_ends(KUBELET_PAUSE + RUN),
    ),
    Row(
        name="claim that appears later",
        script=DONE,
        spec={"model": {"volume": {"claimName": LATE_CLAIM, "path": "model"}}},
        fault=appears(make_claim, LATE_CLAIM, "not found"),
        attempts=FIRST_TIME_DONE,
        milestones=_ends(VOLUME_PAUSE + SCHEDULER_PAUSE + RUN),
        check=_volume_deleted,
    ),
)
