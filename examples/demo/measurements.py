"""Measures the duration of each phase of the demo, the memory of the operator, and the sizes of checkpoints and
artifact.

The input is a `with` block for each phase, and the states of the job. The output is the file `measurements.json`. The
figures of the demo in docs/performance.md are from this file. `__main__.py` uses this module.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kubernetes import client

from examples.demo.steps import kubernetes_client, operator_memory
from finetune_cli.state import ending, status_of
from finetune_core.api.job import GROUP, FineTuneJob
from tests.cluster import Cluster
from tests.cluster.progress import say

POD_POLL_SECONDS = 0.2
"""Seconds between two queries for the pods."""
ATTEMPT_LABEL = f"{GROUP}/attempt"
"""Label of the pods of an attempt. The pod of the preflight check does not have it."""


@dataclass
class Measurements:
    """The content of `measurements.json`: durations in seconds, sizes in bytes."""

    command: str
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds that each phase of the demo took, in the order of the phases."""
    job: dict[str, float] = field(default_factory=dict)
    """Seconds from `kubectl apply` to each milestone of the job."""
    memory: dict[str, int] = field(default_factory=dict)
    """Memory of the operator in bytes, by the name of the figure, for example ``{"operatorWorkingSetBytes":
    90_000_000}``."""
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    artifact: dict[str, Any] = field(default_factory=dict)
    exact_match: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Print ``name``, the name of a phase, and measure the seconds that the `with` block takes."""
        say(f"\n== {name}")
        started = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = round(time.monotonic() - started, 1)

    def record_sizes(self, cluster: Cluster, job: FineTuneJob) -> None:
        """Record the operator's memory, and the sizes of the checkpoints and the artifact of ``job``, which has
        ended."""
        status = status_of(job)
        self.memory["operatorWorkingSetBytes"] = operator_memory(cluster)
        self.checkpoints = [{"step": point.step, "bytes": point.bytes} for point in status.checkpoints]
        if status.artifact:
            self.artifact = {"step": status.artifact.step, "bytes": status.artifact.bytes}

    def write(self, file: Path) -> None:
        """Write all measurements, the date and a description of the machine into ``file`` as JSON."""
        # The load average is stored with the times, because other load on the machine makes the times longer.
        load = [round(value, 1) for value in os.getloadavg()]
        machine = {
            "cores": os.cpu_count(),
            "loadAverage": load,
            "system": platform.platform(),
            "processor": platform.machine(),
        }
        about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "command": self.command, "machine": machine}
        measured = {
            "phaseSeconds": self.phases,
            "secondsAfterApply": self.job,
            "memory": self.memory,
            "checkpoints": self.checkpoints,
            "artifact": self.artifact,
            "exactMatch": self.exact_match,
        }
        file.write_text(json.dumps(about | measured, indent=2) + "\n")


class JobTimes:
    """Records when the job reaches its milestones, such as its first step. Inside the `with` block a thread records
    when all pods of an attempt, whose number is ``pods``, exist and run. `observe` takes all other milestones from the
    states of the job."""

    def __init__(self, cluster: Cluster, namespace: str, pods: int) -> None:
        self._cluster, self._namespace, self._pods = cluster, namespace, pods
        self._applied = time.monotonic()
        self._times: dict[str, float] = {}
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch_pods, name="pods")

    def __enter__(self) -> JobTimes:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._watcher.join()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds from the creation of this object to each milestone, the earliest first. The object is created right
        before `kubectl apply`."""
        return {name: round(when - self._applied, 1) for name, when in sorted(self._times.items(), key=lambda t: t[1])}

    def observe(self, jobs: Iterable[FineTuneJob]) -> Iterator[FineTuneJob]:
        """Yield each state in ``jobs`` unchanged, and record the milestones that the states show."""
        for job in jobs:
            status = status_of(job)
            if status.conditions:
                self._record("firstStatus")
            if status.progress:
                self._record("firstReport")
            if status.progress and status.progress.step:
                self._record("firstStep")
            if status.checkpoints:
                self._record("firstCheckpoint")
            if ending(job):
                self._record("ended")
            yield job

    def _record(self, milestone: str) -> None:
        self._times.setdefault(milestone, time.monotonic())

    def _watch_pods(self) -> None:
        """Record the time at which all pods of an attempt exist, and the time at which all of these pods run.

        The thread asks the API server for the pods again and again, because the job's status shows the state of the
        pods later."""
        with self._cluster.enter(), kubernetes_client(self._cluster) as api:
            core = client.CoreV1Api(api)
            while not self._stopped.wait(POD_POLL_SECONDS):
                found = core.list_namespaced_pod(
                    self._namespace, label_selector=ATTEMPT_LABEL, _request_timeout=10
                ).items
                if len(found) >= self._pods:
                    self._record("podsCreated")
                if sum(pod.status.phase == "Running" for pod in found) >= self._pods:
                    self._record("podsRunning")
                    return
