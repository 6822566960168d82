"""A stored job as one look has it in hand: its status, its memory, the time, and the parsed spec where there is one.
`reconcile` makes it once, and every step after that reads from it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_core.api import FineTuneJob, FineTuneJobStatus
from finetune_core.api.conditions import ConditionType
from finetune_operator.queue.memory import JobMemory
from finetune_operator.queue.work_queue import Key


@dataclass(frozen=True, kw_only=True)
class Record:
    """A stored job whose spec need not be readable."""

    key: Key
    raw: dict[str, Any]
    stored: FineTuneJobStatus
    now: datetime
    memory: JobMemory

    @property
    def uid(self) -> str:
        """The job's uid."""
        return str(self.raw["metadata"]["uid"])

    @property
    def settled(self) -> bool:
        """Whether the job has ended: True or False of `Succeeded` is final."""
        return any(item.type == ConditionType.SUCCEEDED and item.status != "Unknown" for item in self.stored.conditions)

    @property
    def log(self) -> dict[str, object]:
        """Fields of log lines about this job."""
        return {"job": str(self.key), "uid": self.uid, "attempt": self.stored.attempts.started}

    def condition_is(self, kind: ConditionType, value: str) -> bool:
        """Tell whether the stored condition ``kind`` has the status ``value``."""
        return any(item.type == kind and item.status == value for item in self.stored.conditions)


@dataclass(frozen=True, kw_only=True)
class Look(Record):
    """A stored job with its spec."""

    job: FineTuneJob


def parse_record(key: Key, raw: dict[str, Any], memory: JobMemory, now: datetime) -> Record:
    """Return the record of a stored job. Status fields that another version of the operator wrote are passed over."""
    status = raw.get("status")
    return Record(
        key=key,
        raw=raw,
        stored=FineTuneJobStatus.model_validate(status, extra="ignore") if status else FineTuneJobStatus(),
        now=now.replace(microsecond=0),
        memory=memory,
    )


def parse_look(record: Record) -> Look:
    """Return the record with its spec; raises ValidationError where the spec is none of this version."""
    raw = record.raw
    job = FineTuneJob.model_validate({name: raw[name] for name in ("apiVersion", "kind", "metadata", "spec")})
    return Look(job=job, **vars(record))
