"""Prometheus metrics of the operator itself; `job_metrics.py` has the metrics of the jobs.

`application.py` creates one `Metrics` object. The other modules set its members, and `health.py` serves it at /metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from finetune_operator import __version__
from finetune_operator.process.job_metrics import JobMetricsCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """All metrics of one operator, in a registry of their own, so that tests can run two operators in one process."""

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Register every metric.

        ``now`` returns the current time, from which the ages of the jobs' checkpoints and reports are computed.
        """
        self._registry = CollectorRegistry()
        self.jobs = JobMetricsCollector(now)
        self._registry.register(self.jobs)
        self.reconciles = Counter(
            "finetune_reconciles", "Looks at a job, by result.", ["result"], registry=self._registry
        )
        self.reconcile_seconds = Histogram(
            "finetune_reconcile_seconds", "Duration of a look at a job.", registry=self._registry
        )
        self.jobs_ended = Counter(
            "finetune_jobs_ended",
            "Jobs that ended, by the reason of the condition Succeeded.",
            ["reason"],
            registry=self._registry,
        )
        self.status_writes = Counter("finetune_status_writes", "Status writes.", registry=self._registry)
        self.node_refusals = Counter(
            "finetune_node_refusals",
            "Attempts that ended because this node did not start a pod.",
            ["node"],
            registry=self._registry,
        )
        self.queue_depth = Gauge("finetune_queue_depth", "Jobs that wait for a worker.", registry=self._registry)
        self.queue_age_seconds = Gauge(
            "finetune_queue_age_seconds", "Age of the job that waits longest.", registry=self._registry
        )
        self.watch_age_seconds = Gauge(
            "finetune_watch_age_seconds", "Seconds since something was watched or listed.", registry=self._registry
        )
        self.unlisted_namespaces = Gauge(
            "finetune_unlisted_namespaces",
            "Watched namespaces whose jobs could not be listed at the last try.",
            registry=self._registry,
        )
        self.reports_accepted = Counter("finetune_reports_accepted", "Reports taken.", registry=self._registry)
        self.reports_refused = Counter(
            "finetune_reports_refused", "Reports refused, by HTTP status.", ["code"], registry=self._registry
        )
        self.certificate_expiry = Gauge(
            "finetune_certificate_expiry_timestamp_seconds",
            "End of the report certificate, Unix time.",
            registry=self._registry,
        )

        build = Gauge("finetune_build_info", "1, with the version.", ["version"], registry=self._registry)
        build.labels(__version__).set(1)
        self.leader = Gauge("finetune_leader", "1 where this replica leads, else 0.", registry=self._registry)
        self.lease_age_seconds = Gauge(
            "finetune_lease_age_seconds", "Seconds since the leader renewed its Lease.", registry=self._registry
        )

    def render(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)
