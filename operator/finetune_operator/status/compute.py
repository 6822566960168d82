"""Computes the new status of a FineTuneJob from the stored status and from what this reconcile has read and decided.

Pure functions. `writer.py` writes the new status where it differs; `urgency.py` says how soon.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune_core.api.status import ChildStatus, FineTuneJobStatus, PlanStatus, UsageStatus
from finetune_core.contract import Outcome
from finetune_operator.objects.observations import PodObservation
from finetune_operator.status.conditions import compute_conditions
from finetune_operator.status.inputs import StatusInput
from finetune_operator.status.report_merge import artifact_of, evaluation_of, merge_report, percentage


def compute_status(stored: FineTuneJobStatus, given: StatusInput, *, child_kind: str) -> FineTuneJobStatus:
    """Return the new status, from the status ``stored`` and the inputs ``given``.

    ``child_kind`` is the kind of child objects, for example "PyTorchJob".
    """
    status = stored
    if given.report is not None and given.reported_at is not None:
        status = merge_report(
            status, given.report, given.reported_at, given.seconds_per_step, requirements=given.requirements
        )
    update: dict[str, object] = {
        "observed_generation": given.generation,
        "attempts": given.attempts,
        "preflight": given.preflight,
        "adapter": given.adapter or status.adapter,
        "image": fixed_image(stored.image or given.image, given.pods),
        "plan": _plan(status, given),
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


def _plan(status: FineTuneJobStatus, given: StatusInput) -> PlanStatus | None:
    """Return the plan of the newest attempt, with the `adaptedShare` that the trainer has reported in any attempt. This
    share holds for all attempts, because neither the model nor the adapters of a job change. So do the choices, once
    they are fixed, and the advice, the memory and the CPUs of a pod that the preflight check has planned, which do not
    depend on the micro-batch. The planned memory of a GPU holds for attempts with the same micro-batch."""
    plan, stored = given.plan, status.plan
    if plan is None or stored is None:
        return plan or stored
    update: dict[str, object] = {
        "adapted_share": stored.adapted_share,
        "choices": stored.choices or plan.choices,
        "advice": plan.advice or stored.advice,
    }
    if plan.memory_bytes is None:
        update |= {"memory_bytes": stored.memory_bytes, "cpus": stored.cpus}
    if plan.gpu_memory_bytes is None and plan.micro_batch_size == stored.micro_batch_size:
        update |= {"gpu_memory_bytes": stored.gpu_memory_bytes}
    return plan.model_copy(update=update)


def fixed_image(image: str | None, pods: Sequence[PodObservation]) -> str | None:
    """Return ``image`` with the digest that the node of a pod reports, so that later attempts run the same image.

    ``image`` is returned unchanged where it already has a digest, and where no node has pulled it yet. The digest of a
    node is not used where the image was loaded into the node without a registry, or where the node reports another
    repository, because the registry of ``image`` need not know such a digest.
    """
    if image is None or "@" in image:
        return image
    for pod in sorted(pods, key=lambda pod: pod.index):
        repository, separator, digest = (pod.container.image_id if pod.container else "").partition("@")
        if separator and _is_of(repository, image):
            return f"{image}@{digest}"
    return image


def _is_of(repository: str, image: str) -> bool:
    """Return whether ``repository``, the full name that a node reports, can be the repository of ``image``.

    It can be where it ends with the name in ``image``, which may be short: "docker.io/library/trainer" can be the
    repository of the image "trainer:1".
    """
    folder, slash, name = image.rpartition("/")
    wanted = folder + slash + name.partition(":")[0]
    return f"/{repository}".endswith(f"/{wanted}")


def _child(stored: FineTuneJobStatus, given: StatusInput, kind: str) -> ChildStatus | None:
    """Return `status.child`: the child object of the current attempt, or the last child where the job ends.

    ``kind`` is the kind of child objects. A job that ends keeps its last child in the status, so that a person finds
    the pods with the logs.
    """
    if given.end is not None:
        # The child may not be in the status yet, because the operator may have been away during the whole attempt.
        observed = given.child
        return stored.child or (ChildStatus(kind=kind, name=observed.name, uid=observed.uid) if observed else None)
    if given.attempts.current is None:
        return None
    if given.child is None:
        opened_now = stored.attempts.current is None or stored.attempts.current.number != given.attempts.current.number
        return None if opened_now else stored.child
    recorded = stored.child
    if recorded is not None and recorded.uid and recorded.name == given.child.name:
        # The first uid is kept, because a child with another uid proves that the first child was replaced.
        return recorded
    return ChildStatus(kind=kind, name=given.child.name, uid=given.child.uid)


def _closed(usage: UsageStatus | None) -> UsageStatus | None:
    """Return ``usage`` for a job that ends: no pod counts as holding GPUs any more, even if one still runs."""
    return usage.model_copy(update={"holders": [], "running": False}) if usage is not None else None


def _numbers_of_result(status: FineTuneJobStatus, given: StatusInput) -> dict[str, object]:
    """Return the status fields that come from the trainer's result: artifact, scores and progress.

    These fields do not depend on the last report alone, because that report may be lost. The mapping is empty where the
    job ends without a result.
    """
    result = given.end.result if given.end else None
    if result is None:
        return {}
    update: dict[str, object] = {}
    if result.artifact is not None:
        update["artifact"] = artifact_of(result.artifact)
    evaluation = status.evaluation
    if result.evaluation is not None:
        evaluation = evaluation_of(result.evaluation, given.requirements, stored=evaluation)
    if evaluation is not None and evaluation.passed is None and given.requirements and result.artifact is not None:
        # The result has no scores of the tuned model: a termination message has no room for many scores. The scores of
        # a report set no verdict (see `merge_report`), so the outcome says whether the model passed.
        evaluation = evaluation.model_copy(update={"passed": result.outcome is not Outcome.GATE_FAILED})
    if evaluation is not None:
        update["evaluation"] = evaluation
    progress = status.progress
    if progress is not None:
        step = max(progress.step, result.step)
        update["progress"] = progress.model_copy(
            update={"step": step, "percentage": percentage(step, progress.total_steps), "eta_seconds": 0}
        )
    return update
