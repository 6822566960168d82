"""The rules by which kstatus computes the state of an object, such as Current. Flux waits for the state Current.

Source: the Go package sigs.k8s.io/cli-utils/pkg/kstatus/status, functions `Compute` (status.go),
`checkGenericProperties` and `checkGeneration` (generic.go), and `checkReadyCondition`. kstatus has no special rules for
the kind FineTuneJob, so these rules apply, in this order:

1. `metadata.deletionTimestamp` is set: Terminating.
2. `status.observedGeneration` exists and differs from `metadata.generation`: InProgress.
3. The first condition that is `Reconciling=True` or `Stalled=True` decides: InProgress or Failed.
4. The condition `Ready` decides: True is Current, False and Unknown are InProgress.
5. Otherwise Current. So an object without a status is Current.
"""

from __future__ import annotations

from typing import Any


def kstatus(manifest: dict[str, Any]) -> str:
    """Return the status of the object ``manifest``: Terminating, InProgress, Failed or Current."""
    metadata, status = manifest["metadata"], manifest.get("status", {})
    if metadata.get("deletionTimestamp"):
        return "Terminating"
    if "generation" in metadata and status.get("observedGeneration", metadata["generation"]) != metadata["generation"]:
        return "InProgress"
    conditions = status.get("conditions", [])
    for condition in conditions:
        if (condition["type"], condition["status"]) == ("Reconciling", "True"):
            return "InProgress"
        if (condition["type"], condition["status"]) == ("Stalled", "True"):
            return "Failed"
    for condition in conditions:
        if condition["type"] == "Ready" and condition["status"] in ("True", "False", "Unknown"):
            return "Current" if condition["status"] == "True" else "InProgress"
    return "Current"
