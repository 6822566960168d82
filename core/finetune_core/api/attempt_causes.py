"""Why attempts end, beside the reasons that a job ends with: the words in `status.attempts`, what each means and what a
person should do. Rendered into docs/api.md; tests/operator/test_states.py holds the verdicts to it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from finetune_core.api.condition_reasons import Explanation


class Cause(StrEnum):
    """Reasons of attempts that are not reasons of the job."""

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
"""Verdict and meaning. After three free attempts in a row without a checkpoint the next one is charged all the same."""
DISRUPTIONS: Mapping[str, str] = {
    "EvictionByEvictionAPI": "A node was drained, or somebody evicted the pod.",
    "PreemptionByScheduler": "A pod of higher priority took the place.",
    "DeletionByTaintManager": "The node is not ready, unreachable, or was tainted.",
    "DeletionByPodGC": "The node is gone.",
    "TerminationByKubelet": "The node shut down, or ran out of a resource.",
}
"""Kubernetes' own words, of the DisruptionTarget condition: free."""
