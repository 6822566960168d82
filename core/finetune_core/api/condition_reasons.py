"""What each condition of a FineTuneJob means, what each reason of a condition means, and what a person should do about
the reason.

`reference.py` writes the tables of docs/api.md from this module. tests/operator/test_states.py checks that the operator
sets only the conditions, statuses and reasons that are listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune_core.api.conditions import ConditionType, Reason

NOTHING = "Nothing."


@dataclass(frozen=True, slots=True)
class Explanation:
    """The meaning of a reason, and the advice to a person who sees the reason."""

    meaning: str
    advice: str = NOTHING


CONDITIONS: Mapping[ConditionType, str] = {
    ConditionType.READY: "For kstatus (Flux, `kubectl wait`): True only when the job has succeeded.",
    ConditionType.RECONCILING: "For kstatus: True until the job has ended.",
    ConditionType.STALLED: "For kstatus: True when the job ended without success and the operator tries nothing more.",
    ConditionType.ACCEPTED: "The operator can run the spec, and everything that the job needs from the cluster exists.",
    ConditionType.SCHEDULED: "All pods of the current attempt have a node.",
    ConditionType.RUNNING: "All ranks of the current attempt report.",
    ConditionType.CHECKPOINT_AVAILABLE: "At least one committed checkpoint lies in the bucket.",
    ConditionType.SUCCEEDED: "The summary: Unknown until the end; True or False is final. Its reason is the State"
    " column of `kubectl get ftj`.",
}

REASONS: Mapping[Reason, Explanation] = {
    Reason.PREFLIGHT: Explanation(
        "A small pod without GPUs checks object store, model and data before any GPU is asked for, or the operator"
        " waits for something that the check needs.",
        "The message of `Accepted` names what is missing. `runPolicy.preflight: Skip` starts without a check.",
    ),
    Reason.OUTSIDE_FAILURE: Explanation(
        "Something outside the spec is missing or refuses requests: a Secret or one of its keys, credentials, a"
        " bucket, an endpoint, a volume, an image, a quota. The operator tries again after 10 s to 5 min.",
        "Correct what the message names; then the job continues by itself.",
    ),
    Reason.QUEUED: Explanation(
        "The attempt exists, but no pod does yet: the queue of `runPolicy.queueName` holds the attempt, or a quota is"
        " used up.",
        "Wait. If this lasts, read the message. Under Kueue check the Workload of the PyTorchJob in `status.child`,"
        " and whether Kueue's configuration lists `kubeflow.org/pytorchjob`.",
    ),
    Reason.STARTING: Explanation(
        "Pods exist, but not all ranks report yet. They wait for nodes, images or volumes, or load model and data.",
        "The message says which pod waits for what.",
    ),
    Reason.RUNNING: Explanation("All ranks report; the model trains."),
    Reason.RETRYING: Explanation(
        "An attempt ended. The next attempt starts after the back-off and resumes from the newest checkpoint.",
        "Read the message and `status.attempts.recent`. A lost node needs no action, an error in the job does.",
    ),
    Reason.SUSPENDED: Explanation(
        "`runPolicy.suspend` is true, or somebody suspended the PyTorchJob. No pod runs, or the last pods save their"
        " checkpoint. A suspension does not count against `runPolicy.maxRetries`.",
        "Set `runPolicy.suspend` to false. The next attempt resumes from the checkpoint.",
    ),
    Reason.COMPLETED: Explanation(
        "The artifact is committed.", "Fetch the artifact: `finetune download NAME`, or `status.artifact.uri`."
    ),
    Reason.EARLY_STOPPED: Explanation(
        "Training stopped before its last step because the score no longer improved; the artifact is committed.",
        "Fetch the artifact: `finetune download NAME`.",
    ),
    Reason.GATE_FAILED: Explanation(
        "The model is trained and its artifact is committed, but it did not reach a score of `evaluation.require`.",
        "Read `status.evaluation.requirements`. The artifact can be fetched all the same: `finetune download NAME`.",
    ),
    Reason.BAD_INPUT: Explanation(
        "The spec or the data make the job impossible; the message names the field, or the file and line.",
        "Correct the job or the data, and create the job again. `finetune validate` finds mistakes that can be found"
        " without the data.",
    ),
    Reason.DIVERGED: Explanation(
        "The loss or the gradient was not finite.",
        "Create the job again with a lower `training.learningRate`, or with `precision: fp32`.",
    ),
    Reason.OUT_OF_MEMORY: Explanation(
        "A pod or a GPU ran out of memory.",
        "Create the job again with a smaller `training.microBatchSize`, with `gradientCheckpointing`, a higher"
        " `deepspeed.zeroStage`, or more `resources`.",
    ),
    Reason.RETRIES_EXHAUSTED: Explanation(
        "All retries of `runPolicy.maxRetries` failed too. The message holds the last cause.",
        "Read `status.attempts.recent` and the trainer's log. The checkpoints stay: a new job with the same name and"
        " training, or with the same `storage.runId`, resumes from them.",
    ),
    Reason.DEADLINE_EXCEEDED: Explanation(
        "`runPolicy.activeDeadlineSeconds` of running pods were used up, or an attempt's pods did not all run within"
        " `runPolicy.pendingDeadlineSeconds`; the message says which, and what was waited for.",
        "Remove the cause of the wait, or create the job again with a longer deadline. The checkpoints stay:"
        " with the same name and training it resumes from them.",
    ),
    Reason.CANCELLED: Explanation(
        "`runPolicy.cancel` is true. While `Succeeded` is Unknown the pods still save their checkpoint.",
        "Nothing. A new job with the same name and training, or with the same `storage.runId`, resumes from the newest"
        " checkpoint.",
    ),
    Reason.NAME_CONFLICT: Explanation(
        "The operator needs a name for an object, but another object has that name and does not belong to the job.",
        "Delete or rename that object; the operator tries again by itself.",
    ),
    Reason.BACKEND_UNAVAILABLE: Explanation(
        "The API server does not know PyTorchJob, or the API server, a webhook or a policy refuses the attempt's"
        " objects.",
        "Read the message; install or repair Kubeflow's training-operator, or the policy. The operator tries again by"
        " itself.",
    ),
    Reason.VALID: Explanation("The spec can be run."),
    Reason.SCHEDULED: Explanation("Every pod has a node."),
    Reason.WAITING_FOR_PODS: Explanation(
        "Pods are missing, have no node or do not report yet; the message says which and why.",
        "Wait. If this lasts, correct what the message names.",
    ),
    Reason.COMMITTED: Explanation("A checkpoint exists; the message names its step."),
    Reason.NONE_YET: Explanation("No checkpoint is committed yet. A lost pod would cost the whole training so far."),
    Reason.CHECKPOINT_OVERDUE: Explanation(
        "The object store has refused new checkpoints, or accepted them too slowly, for longer than the job asks for."
        " Training goes on; the message says how many minutes a lost pod would cost, and what the store answers.",
        "Repair the store, the credentials or the network. After 15 minutes the attempt ends with 75 and is retried.",
    ),
    Reason.IN_PROGRESS: Explanation("The job has not ended."),
    Reason.SETTLED: Explanation("The job has ended; see `Succeeded`."),
}

_WAITS = (Reason.PREFLIGHT, Reason.QUEUED, Reason.STARTING, Reason.RUNNING, Reason.RETRYING, Reason.SUSPENDED)
_OUTSIDE = (Reason.NAME_CONFLICT, Reason.BACKEND_UNAVAILABLE)
_DONE = (Reason.COMPLETED, Reason.EARLY_STOPPED)
_STOPPING = (Reason.DEADLINE_EXCEEDED, Reason.CANCELLED)
"""Reasons with which the operator stops a job. While the pods save their last checkpoint, the condition `Succeeded` has
one of these reasons and the status Unknown. Afterwards the condition has the same reason and the status False."""
_FAILED = (
    Reason.GATE_FAILED,
    Reason.BAD_INPUT,
    Reason.DIVERGED,
    Reason.OUT_OF_MEMORY,
    Reason.RETRIES_EXHAUSTED,
    *_STOPPING,
)

STATES: Mapping[ConditionType, Mapping[str, tuple[Reason, ...]]] = {
    ConditionType.SUCCEEDED: {
        # BadInput is listed here too, for a spec that this version of the operator can't read. A job with such a spec
        # has not failed, because another version may be able to read the spec.
        "Unknown": (*_WAITS, *_OUTSIDE, *_STOPPING, Reason.BAD_INPUT),
        "True": _DONE,
        "False": _FAILED,
    },
    ConditionType.ACCEPTED: {
        "Unknown": (Reason.PREFLIGHT,),
        "True": (Reason.VALID,),
        "False": (Reason.BAD_INPUT, Reason.OUTSIDE_FAILURE, *_OUTSIDE),
    },
    ConditionType.SCHEDULED: {"True": (Reason.SCHEDULED,), "False": (Reason.WAITING_FOR_PODS, Reason.SETTLED)},
    ConditionType.RUNNING: {"True": (Reason.RUNNING,), "False": (Reason.WAITING_FOR_PODS, Reason.SETTLED)},
    ConditionType.CHECKPOINT_AVAILABLE: {
        "True": (Reason.COMMITTED, Reason.CHECKPOINT_OVERDUE),
        "False": (Reason.NONE_YET, Reason.CHECKPOINT_OVERDUE),
    },
    ConditionType.READY: {"True": _DONE, "False": (*_WAITS, *_OUTSIDE, *_FAILED)},
    ConditionType.RECONCILING: {"True": (Reason.IN_PROGRESS,), "False": (Reason.SETTLED,)},
    ConditionType.STALLED: {"True": _FAILED, "False": (Reason.IN_PROGRESS, Reason.SETTLED)},
}
"""For each type of condition, and for each status of the condition (True, False or Unknown), the reasons that the
condition may have."""
