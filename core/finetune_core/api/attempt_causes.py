"""Why attempts end: the reasons that stand in `status.attempts` and are not reasons of the whole job.

Each reason has its verdict, its meaning and an advice. `reference.py` writes the table into docs/api.md, and
tests/operator/test_states.py checks that the operator's verdicts use exactly these reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from finetune_core.api.condition_reasons import Explanation


class Cause(StrEnum):
    """Reason of an attempt's end that is not also a reason of the job's end."""

    POD_DELETED = "PodDeleted"
    POD_VANISHED = "PodVanished"
    POD_REPLACED = "PodReplaced"
    NODE_LOST = "NodeLost"
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
            "The queue resumed the PyTorchJob while old pods still saved; training-operator failed it for them."
        ),
    ),
    Cause.POD_DELETED: ("Free", Explanation("Somebody deleted a pod; the message names it.")),
    Cause.POD_VANISHED: ("Free", Explanation("A pod was deleted by force, or before it ran.")),
    Cause.POD_REPLACED: ("Free", Explanation("A pod was deleted, and training-operator made another in its place.")),
    Cause.NODE_LOST: ("Free", Explanation("The pod's node does not answer.", "Look at the node, where it repeats.")),
    Cause.CHILD_DELETED: ("Free", Explanation("Somebody deleted the PyTorchJob.", "Use `runPolicy` instead.")),
    Cause.CHILD_REPLACED: ("Free", Explanation("Another PyTorchJob of the same name took its place.")),
    Cause.CHILD_CHANGED: (
        "Free",
        Explanation("Somebody scaled the PyTorchJob.", "Set `resources.nodes` of a new job instead."),
    ),
    Cause.EVICTED: (
        "Charged",
        Explanation(
            "The kubelet evicted a pod for what it used itself: memory or disk beyond its request.",
            "Raise `resources.memory`, or free disk on the node.",
        ),
    ),
    Cause.OUTSIDE_FAILURE: (
        "Charged",
        Explanation(
            "Exit code 75: store, credentials or a peer failed for longer than the trainer waits.",
            "Do what the message says.",
        ),
    ),
    Cause.CRASHED: (
        "Charged",
        Explanation(
            "The trainer ended with an exit code that it does not give itself, or was killed.",
            "Read its log: `kubectl logs`, container `pytorch`.",
        ),
    ),
    Cause.STOPPED: ("Charged", Explanation("Exit code 143 though nobody had deleted the pod.", "Find who stops it.")),
    Cause.POD_FAILED: ("Charged", Explanation("A pod failed without an exit code.", "Describe the pod.")),
    Cause.CHILD_FAILED: ("Charged", Explanation("training-operator failed the PyTorchJob.", "Read the message.")),
    Cause.NO_ARTIFACT: (
        "Charged",
        Explanation(
            "Every pod ended with 0, but no result names a committed artifact.",
            "Check that `podTemplate.image` holds the trainer.",
        ),
    ),
}
"""Verdict and meaning of each reason. A free attempt does not count against `runPolicy.maxRetries`. After three free
attempts in a row without a new checkpoint, the next free end is charged nevertheless."""
DISRUPTIONS: Mapping[str, str] = {
    "EvictionByEvictionAPI": "A node was drained, or somebody evicted the pod.",
    "PreemptionByScheduler": "A pod of higher priority took the place.",
    "DeletionByTaintManager": "The node is not ready, unreachable, or was tainted.",
    "DeletionByPodGC": "The node is gone.",
    "TerminationByKubelet": "The node shut down, or ran out of a resource.",
}
"""Reasons that Kubernetes writes into a pod's DisruptionTarget condition, with their meaning. The operator takes them
over as reasons of free attempts."""
