"""The faults of the rows. Each function causes a fault, or waits for the fault, and returns the time at which the fault
was observed (`time.monotonic`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.e2e.rows.observer import Manifest
from tests.e2e.rows.row import condition
from tests.e2e.rows.stage import Stage, training_state


def exits(code: int, worker: int = 1) -> Callable[[Stage], float]:
    """Return a fault: the trainer of one worker exits with ``code``."""
    return lambda stage: stage.ended(worker, code)


def is_deleted(stage: Stage) -> float:
    """A person deletes a running pod."""
    stage.both_pods_run()
    stage.delete_pod(1)
    return stage.pod_deleted(1)


def is_deleted_by_force(stage: Stage) -> float:
    """A person deletes a running pod with `--force --grace-period=0`."""
    stage.both_pods_run()
    stage.delete_pod(1, force=True)
    return stage.pod_deleted(1)


def is_deleted_while_pending(stage: Stage) -> float:
    """A person deletes a pod that is not scheduled yet."""
    stage.job("both pods recorded", lambda job: len(job["status"]["attempts"].get("current", {}).get("pods", [])) == 2)
    stage.delete_pod(1)
    return stage.pod_deleted(1)


def is_evicted(stage: Stage) -> float:
    """The eviction API evicts a running pod, as `kubectl drain` does."""
    stage.both_pods_run()
    stage.evict_pod(1)
    return stage.pod_deleted(1)


def outgrows_its_disk(stage: Stage) -> float:
    """The kubelet evicts a pod whose volume outgrew its size limit."""
    return stage.pod(1, "its eviction", lambda pod: pod["status"].get("reason") == "Evicted").at


def cannot_be_pulled(stage: Stage) -> float:
    """The kubelet can't pull the image."""

    def failing(pod: Manifest) -> bool:
        return "Pull" in training_state(pod).get("waiting", {}).get("reason", "")

    return min(stage.pod(worker, "the failed pull", failing).at for worker in (0, 1))


def begins(stage: Stage) -> float:
    """Return the time at which attempt 1 begins. The pods of the row never run, so that the row needs no other
    fault."""
    return stage.job("attempt 1", lambda job: job["status"]["attempts"]["started"] == 1).at


def runs_on(stage: Stage) -> float:
    """Return the time at which the first training container runs. The scripted trainer of the row never ends by
    itself."""
    running = [
        stage.pod(worker, "its container to run", lambda pod: training_state(pod).get("running")) for worker in (0, 1)
    ]
    return min(seen.at for seen in running)


def is_ordered(**run_policy: Any) -> Callable[[Stage], float]:
    """Return a fault: a person changes fields of `runPolicy` while both pods run."""

    def order(stage: Stage) -> float:
        stage.both_pods_run()
        return stage.change_run_policy(**run_policy)

    return order


def is_suspended_and_resumed(stage: Stage) -> float:
    """A person suspends the job, and resumes the job after its pods are gone. The returned time is the time of
    resuming."""
    is_ordered(suspend=True)(stage)
    for worker in (0, 1):
        stage.pod_gone(worker)
    stage.job("the pause", lambda job: condition(job, "Succeeded")["reason"] == "Suspended")
    return stage.change_run_policy(suspend=False)


def outlived_by_its_sidecar(stage: Stage) -> float:
    """The training containers of all pods end while the sidecar containers keep running."""
    return max(stage.ended(worker, 0) for worker in (0, 1))


def is_deleted_again_and_again(stage: Stage) -> float:
    """A person deletes a pod in each of four attempts in a row, before any attempt has committed a checkpoint."""
    at = 0.0
    for attempt in (1, 2, 3, 4):
        stage.both_pods_run(attempt)
        stage.delete_pod(1, attempt=attempt)
        at = stage.pod_deleted(1, attempt=attempt)
    return at
