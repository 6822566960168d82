"""Functions that cause the events of the test cases in `table.py`. A function that gets a `Stage` causes an event in
the cluster or waits for an event, and returns the time (`time.monotonic`) at which the event was observed. `exits` and
`is_ordered` get other arguments, and return a function that gets a `Stage`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.e2e.rows.observer import Manifest
from tests.e2e.rows.row import condition
from tests.e2e.rows.stage import Stage, training_state


def exits(code: int, worker: int = 1) -> Callable[[Stage], float]:
    """Return a function that waits until the trainer of worker ``worker`` has exited with ``code``. The job's script
    causes the exit."""
    return lambda stage: stage.ended(worker, code)


def is_deleted(stage: Stage) -> float:
    """Delete the running pod of worker 1, as a person does."""
    stage.both_pods_run()
    stage.delete_pod(1)
    return stage.pod_deleted(1)


def is_deleted_by_force(stage: Stage) -> float:
    """Delete the running pod of worker 1 with `--force --grace-period=0`, as a person does."""
    stage.both_pods_run()
    stage.delete_pod(1, force=True)
    return stage.pod_deleted(1)


def is_deleted_while_pending(stage: Stage) -> float:
    """Delete the pod of worker 1, which is not scheduled yet, as a person does."""
    stage.job("both pods recorded", lambda job: len(job["status"]["attempts"].get("current", {}).get("pods", [])) == 2)
    stage.delete_pod(1)
    return stage.pod_deleted(1)


def is_evicted(stage: Stage) -> float:
    """Evict the running pod of worker 1 through the eviction API, as `kubectl drain` does."""
    stage.both_pods_run()
    stage.evict_pod(1)
    return stage.pod_deleted(1)


def outgrows_its_disk(stage: Stage) -> float:
    """Wait until the kubelet evicts the pod of worker 1, because a volume of the pod has outgrown its size limit."""
    return stage.pod(1, "its eviction", lambda pod: pod["status"].get("reason") == "Evicted").at


def cannot_be_pulled(stage: Stage) -> float:
    """Wait until the kubelet has failed to pull the image of both pods. Return the time of the first failure."""

    def failing(pod: Manifest) -> bool:
        return "Pull" in training_state(pod).get("waiting", {}).get("reason", "")

    return min(stage.pod(worker, "the failed pull", failing).at for worker in (0, 1))


def cannot_be_started(stage: Stage) -> float:
    """Wait until the container runtime has failed to start the program of worker 0. Return the time at which the
    failure was observed."""

    def failed(pod: Manifest) -> bool:
        end = training_state(pod).get("terminated", {})
        return (end.get("exitCode"), end.get("reason")) == (128, "StartError")

    return stage.pod(0, "the start error", failed).at


def begins(stage: Stage) -> float:
    """Wait until attempt 1 begins. This function is for jobs whose pods never run. Nothing else has to happen to these
    jobs, because they end at their deadline."""
    return stage.job("attempt 1", lambda job: job["status"]["attempts"]["started"] == 1).at


def runs_on(stage: Stage) -> float:
    """Wait until both training containers run, and return the time at which the first of them was seen running. This
    function is for jobs whose scripted trainer never ends by itself. Nothing else has to happen to these jobs, because
    they end at their deadline."""
    running = [
        stage.pod(worker, "its container to run", lambda pod: training_state(pod).get("running")) for worker in (0, 1)
    ]
    return min(seen.at for seen in running)


def is_ordered(**run_policy: Any) -> Callable[[Stage], float]:
    """Return a function that changes fields of `runPolicy` while both pods run, as a person does."""

    def order(stage: Stage) -> float:
        stage.both_pods_run()
        return stage.change_run_policy(**run_policy)

    return order


def is_suspended_and_resumed(stage: Stage) -> float:
    """Suspend the job as a person does, and resume the job after its pods are gone. Return the time at which the job
    was resumed."""
    is_ordered(suspend=True)(stage)
    for worker in (0, 1):
        stage.pod_gone(worker)
    stage.job("the pause", lambda job: condition(job, "Succeeded")["reason"] == "Suspended")
    return stage.change_run_policy(suspend=False)


def outlived_by_its_sidecar(stage: Stage) -> float:
    """Wait until the training containers of both pods have ended with exit code 0. The sidecar containers of the pods
    keep running."""
    return max(stage.ended(worker, 0) for worker in (0, 1))


def is_deleted_again_and_again(stage: Stage) -> float:
    """Delete the pod of worker 1 in each of the first four attempts, as a person does. No attempt has committed a
    checkpoint before its pod is deleted."""
    at = 0.0
    for attempt in (1, 2, 3, 4):
        stage.both_pods_run(attempt)
        stage.delete_pod(1, attempt=attempt)
        at = stage.pod_deleted(1, attempt=attempt)
    return at
