"""What the operator reads from the manifest of a pod. Each field of `PodObservation` that comes from the manifest has a
test."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_operator.objects.labels import ATTEMPT, LAST_CHECKPOINT_TIME, PREFLIGHT, REPLICA_INDEX, TRAINING_CONTAINER
from finetune_operator.objects.observations import (
    ContainerObservation,
    ContainerState,
    PodObservation,
    parse_pod,
    parse_preflight_pod,
)
from tests.operator.builders import at

CREATED, STARTED, FINISHED = "2026-11-24T12:00:00Z", "2026-11-24T12:00:05Z", "2026-11-24T12:01:00Z"


def manifest(**status: Any) -> dict[str, Any]:
    """Return the manifest of the pod with index 1 of attempt 2, with the given fields of `status`."""
    return {
        "metadata": {
            "name": "quickstart-worker-1",
            "uid": "pod-uid",
            "resourceVersion": "17",
            "creationTimestamp": CREATED,
            "labels": {ATTEMPT: "2", REPLICA_INDEX: "1"},
            "annotations": {LAST_CHECKPOINT_TIME: FINISHED},
        },
        "spec": {
            "nodeName": "node-a",
            "containers": [
                {"name": "istio-proxy", "resources": {"limits": {"memory": "1Gi"}}},
                {"name": TRAINING_CONTAINER, "resources": {"limits": {"memory": "64Gi"}}},
            ],
        },
        "status": status,
    }


def container(**state: Any) -> list[dict[str, Any]]:
    """Return the container statuses of a pod with a sidecar that runs and a training container in ``state``."""
    return [
        {"name": "istio-proxy", "imageID": "other@sha256:1", "state": {"running": {"startedAt": CREATED}}},
        {"name": TRAINING_CONTAINER, "imageID": "trainer@sha256:2", "state": state},
    ]


def parsed(pod: dict[str, Any]) -> PodObservation:
    """Return the observation of an attempt's pod."""
    observed = parse_pod(pod)
    assert observed is not None
    return observed


def test_every_field_of_a_pod_comes_from_the_manifest() -> None:
    pod = manifest(
        phase="Failed",
        reason="Evicted",
        message="The node was low on resource: memory.",
        conditions=[
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": STARTED},
            {
                "type": "DisruptionTarget",
                "status": "True",
                "reason": "TerminationByKubelet",
                "lastTransitionTime": FINISHED,
            },
        ],
        containerStatuses=container(
            terminated={
                "exitCode": 137,
                "reason": "OOMKilled",
                "message": "{}",
                "startedAt": STARTED,
                "finishedAt": FINISHED,
            }
        ),
    )
    pod["metadata"] |= {"deletionTimestamp": "2026-11-24T12:02:30Z", "deletionGracePeriodSeconds": 90}
    expected = PodObservation(
        name="quickstart-worker-1",
        uid="pod-uid",
        attempt=2,
        index=1,
        phase="Failed",
        reason="Evicted",
        message="The node was low on resource: memory.",
        node="node-a",
        version=17,
        created_at=at(0),
        scheduled_at=at(5),
        delete_requested_at=at(60),
        delete_deadline=at(150),
        disruption="TerminationByKubelet",
        disrupted_at=at(60),
        container=ContainerObservation(
            state=ContainerState.TERMINATED,
            reason="OOMKilled",
            message="{}",
            exit_code=137,
            started_at=at(5),
            finished_at=at(60),
            image_id="trainer@sha256:2",
        ),
        memory_limit="64Gi",
        checkpoint_time=FINISHED,
    )
    assert parsed(pod) == expected
    left_out = {field.name for field in fields(expected) if not getattr(expected, field.name)}
    # The operator itself measures `start_error_seconds`; no manifest has it.
    assert left_out == {"unschedulable", "start_error_seconds"}, "set the new field in the manifest and in `expected`"


@pytest.mark.parametrize("seconds", [10**9, 10**11, 2**63 - 1])
def test_a_pod_that_was_deleted_with_a_grace_period_of_millennia_can_be_read(seconds: int) -> None:
    pod = manifest()
    pod["metadata"] |= {"deletionTimestamp": "2318-11-24T12:02:30Z", "deletionGracePeriodSeconds": seconds}
    assert parsed(pod).delete_deadline == datetime(2318, 11, 24, 12, 2, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    "label",
    ["", "x", "-1", "1.0", "\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 10**6],
    ids=["empty", "a letter", "negative", "a fraction", "a superscript", "an Arabic digit", "a megabyte of digits"],
)
def test_a_pod_whose_labels_are_no_numbers_is_no_pod_of_a_job(label: str) -> None:
    for name in (ATTEMPT, REPLICA_INDEX, PREFLIGHT):
        pod = manifest()
        pod["metadata"]["labels"][name] = label
        assert (parse_preflight_pod if name == PREFLIGHT else parse_pod)(pod) is None


def test_a_pod_without_a_node_says_why() -> None:
    message = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."
    pod = parsed(manifest(conditions=[{"type": "PodScheduled", "status": "False", "message": message}]))
    assert (pod.unschedulable, pod.scheduled_at, pod.phase, pod.container) == (message, None, "Pending", None)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"running": {"startedAt": STARTED}}, (ContainerState.RUNNING, "", at(5))),
        (
            {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}},
            (ContainerState.WAITING, "not found", None),
        ),
    ],
)
def test_a_container_that_has_not_ended_has_no_exit_code(state: dict[str, Any], expected: tuple[Any, ...]) -> None:
    observed = parsed(manifest(containerStatuses=container(**state))).container
    assert observed is not None
    assert (observed.state, observed.message, observed.started_at) == expected
    assert observed.exit_code is None


def test_the_labels_say_whose_pod_it_is() -> None:
    preflight = manifest()
    preflight["metadata"]["labels"] = {PREFLIGHT: "3"}
    assert parse_pod(preflight) is None
    observed = parse_preflight_pod(preflight)
    assert observed is not None
    assert (observed.attempt, observed.index) == (0, 3)
    assert parse_preflight_pod(manifest()) is None
