"""Computes the whole status of a FineTuneJob from the stored one and what was observed. Pure; `reconcile` writes
the result when it differs, at once for a transition and every ten seconds at most for new numbers."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_core.api.status import ChildStatus, FineTuneJobStatus, PlanStatus, UsageStatus
from finetune_core.contract import RunConfig
from finetune_operator.objects.observations import PodObservation
from finetune_operator.status.conditions import View, compute_conditions
from finetune_operator.status.history import artifact_of, evaluation_of, merge_report, percentage


def compute_status(stored: FineTuneJobStatus, view: View, *, child_kind: str) -> FineTuneJobStatus:
    """Return the status that ``stored`` becomes under ``view``."""
    status = stored
    if view.report is not None and view.reported_at is not None:
        status = merge_report(status, view.report, view.reported_at, view.seconds_per_step)
    update: dict[str, object] = {
        "observed_generation": view.generation,
        "attempts": view.attempts,
        "preflight": view.check.record if view.check is not None else stored.preflight,
        "image": fixed_image(stored.image or view.image, view.pods),
        "plan": view.plan or stored.plan,
        "usage": view.usage or stored.usage,
        "child": _child(stored, view, child_kind),
    }
    if stored.start_time is None and view.attempts.started:
        update["start_time"] = view.now
    if view.settled is not None:
        update["completion_time"] = stored.completion_time or view.now
        update["usage"] = _closed(view.usage or stored.usage)
        update |= _settled_numbers(status, view)
    status = status.model_copy(update=update)
    return status.model_copy(update={"conditions": compute_conditions(stored, status, view)})


def fixed_image(image: str | None, pods: Sequence[PodObservation]) -> str | None:
    """Return ``image`` with the digest that the first pod's node pulled; as it is while none has, or for ever with one.

    An image that was put on the node by hand has no digest that a registry knows, and stays as it is. So does one that
    the node also has from another repository and names by that: this one's registry need not know the other's digest.
    """
    if image is None or "@" in image:
        return image
    for pod in sorted(pods, key=lambda pod: pod.index):
        repository, separator, digest = (pod.container.image_id if pod.container else "").partition("@")
        if separator and _is_of(repository, image):
            return f"{image}@{digest}"
    return image


def _is_of(repository: str, image: str) -> bool:
    """Tell whether a node means ``image`` by ``repository``, where it writes out what a short name leaves out."""
    folder, slash, name = image.rpartition("/")
    wanted = folder + slash + name.partition(":")[0]
    return f"/{repository}".endswith(f"/{wanted}")


def plan_of(config: RunConfig) -> PlanStatus:
    """Return what an attempt was resolved to."""
    batch, micro = config.optimization.global_batch_size, config.optimization.micro_batch_size
    return PlanStatus(
        zero_stage=config.optimization.zero_stage,
        processes=config.world.size,
        micro_batch_size=micro,
        gradient_accumulation_steps=-(-batch // (config.world.size * micro)),
    )


def _child(stored: FineTuneJobStatus, view: View, kind: str) -> ChildStatus | None:
    """Return the child of the current attempt; a settled job keeps its last one, where the logs are."""
    if view.settled is not None:
        # An operator that was away while the attempt lived sees its child for the first time as it settles the job.
        observed = view.child
        return stored.child or (ChildStatus(kind=kind, name=observed.name, uid=observed.uid) if observed else None)
    if view.attempts.current is None:
        return None
    if view.child is None:
        opened_now = stored.attempts.current is None or stored.attempts.current.number != view.attempts.current.number
        return None if opened_now else stored.child
    recorded = stored.child
    if recorded is not None and recorded.uid and recorded.name == view.child.name:
        return recorded  # the first uid stays: another one means that the child was replaced
    return ChildStatus(kind=kind, name=view.child.name, uid=view.child.uid)


def _closed(usage: UsageStatus | None) -> UsageStatus | None:
    """Return the usage of a job that has ended: nothing is counted any more, also of pods that still save."""
    return usage.model_copy(update={"holders": [], "running": False}) if usage is not None else None


def _settled_numbers(status: FineTuneJobStatus, view: View) -> dict[str, object]:
    """Return artifact and progress of a job that has ended with a result, also where its last report was lost."""
    result = view.settled.result if view.settled else None
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
    """Tell whether the status is worth a write. Time that passes is not: it is counted with the next news."""
    if old is None or old.usage is None or new.usage is None:
        return old != new
    passed = new.usage.model_copy(update={"holders": old.usage.holders, "running": old.usage.running})
    return old.model_copy(update={"usage": passed}) != new


def is_transition(old: FineTuneJobStatus | None, new: FineTuneJobStatus) -> bool:
    """Tell whether more than numbers and sentences changed: such a status is written at once."""
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
