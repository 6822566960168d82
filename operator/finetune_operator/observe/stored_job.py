"""A FineTuneJob as one reconcile reads it from the API server: manifest, status, time and what the operator remembers.

`reconcile.py` parses the manifest once with `parse_stored_job` and `parse_spec`, and gives the result to `observe/`,
`act/` and `status/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_core.api import FineTuneJob, FineTuneJobStatus
from finetune_core.api.conditions import ConditionType
from finetune_operator.queue.memory import JobMemory
from finetune_operator.queue.work_queue import Key


@dataclass(frozen=True, kw_only=True)
class StoredJob:
    """A FineTuneJob whose spec is not parsed yet.

    The spec may have fields that this version does not know, because the CRD of another version has accepted them.
    """

    key: Key
    manifest: dict[str, Any]
    """The whole object as the API server returned it."""
    status: FineTuneJobStatus
    """The stored `status`; an empty status where the job has none yet."""
    now: datetime
    """The time of this reconcile, in whole seconds, because Kubernetes stores times with that resolution."""
    memory: JobMemory
    """What the operator keeps in memory about the job, such as its newest report. A restart loses this memory."""

    @property
    def uid(self) -> str:
        """`metadata.uid` of the job."""
        return str(self.manifest["metadata"]["uid"])

    @property
    def has_ended(self) -> bool:
        """Whether the condition `Succeeded` is True or False. Once it is, it never changes again."""
        return any(item.type == ConditionType.SUCCEEDED and item.status != "Unknown" for item in self.status.conditions)

    @property
    def log_fields(self) -> dict[str, object]:
        """Fields that every log line about this job carries."""
        return {"job": str(self.key), "uid": self.uid, "attempt": self.status.attempts.started}

    def condition_is(self, kind: ConditionType, value: str) -> bool:
        """Return whether the stored condition ``kind`` has the status ``value``, for example "True"."""
        return any(item.type == kind and item.status == value for item in self.status.conditions)


@dataclass(frozen=True, kw_only=True)
class ParsedJob(StoredJob):
    """A FineTuneJob whose spec this version of the operator can read."""

    resource: FineTuneJob
    """Metadata and spec of the job."""


def parse_stored_job(key: Key, manifest: dict[str, Any], memory: JobMemory, now: datetime) -> StoredJob:
    """Return the stored job. Status fields that only another version of the operator knows are ignored."""
    status = manifest.get("status")
    return StoredJob(
        key=key,
        manifest=manifest,
        status=FineTuneJobStatus.model_validate(status, extra="ignore") if status else FineTuneJobStatus(),
        now=now.replace(microsecond=0),
        memory=memory,
    )


def parse_spec(stored: StoredJob) -> ParsedJob:
    """Return the stored job with its parsed spec; raises ValidationError where this version of the
    operator can't read the spec."""
    fields = ("apiVersion", "kind", "metadata", "spec")
    resource = FineTuneJob.model_validate({name: stored.manifest[name] for name in fields})
    return ParsedJob(resource=resource, **vars(stored))
