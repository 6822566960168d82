"""Reads the FineTuneJob that `model.adapter.job` of another job names, as values. `observer.py` fetches the object, and
`decide/initial_adapter.py` decides what it means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError

from finetune_core.api import FineTuneJob, FineTuneJobStatus
from finetune_core.api.conditions import ConditionType
from finetune_core.api.method import Method
from finetune_core.api.older_specs import present_manifest
from finetune_core.api.reading import read_section
from finetune_core.api.sources import InitialAdapterSpec
from finetune_core.api.status import ArtifactStatus
from finetune_core.layout import runs_folder_of
from finetune_operator.kube.manifest import Manifest
from finetune_operator.observe.stored_job import ParsedJob, StoredJob


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedJob:
    """The job that `model.adapter.job` names, as it is now."""

    name: str
    use: str
    """`model.adapter.use` of the job that names this one."""
    exists: bool = False
    """Whether an object of that name exists and is not being deleted."""
    is_readable: bool = True
    """Whether this version of the operator can read the spec of that object."""
    uid: str = ""
    is_itself: bool = False
    """Whether the job names itself."""
    has_adapter: bool = True
    """Whether the artifact of the named job holds an adapter, as the spec of the named job says."""
    same_store: bool = True
    """Whether the artifact of the named job lies in the object store of the job that names it."""
    succeeded: str = "Unknown"
    """Status of the named job's condition `Succeeded`: True, False or Unknown."""
    reason: str = ""
    """Reason of the named job's condition `Succeeded`; empty where that job does not have the condition yet."""
    artifact: ArtifactStatus | None = None
    """The artifact in the status of the named job, if a run of that job can have written it (`_is_own`). Whoever may
    edit the status of a job could otherwise name any folder, which the pods of another job would read with their own
    keys."""
    waits_for_it: bool = False
    """Whether the named job waits, directly or over further jobs, for the job that names it."""


def named_adapter(job: StoredJob) -> InitialAdapterSpec | None:
    """Return `model.adapter` of ``job`` if it names a job whose artifact still has to be recorded before the next
    attempt. Return None otherwise: also where the spec of ``job`` can't be read."""
    recorded = job.status.adapter is not None and job.status.adapter.job_uid
    if not isinstance(job, ParsedJob) or recorded or job.status.attempts.current is not None:
        return None
    source = job.resource.spec.model.adapter
    return source if source is not None and source.job is not None else None


def awaited_name(found: Manifest | None, now: datetime) -> str:
    """Return the name of the job for which the job ``found`` still waits, by its own `model.adapter.job`; empty where
    it waits for none."""
    if found is None or "deletionTimestamp" in found["metadata"]:
        return ""
    status, _ = read_section(FineTuneJobStatus, found.get("status") or {}, now)
    recorded = status.adapter is not None and status.adapter.job_uid
    if recorded or status.attempts.current is not None or _ended(status)[0] != "Unknown":
        return ""
    # Another version may have written the spec, so each part may be absent or of another type.
    part: object = found.get("spec")
    for name in ("model", "adapter", "job", "name"):
        part = part.get(name) if isinstance(part, dict) else None
    return part if isinstance(part, str) else ""


def read_named_job(
    job: StoredJob, source: InitialAdapterSpec, found: Manifest | None, now: datetime, *, waits_for_it: bool = False
) -> NamedJob:
    """Return the job that ``source`` of ``job`` names. ``found`` is the object of that name, if there is one.
    ``waits_for_it`` says whether that job waits for ``job``."""
    name = source.job.name if source.job is not None else ""
    if found is None or "deletionTimestamp" in found["metadata"]:
        return NamedJob(name=name, use=source.use)
    uid = str(found["metadata"]["uid"])
    try:
        fields = ("apiVersion", "kind", "metadata", "spec")
        resource = FineTuneJob.model_validate(present_manifest({key: found[key] for key in fields}))
    except (ValidationError, KeyError):
        return NamedJob(name=name, use=source.use, exists=True, uid=uid, is_readable=False, waits_for_it=waits_for_it)
    spec = resource.spec
    status, _ = read_section(FineTuneJobStatus, found.get("status") or {}, now)
    succeeded, reason = _ended(status)
    own = job.resource.spec.storage if isinstance(job, ParsedJob) else None
    return NamedJob(
        name=name,
        use=source.use,
        exists=True,
        uid=uid,
        is_itself=uid == job.uid,
        has_adapter=spec.method is Method.LORA and spec.storage.artifact != "Merged",
        same_store=own is not None and spec.storage.endpoint_url == own.endpoint_url,
        succeeded=succeeded,
        reason=reason,
        artifact=status.artifact if status.artifact is not None and _is_own(status.artifact, resource) else None,
        waits_for_it=waits_for_it,
    )


def _ended(status: FineTuneJobStatus) -> tuple[str, str]:
    """Return status and reason of the condition `Succeeded`."""
    found = next((item for item in status.conditions if item.type == ConditionType.SUCCEEDED), None)
    return (found.status, found.reason) if found is not None else ("Unknown", "")


def _is_own(artifact: ArtifactStatus, resource: FineTuneJob) -> bool:
    """Return whether a run of the job ``resource`` can have written ``artifact``.

    The address must be that of an artifact in the folder of all jobs with the namespace and the name of ``resource``,
    and the digest must have the form of a sha256.
    """
    folder = re.escape(runs_folder_of(resource))
    address = re.fullmatch(rf"{folder}/[A-Za-z0-9][-._A-Za-z0-9]*/artifacts/[0-9]+", artifact.uri)
    return address is not None and re.fullmatch("[0-9a-f]{64}", artifact.manifest_sha256) is not None
