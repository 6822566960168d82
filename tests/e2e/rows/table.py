"""The test cases for those rows of the verdict table in docs/architecture.md that need only one node. `make test` runs
the cases in FAST, and `make test-long` runs those in SLOW."""

from __future__ import annotations

import sys
from dataclasses import replace

from finetune_core.contract import EvaluationRecord, Outcome, ScoreRecord
from tests.cluster.until_term import RUNS
from tests.e2e.rows import sidecar
from tests.e2e.rows.faults import (
    begins,
    cannot_be_pulled,
    cannot_be_started,
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
from tests.e2e.rows.scripts import DONE, FILLS_ITS_MEMORY, NO_PROGRAM, at_first, says
from tests.e2e.rows.shapes import charged, free, permanent
from tests.e2e.rows.stage import Stage

ANY_LOSS = "PodDeleted|PodVanished|PodReplaced"
"""Possible reasons of an attempt that ends because a pod was deleted, if the API server removes this pod at once. It
depends on chance what the operator sees first: the pod's deletionTimestamp, that the pod is missing, or the new pod
that the training-operator has created instead."""
PENDING_SECONDS = ACTIVE_SECONDS = 60.0
"""The values of `pendingDeadlineSeconds` and of `activeDeadlineSeconds` in the test cases. The API allows no shorter
deadlines."""


UNREACHED = "evaluation.require: perplexity must be at most 1.2 and is 1.5"
SCORED = EvaluationRecord(
    rows="Validation", examples=8, base=ScoreRecord(perplexity=48.2), tuned=ScoreRecord(perplexity=1.5), tuned_step=100
)
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


def _has_half_the_micro_batch(stage: Stage, job: Manifest) -> None:
    assert job["status"]["attempts"]["memoryHalvings"] == 1
    plan = job["status"]["plan"]
    assert (plan["microBatchSize"], plan["gradientAccumulationSteps"]) == (2, 2), plan


def _tells_the_verdict(stage: Stage, job: Manifest) -> None:
    """Assert that the status has the artifact, and says that the model did not reach the required score. Assert that
    `finetune watch` says so too, and ends with exit code 3, which no other end of a job has."""
    assert job["status"]["artifact"]["step"] == 100
    evaluation = job["status"]["evaluation"]
    assert evaluation["passed"] is False
    assert evaluation["requirements"] == [
        {
            "score": "perplexity",
            "atMost": "1.2",
            "betterThanBase": True,
            "base": "48.2",
            "tuned": "1.5",
            "difference": "-46.7",
            "passed": False,
        }
    ]
    command = [sys.executable, "-m", "finetune_cli", "watch", job["metadata"]["name"], "-n", stage.namespace]
    watched = stage.cluster.run(command, check=False, timeout=60)
    assert watched.returncode == 3, watched
    assert (
        "required perplexity at most 1.2, better than the base model: failed (base 48.2, tuned 1.5, difference -46.7)"
        in watched.stdout
    )
    assert f"GateFailed: {UNREACHED}" in watched.stderr


FAST = (
    charged("exit 1", "Crashed", at_first("exit 1"), exits(1), words=("exit code 1",)),
    permanent(
        "a required score that is not reached",
        "GateFailed",
        says(Outcome.GATE_FAILED, UNREACHED, artifact=True, evaluation=SCORED),
        exits(0),
        spec={"evaluation": {"require": [{"score": "perplexity", "atMost": "1.2", "betterThanBase": True}]}},
        words=(UNREACHED,),
        check=_tells_the_verdict,
    ),
    permanent("exit 64", "BadInput", at_first(says(Outcome.BAD_INPUT, MISSING)), exits(64), words=(MISSING,)),
    charged("exit 75", "OutsideFailure", at_first(says(Outcome.OUTSIDE_FAILURE, OUTSIDE)), exits(75), words=(OUTSIDE,)),
    charged(
        "killed at its memory limit",
        "OutOfMemory",
        at_first(FILLS_ITS_MEMORY),
        exits(137),
        spec={"training": {"maxSteps": 100, "globalBatchSize": 8, "microBatchSize": 4}},
        words=("a micro-batch of 2 instead of 4", "memory limit of 100Mi", "resources.memory"),
        check=_has_half_the_micro_batch,
    ),
    permanent(
        "killed at its memory limit with the smallest micro-batch",
        "OutOfMemory",
        at_first(FILLS_ITS_MEMORY),
        exits(137),
        spec={"training": {"maxSteps": 100, "globalBatchSize": 8, "microBatchSize": 1}},
        words=("the micro-batch has one example", "memory limit of 100Mi", "resources.memory"),
    ),
    free(
        "evicted through the eviction API",
        "EvictionByEvictionAPI",
        at_first(RUNS),
        is_evicted,
        words=("{worker_1}", "EvictionByEvictionAPI"),
    ),
    free("pod deleted", "PodDeleted", at_first(RUNS), is_deleted, words=("{worker_1}", "was deleted")),
    free("pod deleted by force", ANY_LOSS, at_first(RUNS), is_deleted_by_force, words=("{worker_1}",)),
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
    charged(
        "maxRetries exhausted",
        "OutsideFailure",
        at_first(says(Outcome.OUTSIDE_FAILURE, OUTSIDE), later=says(Outcome.OUTSIDE_FAILURE, OUTSIDE)),
        exits(75),
        spec={"runPolicy": {"maxRetries": 1}},
        attempts=2 * (("Charged", "OutsideFailure"),),
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
    free(
        "suspended, then resumed",
        "Suspended",
        at_first(RUNS, worker=None),
        is_suspended_and_resumed,
        milestones=(next_attempt(SEEN),),
    ),
    permanent(
        "cancelled",
        "Cancelled",
        RUNS,
        is_ordered(cancel=True),
        words=("runPolicy.cancel",),
        milestones=(accounted(SEEN), end(SEEN + ENDING)),
    ),
)


def _outlived(stage: Stage, job: Manifest) -> None:
    for worker in (0, 1):
        running = stage.pod(worker, "two containers", lambda pod: len(pod["spec"]["containers"]) == 2).object
        assert {container["name"] for container in running["spec"]["containers"]} == {"pytorch", "mesh"}
    assert stage.cluster.get("pytorchjobs", "-n", stage.namespace)["items"] == [], "nothing may hold the GPUs"


SLOW = (
    permanent(
        "image that cannot be pulled, pendingDeadlineSeconds 60",
        "DeadlineExceeded",
        DONE,
        begins,
        spec={"podTemplate": {"image": IMAGE}, "runPolicy": {"pendingDeadlineSeconds": int(PENDING_SECONDS)}},
        words=("pendingDeadlineSeconds", "can't be pulled", IMAGE),
        milestones=(accounted(PENDING_SECONDS + SEEN), end(PENDING_SECONDS + SEEN + ENDING)),
    ),
    permanent(
        "pods that no node takes, pendingDeadlineSeconds 60",
        "DeadlineExceeded",
        DONE,
        begins,
        spec={"podTemplate": NOWHERE, "runPolicy": {"pendingDeadlineSeconds": int(PENDING_SECONDS)}},
        words=("pendingDeadlineSeconds", "didn't match Pod's node affinity/selector"),
        milestones=(accounted(PENDING_SECONDS + SEEN), end(PENDING_SECONDS + SEEN + ENDING)),
    ),
    permanent(
        "activeDeadlineSeconds 60 used up",
        "DeadlineExceeded",
        RUNS,
        runs_on,
        spec={"runPolicy": {"activeDeadlineSeconds": int(ACTIVE_SECONDS)}},
        words=("activeDeadlineSeconds",),
        milestones=(accounted(ACTIVE_SECONDS + SEEN), end(ACTIVE_SECONDS + SEEN + ENDING)),
    ),
    permanent(
        "exit 65",
        "Diverged",
        at_first(says(Outcome.DIVERGED, "the loss is not finite at step 7")),
        exits(65),
        words=("step 7",),
    ),
    charged(
        "evicted by the kubelet for its own disk use",
        "Evicted",
        at_first(f"dd if=/dev/zero of=/cache/x bs=1024 count=8192; {RUNS}"),
        outgrows_its_disk,
        spec={"podTemplate": {"volumes": [SMALL_DISK]}},
        words=("{worker_1}", "exceeds the limit"),
    ),
    Row(
        name="image whose program does not exist",
        script=DONE,
        spec={"podTemplate": {"image": NO_PROGRAM.name}, "runPolicy": {"maxRetries": 1}},
        fault=cannot_be_started,
        attempts=(*3 * (("Free", "NodeRefused"),), *2 * (("Charged", "NodeRefused"),)),
        words=("StartError", "no-such-program"),
        final=("False", "RetriesExhausted"),
        milestones=(*RETRIED, end(5 * (STARTING + SEEN + LEAVE_TOGETHER) + (1 + 2 + 4 + 8) * BACKOFF)),
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
