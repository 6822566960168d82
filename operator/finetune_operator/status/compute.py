"""Computes the whole status of a FineTuneJob from the stored one and from what this reconcile has read and decided.

Pure functions. `writer.py` writes the result where it differs: a transition at once, new numbers every ten seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune_core.api.status import ChildStatus, FineTuneJobStatus, UsageStatus
from finetune_operator.objects.observations import PodObservation
from finetune_operator.status.conditions import compute_conditions
from finetune_operator.status.inputs import StatusInput
from finetune_operator.status.report_merge import artifact_of, evaluation_of, merge_report, percentage


def compute_status(stored: FineTuneJobStatus, given: StatusInput, *, child_kind: str) -> FineTuneJobStatus:
    """Return the status that follows ``stored``; ``child_kind`` is the backend's kind, for example "PyTorchJob"."""
    status = stored
    if given.report is not None and given.reported_at is not None:
        status = merge_report(status, given.report, given.reported_at, given.seconds_per_step)
    update: dict[str, object] = {
        "observed_generation": given.generation,
        "attempts": given.attempts,
        "preflight": given.preflight,
        "image": fixed_image(stored.image or given.image, given.pods),
        "plan": given.plan or stored.plan,
        "usage": given.usage or stored.usage,
        "child": _child(stored, given, child_kind),
    }
    if stored.start_time is None and given.attempts.started:
        update["start_time"] = given.now
    if given.end is not None:
        update["completion_time"] = stored.completion_time or given.now
        update["usage"] = _closed(given.usage or stored.usage)
        update |= _numbers_of_result(status, given)
    status = status.model_copy(update=update)
    return status.model_copy(update={"conditions": compute_conditions(stored, status, given)})


def fixed_image(image: str | None, pods: Sequence[PodObservation]) -> str | None:
    """Return ``image`` with the digest that the first pod's node pulled, so that later attempts run the same image.

    An image that already has a digest, or that no node has pulled yet, is returned unchanged. So is an image that was
    loaded into the node without a registry, because no registry knows its digest, and an image that the node reports
    under another repository, because this image's registry need not know the digest of the other.
    """
    if image is None or "@" in image:
        return image
    for pod in sorted(pods, key=lambda pod: pod.index):
        repository, separator, digest = (pod.container.image_id if pod.container else "").partition("@")
        if separator and _is_of(repository, image):
            return f"{image}@{digest}"
    return image


def _is_of(repository: str, image: str) -> bool:
    """Return whether ``repository``, as a node reports it in full, is the repository of ``image``.

    For example "docker.io/library/trainer" is that of "trainer:1".
    """
    folder, slash, name = image.rpartition("/")
    wanted = folder + slash + name.partition(":")[0]
    return f"/{repository}".endswith(f"/{wanted}")


def _child(stored: FineTuneJobStatus, given: StatusInput, kind: str) -> ChildStatus | None:
    """Return `status.child`: the child of the current attempt, or the last child of a job that ends.

    The last child stays in the status so that a person finds the pods with the logs.
    """
    if given.end is not None:
        # An operator that was away during the whole attempt sees the child for the first time when the job ends.
        observed = given.child
        return stored.child or (ChildStatus(kind=kind, name=observed.name, uid=observed.uid) if observed else None)
    if given.attempts.current is None:
        return None
    if given.child is None:
        opened_now = stored.attempts.current is None or stored.attempts.current.number != given.attempts.current.number
        return None if opened_now else stored.child
    recorded = stored.child
    if recorded is not None and recorded.uid and recorded.name == given.child.name:
        return recorded  # the first uid stays, because another uid proves that somebody replaced the child
    return ChildStatus(kind=kind, name=given.child.name, uid=given.child.uid)


def _closed(usage: UsageStatus | None) -> UsageStatus | None:
    """Return the usage of a job that has ended: pods that still save a checkpoint are no longer counted."""
    return usage.model_copy(update={"holders": [], "running": False}) if usage is not None else None


def _numbers_of_result(status: FineTuneJobStatus, given: StatusInput) -> dict[str, object]:
    """Return artifact, scores and progress of a job that succeeded; empty where the job has no result.

    They are taken from the result, because the job's last report may be lost.
    """
    result = given.end.result if given.end else None
    if result is None:
        return {}
    update: dict[str, object] = {}
    if result.artifact is not None:
        update["artifact"] = artifact_of(result.artifact)
    if result.evaluation is not None:
        update["evaluation"] = evaluation_of(result.evaluation)
    progress = status.progress
    if progress is not None:
        step = max(progress.step, result.step)
        update["progress"] = progress.model_copy(
            update={"step": step, "percentage": percentage(step, progress.total_steps), "eta_seconds": 0}
        )
    return update


def is_news(old: FineTuneJobStatus | None, new: FineTuneJobStatus) -> bool:
    """Return whether ``new`` is worth a write. Usage that only grew with time is not; the next write includes it."""
    if old is None or old.usage is None or new.usage is None:
        return old != new
    passed = new.usage.model_copy(update={"holders": old.usage.holders, "running": old.usage.running})
    return old.model_copy(update={"usage": passed}) != new


def is_transition(old: FineTuneJobStatus | None, new: FineTuneJobStatus) -> bool:
    """Return whether more than numbers and messages changed. Such a status is written at once."""
    if old is None or old.observed_generation != new.observed_generation:
        return True
    if [(c.type, c.status, c.reason) for c in old.conditions] != [(c.type, c.status, c.reason) for c in new.conditions]:
        return True
    fixed = (
        "attempts",
        "image",
        "plan",
        "evaluation",
        "incidents",
        "artifact",
        "child",
        "start_time",
        "completion_time",
    )
    return any(getattr(old, name) != getattr(new, name) for name in fixed)
