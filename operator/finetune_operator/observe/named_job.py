"""Reads the FineTuneJob that `model.adapter.job` of another job names, as values. `observer.py` fetches the object, and
`decide/initial_adapter.py` decides what it means."""

from __future__ import annotations

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
from finetune_operator.kube.manifest import Manifest
from finetune_operator.observe.stored_job import ParsedJob, StoredJob


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedJob:
    """The job that `model.adapter.job` names, as it is now."""

    name: str
    use: str
    """`model.adapter.use` of the job that names it."""
    exists: bool = False
    """Whether an object of that name exists and is not being deleted."""
    is_readable: bool = True
    """Whether this version of the operator can read the spec of that object."""
    uid: str = ""
    is_itself: bool = False
    """Whether the job names itself."""
    has_adapter: bool = True
    """Whether its artifact holds an adapter, by its spec."""
    same_store: bool = True
    """Whether its artifact lies in the object store of the job that names it."""
    succeeded: str = "Unknown"
    """Status of its condition `Succeeded`: True, False or Unknown."""
    reason: str = ""
    """Reason of its condition `Succeeded`; empty where it has none yet."""
    artifact: ArtifactStatus | None = None


def named_adapter(job: StoredJob) -> InitialAdapterSpec | None:
    """Return `model.adapter` of ``job`` if it names a job whose artifact still has to be recorded. Return None
    otherwise: also where an attempt has started already, and where the spec of ``job`` can't be read."""
    if not isinstance(job, ParsedJob) or job.status.attempts.started or job.status.adapter is not None:
        return None
    source = job.resource.spec.model.adapter
    return source if source is not None and source.job is not None else None


def read_named_job(job: StoredJob, source: InitialAdapterSpec, found: Manifest | None, now: datetime) -> NamedJob:
    """Return the job that ``source`` of ``job`` names. ``found`` is the object of that name, if there is one."""
    name = source.job.name if source.job is not None else ""
    if found is None or "deletionTimestamp" in found["metadata"]:
        return NamedJob(name=name, use=source.use)
    uid = str(found["metadata"]["uid"])
    try:
        fields = ("apiVersion", "kind", "metadata", "spec")
        spec = FineTuneJob.model_validate(present_manifest({key: found[key] for key in fields})).spec
    except (ValidationError, KeyError):
        return NamedJob(name=name, use=source.use, exists=True, uid=uid, is_readable=False)
    status, _ = read_section(FineTuneJobStatus, found.get("status") or {}, now)
    ended = next((item for item in status.conditions if item.type == ConditionType.SUCCEEDED), None)
    own = job.resource.spec.storage if isinstance(job, ParsedJob) else None
    return NamedJob(
        name=name,
        use=source.use,
        exists=True,
        uid=uid,
        is_itself=uid == job.uid,
        has_adapter=spec.method is Method.LORA and spec.storage.artifact != "Merged",
        same_store=own is not None and spec.storage.endpoint_url == own.endpoint_url,
        succeeded=ended.status if ended is not None else "Unknown",
        reason=ended.reason if ended is not None else "",
        artifact=status.artifact,
    )
