"""The reasons with which an attempt can end although the job may go on (`status.attempts`), each with its verdict, its
meaning and advice to users. Reasons that also end the whole job are members of `Reason` in `conditions.py`.

`reference.py` writes these reasons as a table into docs/api.md. tests/operator/test_states.py checks that each reason
has the verdict that the operator gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from finetune_core.api.condition_reasons import Explanation


class Cause(StrEnum):
    """Why an attempt ended although the job may go on. Reasons that also end the whole job, such as `Diverged`, are
    members of `Reason` in `conditions.py`."""

    POD_DELETED = "PodDeleted"
    POD_VANISHED = "PodVanished"
    POD_REPLACED = "PodReplaced"
    NODE_LOST = "NodeLost"
    NODE_REFUSED = "NodeRefused"
    CHILD_DELETED = "ChildDeleted"
    CHILD_REPLACED = "ChildReplaced"
    CHILD_CHANGED = "ChildChanged"
    CHILD_FAILED = "ChildFailed"
    CRASHED = "Crashed"
    OUTSIDE_FAILURE = "OutsideFailure"
    STOPPED = "Stopped"
    POD_FAILED = "PodFailed"
    EVICTED = "Evicted"
    NO_ARTIFACT = "NoArtifact"
    SUSPENDED = "Suspended"
    RESUMED_TOO_EARLY = "ResumedTooEarly"


CAUSES: Mapping[Cause, tuple[str, Explanation]] = {
    Cause.SUSPENDED: ("Free", Explanation("`runPolicy.suspend` was set.", "Set it to false to go on.")),
    Cause.RESUMED_TOO_EARLY: (
        "Free",
        Explanation(
            "The queue resumed the PyTorchJob while pods of the suspended attempt still saved their checkpoint, and"
            " training-operator took these pods for failed ones."
        ),
    ),
    Cause.POD_DELETED: ("Free", Explanation("Somebody deleted the pod that the message names.")),
    Cause.POD_VANISHED: ("Free", Explanation("A pod was deleted by force, or before its container ran.")),
    Cause.POD_REPLACED: (
        "Free",
        Explanation("A pod was deleted, and training-operator created another pod in its place."),
    ),
    Cause.NODE_LOST: (
        "Free",
        Explanation(
            "The pod's node does not answer, or lost the pod's container, for example in a restart.",
            "If this repeats, check the node.",
        ),
    ),
    Cause.NODE_REFUSED: (
        "Free",
        Explanation(
            "The node did not start a pod that the scheduler had placed on the node: its kubelet refused the pod, for"
            " example because a GPU could not be allocated, or its container runtime could not start the container. Or"
            " the trainer found that a GPU or the driver of the node is broken.",
            "Check the node that `attempts.recent` names. If all nodes refuse, check the command and the files of"
            " `podTemplate.image`.",
        ),
    ),
    Cause.CHILD_DELETED: ("Free", Explanation("Somebody deleted the PyTorchJob.", "Use `runPolicy` instead.")),
    Cause.CHILD_REPLACED: (
        "Free",
        Explanation("Somebody deleted the PyTorchJob, and another PyTorchJob has its name."),
    ),
    Cause.CHILD_CHANGED: (
        "Free",
        Explanation("Somebody scaled the PyTorchJob.", "Create a new job with another `resources.nodes`."),
    ),
    Cause.EVICTED: (
        "Charged",
        Explanation(
            "The kubelet evicted a pod because the pod used more memory or disk than it requested.",
            "Raise `resources.memory`, or free disk on the node.",
        ),
    ),
    Cause.OUTSIDE_FAILURE: (
        "Charged",
        Explanation(
            "Exit code 75: the object store, the credentials or another rank failed for longer than the trainer waits.",
            "Correct what the message names.",
        ),
    ),
    Cause.CRASHED: (
        "Charged",
        Explanation(
            "The trainer crashed: it was killed, or ended with an exit code that the trainer never sets.",
            "Read its log: `kubectl logs`, container `pytorch`.",
        ),
    ),
    Cause.STOPPED: (
        "Charged",
        Explanation("Exit code 143 (SIGTERM) although nobody deleted the pod.", "Find out what stops the trainer."),
    ),
    Cause.POD_FAILED: ("Charged", Explanation("A pod failed without an exit code.", "Run `kubectl describe pod`.")),
    Cause.CHILD_FAILED: ("Charged", Explanation("training-operator failed the PyTorchJob.", "Read the message.")),
    Cause.NO_ARTIFACT: (
        "Charged",
        Explanation(
            "Every pod ended with exit code 0, but no result names a committed artifact.",
            "Check that `podTemplate.image` is a trainer image.",
        ),
    ),
}
"""For each reason: its verdict, its meaning and advice to users. A Charged attempt counts against
`runPolicy.maxRetries`, a Free attempt does not.

There is one exception. Where three Free attempts in a row made no new checkpoint, the next Free attempt without a new
checkpoint counts too. If that attempt ended with NodeRefused, each later attempt that ends with NodeRefused counts as
well, until a checkpoint is committed or an attempt with another reason counts. Suspended and ResumedTooEarly attempts
never count, and the three attempts may have such attempts between them.
"""
DISRUPTIONS: Mapping[str, str] = {
    "EvictionByEvictionAPI": "A node was drained, or somebody evicted the pod.",
    "PreemptionByScheduler": "A pod of higher priority took the pod's place.",
    "DeletionByTaintManager": "The pod's node is not ready, is unreachable, or was tainted.",
    "DeletionByPodGC": "The pod's node no longer exists.",
    "TerminationByKubelet": "The pod's node shut down, or ran out of a resource.",
}
"""The reasons that Kubernetes writes into the condition DisruptionTarget of a pod, each with its meaning. Where a pod
of an attempt gets this condition before a pod of the attempt fails, the attempt ends with the condition's reason. Its
verdict is Free, with the exception that is described at `CAUSES`."""
