"""Prometheus metrics of the jobs, collected from the newest status of each job.

`reconcile.py` and `status/writer.py` pass in the newest status. A job's series are exported until the job is deleted,
or until an hour after its end, so that ended jobs do not pile up in Prometheus. The jobs of a namespace are not
exported where the API server has refused to list them for more than a resync period (`controller.py`). The labels are
`job_namespace` and `job_name`, because Prometheus itself sets `namespace` and `job` for the scraped target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_core.api import FineTuneJobStatus
from finetune_core.api.conditions import ConditionType
from finetune_operator.queue.key import Key

RETENTION_AFTER_END: Final = timedelta(hours=1)
"""How long after its end the series of a job are still exported."""
MOST_DIGITS: Final = 64
"""Largest number of characters of a text in the status that is read as a number. The CRD allows at most 32."""
LABELS: Final = ("job_namespace", "job_name")
INFO_LABELS: Final = ("model", "method", "queue")
CONDITION_LABELS: Final = ("type", "status", "reason")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobMetrics:
    """What is exported of one job. These values are kept instead of the whole status, because a status is large."""

    step: float | None = None
    total_steps: float | None = None
    eta_seconds: float | None = None
    loss: float | None = None
    perplexity: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    running_since: datetime | None = None
    """Time since which the condition Running is True; None while the condition is not True."""
    checkpoint_time: datetime | None = None
    report_time: datetime | None = None
    preflight_tries: float | None = None
    model: str = ""
    method: str = ""
    queue: str = ""
    conditions: tuple[tuple[str, str, str], ...] = ()
    """Type, status and reason of every condition in the status whose type this version knows."""
    started: float = 0
    charged: float = 0
    free: float = 0
    gpu_seconds: float = 0
    ended: datetime | None = None


def job_metrics(spec: Mapping[str, Any], status: FineTuneJobStatus) -> JobMetrics:
    """Return what is exported of a job with ``spec``, as the API server stores it, and ``status``.

    A number that the status lacks is None; counts of attempts and GPU seconds that the status lacks are 0. A part of
    the spec that this version does not know gives an empty text.
    """
    progress, attempts = status.progress, status.attempts
    metrics = {metric.name: _number(metric.value) for metric in status.metrics}
    known = [condition for condition in status.conditions if condition.type in set(ConditionType)]
    running = [item for item in known if item.type == ConditionType.RUNNING and item.status == "True"]
    return JobMetrics(
        step=_number(progress.step) if progress else None,
        total_steps=_number(progress.total_steps) if progress else None,
        eta_seconds=_number(progress.eta_seconds) if progress else None,
        loss=metrics.get("loss"),
        perplexity=metrics.get("perplexity"),
        tokens_per_second=_number(progress.tokens_per_second) if progress else None,
        mfu=_number(progress.mfu) if progress else None,
        running_since=running[0].last_transition_time if running else None,
        checkpoint_time=status.checkpoints[-1].time if status.checkpoints else None,
        report_time=progress.last_update_time if progress else None,
        preflight_tries=_number(status.preflight.tries) if status.preflight else None,
        model=_model(spec),
        method=_text(spec, "method"),
        queue=_text(spec, "runPolicy", "queueName"),
        conditions=tuple((item.type, item.status, item.reason) for item in known),
        started=_number(attempts.started) or 0,
        charged=_number(attempts.charged) or 0,
        free=_number(attempts.free) or 0,
        gpu_seconds=_number(status.usage.gpu_seconds) or 0 if status.usage else 0,
        ended=status.completion_time,
    )


def _model(spec: Mapping[str, Any]) -> str:
    """Return where the base model comes from: a repository of the Hub, an `s3://` address, or a PersistentVolumeClaim
    and a path in it. Empty where this version can't tell."""
    claim, path = _text(spec, "model", "volume", "claimName"), _text(spec, "model", "volume", "path")
    hub, bucket = _text(spec, "model", "huggingFace", "repo"), _text(spec, "model", "s3", "uri")
    return hub or bucket or (f"{claim}/{path}" if claim else "")


def _text(spec: Mapping[str, Any], *path: str) -> str:
    """Return the text at ``path`` of a stored spec; empty where there is none."""
    value: Any = spec
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else ""


def _number(value: str | int | None) -> float | None:
    """Return ``value`` as a number; None where it is absent, or where it is no number that Prometheus can express.

    The series of all jobs are rendered together, so one value that is no number would make the rendering fail for every
    job. A text of more than `MOST_DIGITS` characters counts as no number, because no number of a status is so long.
    """
    if isinstance(value, str) and len(value) > MOST_DIGITS:
        return None
    try:
        return None if value is None else float(value)
    except (ValueError, OverflowError):
        return None


class JobMetricsCollector(Collector):
    """Custom collector of prometheus_client that yields the series of all jobs at each scrape."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        """Create a collector without jobs. ``now`` returns the current time, from which ages are computed."""
        self._now = now
        self._jobs: dict[Key, JobMetrics] = {}
        self._hidden: set[str | None] = set()

    def update(self, key: Key, spec: Mapping[str, Any], status: FineTuneJobStatus) -> None:
        """Export ``status`` and parts of ``spec`` (as stored) for the job ``key`` until the next call for that job."""
        self._jobs[key] = job_metrics(spec, status)

    def remove(self, key: Key) -> None:
        """Stop the export of the job ``key``, which no longer exists."""
        self._jobs.pop(key, None)

    def hide(self, namespace: str | None) -> None:
        """Export no job of ``namespace`` until `show` is called for it. None means the jobs of all namespaces."""
        self._hidden.add(namespace)

    def show(self, namespace: str | None) -> None:
        """Export the jobs of ``namespace`` again after `hide` with the same ``namespace``."""
        self._hidden.discard(namespace)

    def _is_hidden(self, key: Key) -> bool:
        return None in self._hidden or key.namespace in self._hidden

    def collect(self) -> Iterable[Metric]:
        """Yield all metric families with the samples of the exported jobs. A number that is None gets no sample."""
        now = self._now()
        jobs = list(self._jobs.items())
        exported = [(key, job) for key, job in jobs if not (self._is_hidden(key) or _is_expired(job, now))]
        for name, text, value in GAUGES:
            family = GaugeMetricFamily(f"finetune_job_{name}", text, labels=LABELS)
            for key, job in exported:
                if (number := value(job)) is not None:
                    family.add_metric(key, number)
            yield family
        for name, text, since in AGES:
            family = GaugeMetricFamily(f"finetune_job_{name}_age_seconds", text, labels=LABELS)
            for key, job in exported:
                if job.running_since is not None and job.ended is None:
                    family.add_metric(
                        key, (now - max(since(job) or job.running_since, job.running_since)).total_seconds()
                    )
            yield family
        info = GaugeMetricFamily("finetune_job_info", "1, with parts of the spec.", labels=(*LABELS, *INFO_LABELS))
        conditions = GaugeMetricFamily(
            "finetune_job_condition", "1 for the status and reason of a condition.", labels=(*LABELS, *CONDITION_LABELS)
        )
        attempts = GaugeMetricFamily(
            "finetune_job_attempts", "Attempts: started, charged to maxRetries, free.", labels=(*LABELS, "kind")
        )
        gpus = CounterMetricFamily("finetune_job_gpu_seconds", "Seconds that GPUs were held.", labels=LABELS)
        for key, job in exported:
            info.add_metric((*key, job.model, job.method, job.queue), 1)
            for condition in job.conditions:
                conditions.add_metric((*key, *condition), 1)
            for kind, count in (("started", job.started), ("charged", job.charged), ("free", job.free)):
                attempts.add_metric((*key, kind), count)
            gpus.add_metric(key, job.gpu_seconds)
        yield from (info, conditions, attempts, gpus)


def _is_expired(job: JobMetrics, now: datetime) -> bool:
    return job.ended is not None and now - job.ended > RETENTION_AFTER_END


GAUGES: Final[tuple[tuple[str, str, Callable[[JobMetrics], float | None]], ...]] = (
    ("step", "Global batches consumed.", lambda job: job.step),
    ("total_steps", "Global batches of the whole run.", lambda job: job.total_steps),
    ("eta_seconds", "Estimated seconds to the last step.", lambda job: job.eta_seconds),
    ("loss", "Newest training loss.", lambda job: job.loss),
    ("perplexity", "Newest validation perplexity.", lambda job: job.perplexity),
    ("tokens_per_second", "Tokens per second over all processes.", lambda job: job.tokens_per_second),
    ("mfu", "Model FLOPs utilisation, 0 to 1.", lambda job: job.mfu),
    ("preflight_tries", "Tries of the preflight check that have ended.", lambda job: job.preflight_tries),
)
AGES: Final[tuple[tuple[str, str, Callable[[JobMetrics], datetime | None]], ...]] = (
    ("checkpoint", "Seconds of a running job since its newest checkpoint.", lambda job: job.checkpoint_time),
    ("report", "Seconds of a running job since its newest report.", lambda job: job.report_time),
)
"""Each age by name, with its help text and the time from which it is counted. Ages are exported only while the job
runs, and are never counted from a time before `running_since`. So a job that goes on after hours of suspension does not
get an age of hours."""
