"""The rows: every way to fail that the verdict table of docs/architecture.md knows, with the times that are designed.

Where the times come from: what is seen is written at once (2 s: a look at the job and a write), but a sentence that
changes alone waits until 10 s have passed since the last write; an attempt is closed once its pods have ended, at the
latest 10 s after the cause; the next starts after a back-off of 10 s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from finetune_core.contract import Outcome
from tests.e2e.rows import sidecar
from tests.e2e.rows.observer import Manifest
from tests.e2e.rows.row import Milestone, Row, condition, on_job, settled
from tests.e2e.rows.scripts import DONE, FILLS_ITS_MEMORY, RUNS, at_first, says
from tests.e2e.rows.stage import Stage, training_state

SEEN = 2.0
BETWEEN_SENTENCES = 10.0
LEAVE_TOGETHER = 10.0
BACKOFF = 10.0
SIDECAR_SECONDS = 60.0
STARTING = 5.0
"""Two small pods from their creation until their script runs."""
ENDING = 5.0
"""Two small pods from SIGTERM until they are gone."""
ANY_LOSS = "PodVanished|PodReplaced"
"""A pod that is gone at once: what is seen first is its absence or the one that training-operator made instead."""


def cause(bound: float = SEEN) -> Milestone:
    """Return the milestone at which the status says why the attempt ends."""

    def reached(job: Manifest) -> bool:
        attempts = job["status"]["attempts"]
        return bool(attempts["recent"] or attempts.get("current", {}).get("cause"))

    return on_job("cause recorded", bound, reached)


def accounted(bound: float = SEEN + LEAVE_TOGETHER) -> Milestone:
    """Return the milestone at which the attempt is closed and counted."""
    return on_job("attempt accounted", bound, lambda job: job["status"]["attempts"]["recent"])


def next_attempt(bound: float = SEEN + LEAVE_TOGETHER + BACKOFF + SEEN, number: int = 2) -> Milestone:
    """Return the milestone at which the next attempt has begun."""
    name = f"attempt {number} started"
    return on_job(name, bound, lambda job: job["status"]["attempts"]["started"] == number)


def end(bound: float = SEEN) -> Milestone:
    """Return the milestone at which the job has ended."""
    return on_job("job ended", bound, settled)


def says_in_running(*words: str, bound: float) -> Milestone:
    """Return the milestone at which the condition Running tells what the job waits for."""
    return on_job("cause told", bound, lambda job: all(word in condition(job, "Running")["message"] for word in words))


PODS_GONE = Milestone(
    "pods gone", SEEN + ENDING, lambda stage, timeout: max(stage.pod_gone(worker, timeout) for worker in (0, 1))
)
RETRIED = (cause(), accounted(), next_attempt())
CHARGED_THEN_DONE = lambda reason: (("Charged", reason), ("Succeeded", "Completed"))  # noqa: E731
FREE_THEN_DONE = lambda reason: (("Free", reason), ("Succeeded", "Completed"))  # noqa: E731


# Faults


def exits(code: int, worker: int = 1):
    """The trainer of a worker ends by itself."""
    return lambda stage: stage.ended(worker, code)


def is_deleted(stage: Stage) -> float:
    """A person deletes a running pod."""
    stage.both_pods_run()
    stage.delete_pod(1)
    return stage.pod(1, "its deletion", lambda pod: "deletionTimestamp" in pod["metadata"]).at


def is_deleted_by_force(stage: Stage) -> float:
    """A person deletes a running pod without waiting for its end."""
    stage.both_pods_run()
    stage.delete_pod(1, force=True)
    return stage.pod_gone(1)


def is_deleted_while_pending(stage: Stage) -> float:
    """A person deletes a pod that has no node yet."""
    stage.job("both pods recorded", lambda job: len(job["status"]["attempts"].get("current", {}).get("pods", [])) == 2)
    stage.delete_pod(1)
    return stage.pod_gone(1)


def is_evicted(stage: Stage) -> float:
    """A drain evicts a running pod."""
    stage.both_pods_run()
    stage.evict_pod(1)
    return stage.pod(1, "its eviction", lambda pod: "deletionTimestamp" in pod["metadata"]).at


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


# Rows

OUTSIDE = "storage.endpoint: nobody answered for 600 s"
MISSING = "dataset.train: column meaning must exist"
IMAGE = "registry.invalid/nobody:1"
NOWHERE = {"nodeSelector": {"example.com/rack": "nowhere"}}
SMALL_DISK = {"name": "cache", "mountPath": "/cache", "emptyDir": {"sizeLimit": "1Mi"}}


def _starting(stage: Stage, job: Manifest) -> None:
    assert condition(job, "Succeeded")["reason"] == "Starting", job["status"]["conditions"]


def _rests(stage: Stage, job: Manifest) -> None:
    assert condition(job, "Succeeded")["reason"] == "Suspended", job["status"]["conditions"]
    assert stage.cluster.get("pytorchjobs", "-n", stage.namespace)["items"] == []


FAST = (
    Row(
        name="exit 1",
        script=at_first("exit 1"),
        fault=exits(1),
        attempts=CHARGED_THEN_DONE("Crashed"),
        words=("exit code 1",),
        milestones=RETRIED,
    ),
    Row(
        name="exit 64",
        script=at_first(says(Outcome.BAD_INPUT, MISSING)),
        fault=exits(64),
        attempts=(("Permanent", "BadInput"),),
        words=(MISSING,),
        final=("False", "BadInput"),
        milestones=(end(),),
    ),
    Row(
        name="exit 75",
        script=at_first(says(Outcome.OUTSIDE_FAILURE, OUTSIDE)),
        fault=exits(75),
        attempts=CHARGED_THEN_DONE("OutsideFailure"),
        words=(OUTSIDE,),
        milestones=RETRIED,
    ),
    Row(
        name="killed at its memory limit",
        script=at_first(FILLS_ITS_MEMORY),
        fault=exits(137),
        attempts=(("Permanent", "OutOfMemory"),),
        words=("resources.memory",),
        final=("False", "OutOfMemory"),
        milestones=(end(),),
    ),
    Row(
        name="evicted through the eviction API",
        script=at_first(RUNS),
        fault=is_evicted,
        attempts=FREE_THEN_DONE("EvictionByEvictionAPI"),
        words=("{worker_1}", "EvictionByEvictionAPI"),
        milestones=RETRIED,
    ),
    Row(
        name="pod deleted",
        script=at_first(RUNS),
        fault=is_deleted,
        attempts=FREE_THEN_DONE("PodDeleted"),
        words=("{worker_1}", "was deleted"),
        milestones=RETRIED,
    ),
    Row(
        name="pod deleted by force",
        script=at_first(RUNS),
        fault=is_deleted_by_force,
        attempts=FREE_THEN_DONE(ANY_LOSS),
        words=("{worker_1}",),
        milestones=RETRIED,
    ),
    Row(
        name="pod deleted while Pending",
        script=DONE,
        spec={"podTemplate": NOWHERE},
        fault=is_deleted_while_pending,
        attempts=(("Free", ANY_LOSS),),
        words=("{worker_1}",),
        final=None,
        milestones=RETRIED,
    ),
    Row(
        name="image that cannot be pulled",
        script=DONE,
        spec={"podTemplate": {"image": IMAGE}},
        fault=cannot_be_pulled,
        attempts=(),
        final=None,
        milestones=(says_in_running("can't be pulled", IMAGE, bound=BETWEEN_SENTENCES + SEEN),),
        check=_starting,
    ),
    Row(
        name="maxRetries exhausted",
        script=at_first(says(Outcome.OUTSIDE_FAILURE, OUTSIDE), later=says(Outcome.OUTSIDE_FAILURE, OUTSIDE)),
        spec={"runPolicy": {"maxRetries": 1}},
        fault=exits(75),
        attempts=(("Charged", "OutsideFailure"), ("Charged", "OutsideFailure")),
        words=(OUTSIDE,),
        final=("False", "RetriesExhausted"),
        milestones=(*RETRIED, end(2 * (SEEN + LEAVE_TOGETHER) + BACKOFF + STARTING)),
    ),
    Row(
        name="suspended",
        script=RUNS,
        fault=is_ordered(suspend=True),
        attempts=(("Free", "Suspended"),),
        words=("runPolicy.suspend",),
        final=None,
        open_attempts=0,
        milestones=(accounted(SEEN), PODS_GONE),
        check=_rests,
    ),
    Row(
        name="suspended, then resumed",
        script=at_first(RUNS, worker=None),
        fault=is_suspended_and_resumed,
        attempts=FREE_THEN_DONE("Suspended"),
        milestones=(next_attempt(SEEN),),
    ),
    Row(
        name="cancelled",
        script=RUNS,
        fault=is_ordered(cancel=True),
        attempts=(("Permanent", "Cancelled"),),
        words=("runPolicy.cancel",),
        final=("False", "Cancelled"),
        milestones=(accounted(SEEN), end(SEEN + ENDING)),
    ),
)


# Slow rows

PENDING_SECONDS = ACTIVE_SECONDS = 60.0
"""The shortest that the API allows."""


def outlived_by_its_sidecar(stage: Stage) -> float:
    """Training ends in every pod while a mesh's container runs on."""
    return max(stage.ended(worker, 0) for worker in (0, 1))


def _outlived(stage: Stage, job: Manifest) -> None:
    for worker in (0, 1):
        running = stage.pod(worker, "two containers", lambda pod: len(pod["spec"]["containers"]) == 2).object
        assert {container["name"] for container in running["spec"]["containers"]} == {"pytorch", "mesh"}
    assert stage.cluster.get("pytorchjobs", "-n", stage.namespace)["items"] == [], "nothing may hold the GPUs"


def is_deleted_again_and_again(stage: Stage) -> float:
    """A person deletes a pod of each of four attempts in a row, none of which committed a checkpoint."""
    at = 0.0
    for attempt in (1, 2, 3, 4):
        stage.both_pods_run(attempt)
        stage.delete_pod(1, attempt=attempt)
        at = stage.pod(1, "its deletion", lambda pod: "deletionTimestamp" in pod["metadata"], attempt=attempt).at
    return at


SLOW = (
    Row(
        name="image that cannot be pulled, pendingDeadlineSeconds 60",
        script=DONE,
        spec={"podTemplate": {"image": IMAGE}, "runPolicy": {"pendingDeadlineSeconds": int(PENDING_SECONDS)}},
        fault=begins,
        attempts=(("Permanent", "DeadlineExceeded"),),
        words=("pendingDeadlineSeconds", "can't be pulled", IMAGE),
        final=("False", "DeadlineExceeded"),
        milestones=(accounted(PENDING_SECONDS + SEEN), end(PENDING_SECONDS + SEEN + ENDING)),
    ),
    Row(
        name="pods that no node takes, pendingDeadlineSeconds 60",
        script=DONE,
        spec={"podTemplate": NOWHERE, "runPolicy": {"pendingDeadlineSeconds": int(PENDING_SECONDS)}},
        fault=begins,
        attempts=(("Permanent", "DeadlineExceeded"),),
        words=("pendingDeadlineSeconds", "didn't match Pod's node affinity/selector"),
        final=("False", "DeadlineExceeded"),
        milestones=(accounted(PENDING_SECONDS + SEEN), end(PENDING_SECONDS + SEEN + ENDING)),
    ),
    Row(
        name="activeDeadlineSeconds 60 used up",
        script=RUNS,
        spec={"runPolicy": {"activeDeadlineSeconds": int(ACTIVE_SECONDS)}},
        fault=runs_on,
        attempts=(("Permanent", "DeadlineExceeded"),),
        words=("activeDeadlineSeconds",),
        final=("False", "DeadlineExceeded"),
        milestones=(accounted(ACTIVE_SECONDS + SEEN), end(ACTIVE_SECONDS + SEEN + ENDING)),
    ),
    Row(
        name="exit 65",
        script=at_first(says(Outcome.DIVERGED, "the loss is not finite at step 7")),
        fault=exits(65),
        attempts=(("Permanent", "Diverged"),),
        words=("step 7",),
        final=("False", "Diverged"),
        milestones=(end(),),
    ),
    Row(
        name="evicted by the kubelet for its own disk use",
        script=at_first(f"dd if=/dev/zero of=/cache/x bs=1024 count=8192; {RUNS}"),
        spec={"podTemplate": {"volumes": [SMALL_DISK]}},
        fault=outgrows_its_disk,
        attempts=CHARGED_THEN_DONE("Evicted"),
        words=("{worker_1}", "exceeds the limit"),
        milestones=RETRIED,
    ),
    Row(
        name="sidecar that never ends",
        script=DONE,
        labels={sidecar.LABEL: "inject"},
        fault=outlived_by_its_sidecar,
        attempts=(("Succeeded", "Completed"),),
        milestones=(
            end(),
            replace(PODS_GONE, bound=SIDECAR_SECONDS + SEEN + ENDING),
        ),
        check=_outlived,
    ),
    Row(
        name="pod deleted in four attempts in a row",
        script=RUNS,
        fault=is_deleted_again_and_again,
        attempts=(*3 * (("Free", "PodDeleted"),), ("Charged", "PodDeleted")),
        words=("{worker_1}",),
        final=None,
        milestones=(
            on_job(
                "the fourth is charged",
                SEEN + LEAVE_TOGETHER,
                lambda job: job["status"]["attempts"]["charged"] == 1,
            ),
            next_attempt(SEEN + LEAVE_TOGETHER + 8 * BACKOFF + SEEN, number=5),
        ),
    ),
)
