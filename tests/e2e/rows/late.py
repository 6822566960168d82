"""The test cases in which an object that the job needs, such as a Secret, is created later than the job. The status
must name the missing object, no attempt may be charged, and the job must run as soon as the object exists.

The designed times from the creation of the object to the end of the job follow from Kubernetes. The kubelet repeats
mounts and image pulls after pauses that double each time. The volume controller binds a PersistentVolumeClaim only at
its next check, and the scheduler then places the pods.
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
"""Longest pause, in seconds, between two tries of the kubelet to mount a volume or pull an image. The pauses double,
and this is the longest one if the missing object appears within the first minute."""
SCHEDULER_PAUSE = 10.0
VOLUME_PAUSE = 15.0
"""Seconds between two checks of an unbound PersistentVolumeClaim by the volume controller
(`--pvclaimbinder-sync-period`)."""
RUN = 5.0
"""Seconds from start to end of two small pods, once all objects that the pods need exist."""


def wait_until_named(stage: Stage, *words: str) -> None:
    """Wait until the message of the job's condition Running contains all ``words``."""
    stage.job(f"{words}", lambda job: all(word in condition(job, "Running")["message"] for word in words))


def appears(make: Callable[[Stage], None], *words: str) -> Callable[[Stage], float]:
    """Return a function that waits until the message of the condition Running contains ``words``, and then calls
    ``make``, which creates the missing object. The function returns the time at which ``make`` has ended."""

    def fault(stage: Stage) -> float:
        wait_until_named(stage, *words)
        make(stage)
        return stage.now()

    return fault


def make_secret(stage: Stage) -> None:
    """Create the Secret for which the job waits. Its keys are not valid, but the scripted trainer does not use them."""
    keys = ["--from-literal=AWS_ACCESS_KEY_ID=a", "--from-literal=AWS_SECRET_ACCESS_KEY=b"]
    stage.cluster.kubectl("create", "secret", "generic", LATE_SECRET, "-n", stage.namespace, *keys)


def make_image(stage: Stage) -> None:
    """Import the image `LATE_IMAGE`, a scripted trainer, into the first node's containerd."""
    stage.cluster.import_image(replace(IMAGE, name=LATE_IMAGE))


def make_bucket(stage: Stage) -> None:
    """Create the bucket `LATE_BUCKET` in the object store."""
    steps.make_bucket(stage.cluster, LATE_BUCKET)


def make_claim(stage: Stage) -> None:
    """Create the PersistentVolumeClaim `LATE_CLAIM` and a PersistentVolume to which it is bound."""
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
    """Delete the PersistentVolume of `make_claim`. It belongs to no namespace, so it is not deleted with the job's
    namespace."""
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
