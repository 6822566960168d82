"""The rows: every way to fail that the verdict table of docs/architecture.md knows and that needs one node only. Fast
ones for every test run, slow ones for the long one."""

from __future__ import annotations

from dataclasses import replace

from finetune_core.contract import Outcome
from tests.e2e.rows import sidecar
from tests.e2e.rows.faults import (
    begins,
    cannot_be_pulled,
    exits,
    is_deleted,
    is_deleted_again_and_again,
    is_deleted_by_force,
    is_deleted_while_pending,
    is_evicted,
    is_ordered,
    is_suspended_and_resumed,
    outgrows_its_disk,
    outlived_by_its_sidecar,
    runs_on,
)
from tests.e2e.rows.milestones import (
    BACKOFF,
    BETWEEN_SENTENCES,
    ENDING,
    LEAVE_TOGETHER,
    PODS_GONE,
    RETRIED,
    SEEN,
    SIDECAR_SECONDS,
    STARTING,
    accounted,
    end,
    next_attempt,
    says_in_running,
)
from tests.e2e.rows.observer import Manifest
from tests.e2e.rows.row import Row, condition, on_job
from tests.e2e.rows.scripts import DONE, FILLS_ITS_MEMORY, RUNS, at_first, says
from tests.e2e.rows.stage import Stage

ANY_LOSS = "PodDeleted|PodVanished|PodReplaced"
"""A pod that is gone at once. The API server writes its deletionTimestamp and removes it in a second write: what is
seen first is that mark, its absence, or the pod that training-operator made instead."""
PENDING_SECONDS = ACTIVE_SECONDS = 60.0
"""The shortest that the API allows."""


def charged_then_done(reason: str) -> tuple[tuple[str, str], ...]:
    """Return the attempts of a job whose first one was charged and whose second one was done."""
    return (("Charged", reason), ("Succeeded", "Completed"))


def free_then_done(reason: str) -> tuple[tuple[str, str], ...]:
    """Return the attempts of a job whose first one was free and whose second one was done."""
    return (("Free", reason), ("Succeeded", "Completed"))


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
        attempts=charged_then_done("Crashed"),
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
        attempts=charged_then_done("OutsideFailure"),
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
        attempts=free_then_done("EvictionByEvictionAPI"),
        words=("{worker_1}", "EvictionByEvictionAPI"),
        milestones=RETRIED,
    ),
    Row(
        name="pod deleted",
        script=at_first(RUNS),
        fault=is_deleted,
        attempts=free_then_done("PodDeleted"),
        words=("{worker_1}", "was deleted"),
        milestones=RETRIED,
    ),
    Row(
        name="pod deleted by force",
        script=at_first(RUNS),
        fault=is_deleted_by_force,
        attempts=free_then_done(ANY_LOSS),
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
        attempts=free_then_done("Suspended"),
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


def _outlived(stage: Stage, job: Manifest) -> None:
    for worker in (0, 1):
        running = stage.pod(worker, "two containers", lambda pod: len(pod["spec"]["containers"]) == 2).object
        assert {container["name"] for container in running["spec"]["containers"]} == {"pytorch", "mesh"}
    assert stage.cluster.get("pytorchjobs", "-n", stage.namespace)["items"] == [], "nothing may hold the GPUs"


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
        attempts=charged_then_done("Evicted"),
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
