"""Prometheus metrics of the jobs, collected from the newest status of each job.

`reconcile.py` and `status/writer.py` pass in the newest status. A job's series are exported until the job is deleted,
or until an hour after its end, so that ended jobs do not pile up in Prometheus. The labels are `job_namespace` and
`job_name`, because Prometheus itself sets `namespace` and `job` for the scraped target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_core.api import FineTuneJobStatus
from finetune_operator.queue.work_queue import Key

RETENTION_AFTER_END: Final = timedelta(hours=1)
"""How long after its end the series of a job are still exported."""
LABELS: Final = ("job_namespace", "job_name")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobMetrics:
    """The exported numbers of one job. They are kept instead of the whole status, because a status is large."""

    step: int | None = None
    total_steps: int | None = None
    eta_seconds: int | None = None
    loss: float | None = None
    perplexity: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    checkpoint_time: datetime | None = None
    started: int = 0
    charged: int = 0
    free: int = 0
    gpu_seconds: int = 0
    ended: datetime | None = None


def job_metrics(status: FineTuneJobStatus) -> JobMetrics:
    """Return the exported numbers of a job with ``status``; a number that the status lacks is None."""
    progress, attempts = status.progress, status.attempts
    metrics = {metric.name: _number(metric.value) for metric in status.metrics}
    return JobMetrics(
        step=progress.step if progress else None,
        total_steps=progress.total_steps if progress else None,
        eta_seconds=progress.eta_seconds if progress else None,
        loss=metrics.get("loss"),
        perplexity=metrics.get("perplexity"),
        tokens_per_second=_number(progress.tokens_per_second) if progress else None,
        mfu=_number(progress.mfu) if progress else None,
        checkpoint_time=status.checkpoints[-1].time if status.checkpoints else None,
        started=attempts.started,
        charged=attempts.charged,
        free=attempts.free,
        gpu_seconds=status.usage.gpu_seconds if status.usage else 0,
        ended=status.completion_time,
    )


def _number(text: str | None) -> float | None:
    """Return ``text`` as a number; None where it is absent, or where another version has written something else."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


class JobMetricsCollector(Collector):
    """Custom collector of prometheus_client that yields the series of all jobs at each scrape."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        """Create a collector without jobs. ``now`` returns the current time, from which ages are computed."""
        self._now = now
        self._jobs: dict[Key, JobMetrics] = {}

    def update(self, key: Key, status: FineTuneJobStatus) -> None:
        """Export the numbers of ``status`` for the job ``key`` until the next call for the same job."""
        self._jobs[key] = job_metrics(status)

    def remove(self, key: Key) -> None:
        """Stop the export of the job ``key``, which no longer exists."""
        self._jobs.pop(key, None)

    def collect(self) -> Iterable[Metric]:
        """Yield all metric families with a sample for each job; a number that is None gets no sample."""
        now = self._now()
        exported = [(key, job) for key, job in list(self._jobs.items()) if not _is_expired(job, now)]
        for name, text, value in GAUGES:
            family = GaugeMetricFamily(f"finetune_job_{name}", text, labels=LABELS)
            for key, job in exported:
                if (number := value(job)) is not None:
                    family.add_metric(key, number)
            yield family
        age = GaugeMetricFamily(
            "finetune_job_checkpoint_age_seconds", "Seconds since the newest checkpoint was committed.", labels=LABELS
        )
        attempts = GaugeMetricFamily(
            "finetune_job_attempts", "Attempts: started, charged to maxRetries, free.", labels=(*LABELS, "kind")
        )
        gpus = CounterMetricFamily("finetune_job_gpu_seconds", "Seconds that GPUs were held.", labels=LABELS)
        for key, job in exported:
            if job.checkpoint_time is not None:
                age.add_metric(key, (now - job.checkpoint_time).total_seconds())
            for kind, count in (("started", job.started), ("charged", job.charged), ("free", job.free)):
                attempts.add_metric((*key, kind), count)
            gpus.add_metric(key, job.gpu_seconds)
        yield from (age, attempts, gpus)


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
)
