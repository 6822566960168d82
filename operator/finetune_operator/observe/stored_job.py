"""A FineTuneJob as one reconcile reads it from the API server: manifest, status, time and what the operator remembers.

`reconcile.py` parses the manifest once with `parse_stored_job` and `parse_spec`, and gives the result to `observe/`,
`act/`, `status/` and `settled.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from pydantic.alias_generators import to_snake

from finetune_core.api import FineTuneJob, FineTuneJobStatus
from finetune_core.api.conditions import ConditionType
from finetune_core.api.evaluation import EvaluationSpec, RequirementSpec
from finetune_core.api.older_specs import present_manifest
from finetune_core.api.reading import Section, read_section
from finetune_core.api.resources import ResourcesSpec
from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import AttemptsStatus
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import JobMemory

_BOOKKEEPING = ("", "attempts", "preflight", "adapter", "child", "completionTime")
"""Fields of the status that the operator must be able to read as a whole before it decides about attempts. The empty
name stands for the whole status. Of the conditions, the operator needs only parts (`_is_bookkeeping`)."""
_ALWAYS = ("conditions", "observedGeneration")
"""Fields of the status that are always written, even where this version can't read all of their stored content."""


@dataclass(frozen=True, kw_only=True)
class StoredJob:
    """A FineTuneJob whose spec is not parsed yet.

    The spec may have fields that this version does not know, because the CRD of another version has accepted them.
    """

    key: Key
    manifest: dict[str, Any]
    """The whole object as the API server returned it."""
    status: FineTuneJobStatus
    """The stored `status`, as far as this version can read it, with counts of attempts that `_counted` has corrected.
    An empty status where the job has none yet."""
    unread: tuple[str, ...] = ()
    """Paths in the stored status that this version can't read, for example `plan.zeroStage`."""
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
        """Whether the job has ended: `status.completionTime` is set, or the condition `Succeeded` is True or False."""
        return self.ended_at is not None

    @property
    def ended_at(self) -> datetime | None:
        """When the job ended; None while it goes on.

        Where `status.completionTime` is absent or can't be read, this is the time since which the condition `Succeeded`
        is True or False.
        """
        ends = (item for item in self.status.conditions if item.type == ConditionType.SUCCEEDED)
        by_condition = (item.last_transition_time for item in ends if item.status in ("True", "False"))
        return self.status.completion_time or next(by_condition, None)

    @property
    def unread_bookkeeping(self) -> str:
        """Path of a part of the status that this version can't read but would need for its decisions; empty if none.

        For a job that has such a part and has not ended, nothing is created or deleted, unless `runPolicy` orders to
        cancel or suspend the job: an operator that can't read which attempt runs must neither end nor repeat that
        attempt.
        """
        return next((path for path in self.unread if _is_bookkeeping(path)), "")

    @property
    def left_alone(self) -> dict[str, Any]:
        """The fields of the status that could not be read, or only in part, by name, with what could be read of each.

        The operator leaves these fields as they are stored, because another version gave them another shape. Fields in
        `_ALWAYS` are excepted, because they are always written. Fields in `_BOOKKEEPING` are excepted as well. Where
        they can't be read, they change only after an order to cancel or suspend the job, and then they are written.
        """
        names = {to_snake(_field_of(path)) for path in self.unread if _field_of(path) not in (*_BOOKKEEPING, *_ALWAYS)}
        return {name: getattr(self.status, name) for name in names}

    @property
    def generation(self) -> int:
        """`metadata.generation` of the job."""
        return int(self.manifest["metadata"].get("generation", 0))

    @cached_property
    def policy(self) -> RunPolicySpec:
        """`spec.runPolicy`, read apart from the rest of the spec. So the orders and deadlines of `runPolicy` hold even
        where this version can't read the rest."""
        return self._section("runPolicy", RunPolicySpec)

    @cached_property
    def resources(self) -> ResourcesSpec:
        """`spec.resources`, as far as this version can read it."""
        return self._section("resources", ResourcesSpec)

    @cached_property
    def requirements(self) -> list[RequirementSpec]:
        """`spec.evaluation.require`, as far as this version can read it."""
        return self._section("evaluation", EvaluationSpec).require or []

    def _section(self, name: str, model: type[Section]) -> Section:
        spec = self.manifest.get("spec")
        stored = spec.get(name) if isinstance(spec, dict) else None
        return read_section(model, {} if stored is None else stored, self.now)[0]

    @property
    def log_fields(self) -> dict[str, object]:
        """Fields for log lines about this job."""
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
    """Return the job ``key`` as ``manifest`` stores it. Values of the status that this version can't read are left out,
    and their paths are listed in `unread`. Counts of attempts that are too low are corrected."""
    now = now.replace(microsecond=0)
    status, unread = read_section(FineTuneJobStatus, manifest.get("status") or {}, now)
    status = status.model_copy(update={"attempts": _counted(status.attempts)})
    return StoredJob(key=key, manifest=manifest, status=status, unread=tuple(unread), now=now, memory=memory)


def _field_of(path: str) -> str:
    """Return the field of the status to which ``path`` leads, for example `metrics` for `metrics[2].value`."""
    return path.partition(".")[0].partition("[")[0]


def _is_bookkeeping(path: str) -> bool:
    """Return whether the unread value at ``path`` is needed for decisions.

    Decisions need the fields in `_BOOKKEEPING`, the list of conditions, each condition in it, and the type and the
    status of each condition.
    """
    decisive = path.endswith(("]", ".type", ".status")) or path == "conditions"
    return _field_of(path) in _BOOKKEEPING or (_field_of(path) == "conditions" and decisive)


def _counted(attempts: AttemptsStatus) -> AttemptsStatus:
    """Return ``attempts`` with counts that are at least as large as the attempts in `current` and `recent` show.

    Another version of the operator may have left out counts, the number of the current attempt, and uids of pods. The
    counts are corrected, because no second attempt may get a number that is used already, and because retries are
    limited. A missing number of the current attempt is taken from `started`. A current attempt with neither a number
    nor pods is removed. Pod records without a uid are removed, because each would look like a pod that vanished.
    """
    current, recent = attempts.current, attempts.recent
    if current is not None and current.number < 1 and not current.pods:
        # The operator has removed ``current``, and server-side apply has kept the fields that somebody else applied.
        current = None
    if current is not None and (current.number < 1 or not all(record.uid for record in current.pods)):
        pods = [record for record in current.pods if record.uid]
        number = current.number if current.number >= 1 else max(1, attempts.started)
        current = current.model_copy(update={"pods": pods, "number": number})
    numbers = [past.number for past in recent] + ([current.number] if current is not None else [])
    least = {
        "started": max(numbers, default=0),
        "charged": sum(past.verdict == "Charged" for past in recent),
        "free": sum(past.verdict == "Free" for past in recent),
    }
    counts = {name: max(getattr(attempts, name), count) for name, count in least.items()}
    return attempts.model_copy(update=counts | {"current": current})


def parse_spec(stored: StoredJob) -> ParsedJob:
    """Return the stored job with its parsed spec; raises ValidationError where this version of the
    operator can't read the spec."""
    fields = ("apiVersion", "kind", "metadata", "spec")
    resource = FineTuneJob.model_validate(present_manifest({name: stored.manifest[name] for name in fields}))
    known = {each.name: getattr(stored, each.name) for each in dataclasses.fields(stored)}
    return ParsedJob(resource=resource, **known)
