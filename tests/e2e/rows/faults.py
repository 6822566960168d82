"""How the fault of a row comes about: each function brings it about, or waits for it, and returns the moment at which
it was seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.e2e.rows.observer import Manifest
from tests.e2e.rows.row import condition
from tests.e2e.rows.stage import Stage, training_state


def exits(code: int, worker: int = 1) -> Callable[[Stage], float]:
    """The trainer of a worker ends by itself."""
    return lambda stage: stage.ended(worker, code)


def is_deleted(stage: Stage) -> float:
    """A person deletes a running pod."""
    stage.both_pods_run()
    stage.delete_pod(1)
    return stage.pod_deleted(1)


def is_deleted_by_force(stage: Stage) -> float:
    """A person deletes a running pod without waiting for its end."""
    stage.both_pods_run()
    stage.delete_pod(1, force=True)
    return stage.pod_deleted(1)


def is_deleted_while_pending(stage: Stage) -> float:
    """A person deletes a pod that has no node yet."""
    stage.job("both pods recorded", lambda job: len(job["status"]["attempts"].get("current", {}).get("pods", [])) == 2)
    stage.delete_pod(1)
    return stage.pod_deleted(1)


def is_evicted(stage: Stage) -> float:
    """A drain evicts a running pod."""
    stage.both_pods_run()
    stage.evict_pod(1)
    return stage.pod_deleted(1)


def outgrows_its_disk(stage: Stage) -> float:
    """The kubelet evicts a pod that wrote more than it may."""
    return stage.pod(1, "its eviction", lambda pod: pod["status"].get("reason") == "Evicted").at


def cannot_be_pulled(stage: Stage) -> float:
    """The kubelet fails to pull the image."""

    def failing(pod: Manifest) -> bool:
        return "Pull" in training_state(pod).get("waiting", {}).get("reason", "")

    return min(stage.pod(worker, "the failed pull", failing).at for worker in (0, 1))


def begins(stage: Stage) -> float:
    """Nothing but the first attempt's beginning: what it waits for never comes."""
    return stage.job("attempt 1", lambda job: job["status"]["attempts"]["started"] == 1).at


def runs_on(stage: Stage) -> float:
    """Training goes on and on from the moment at which the first pod runs."""
    running = [
        stage.pod(worker, "its container to run", lambda pod: training_state(pod).get("running")) for worker in (0, 1)
    ]
    return min(seen.at for seen in running)


def is_ordered(**run_policy: Any) -> Callable[[Stage], float]:
    """A person changes runPolicy while both pods run."""

    def order(stage: Stage) -> float:
        stage.both_pods_run()
        return stage.change_run_policy(**run_policy)

    return order


def is_suspended_and_resumed(stage: Stage) -> float:
    """A person suspends the job, and resumes it once its pods are gone; the moment is that of resuming."""
    is_ordered(suspend=True)(stage)
    for worker in (0, 1):
        stage.pod_gone(worker)
    stage.job("the pause", lambda job: condition(job, "Succeeded")["reason"] == "Suspended")
    return stage.change_run_policy(suspend=False)


def outlived_by_its_sidecar(stage: Stage) -> float:
    """Training ends in every pod while a mesh's container runs on."""
    return max(stage.ended(worker, 0) for worker in (0, 1))


def is_deleted_again_and_again(stage: Stage) -> float:
    """A person deletes a pod of each of four attempts in a row, none of which committed a checkpoint."""
    at = 0.0
    for attempt in (1, 2, 3, 4):
        stage.both_pods_run(attempt)
        stage.delete_pod(1, attempt=attempt)
        at = stage.pod_deleted(1, attempt=attempt)
    return at
