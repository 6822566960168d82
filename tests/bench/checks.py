"""Measure how soon attempt 1 follows the preflight check, which the operator runs for each job by default.

A stub node ends each check 0.2 s after its pod runs. The measured time begins with the watch event that shows the end
of the check's pod, and ends with the watch event that shows attempt 1 of the job. First single jobs are measured: each
is created after attempt 1 of the job before has been seen. Then a few jobs at a time are measured while
`FINETUNE_BENCH_JOBS` (default 1000) jobs of another namespace, which were created at once, go through their checks.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from finetune_operator.objects.labels import JOB_NAME, PREFLIGHT
from tests.bench.fleet import (
    JOBS_NEW,
    PATIENCE_SECONDS,
    UNTHROTTLED,
    Fleet,
    create_all,
    one_pod,
    percentile,
    print_gates,
)
from tests.faults.admin import Admin
from tests.faults.world import JOBS, World, running_world

SINGLE_JOBS = 10
JOBS_AT_ONCE = 5
Name = tuple[str, str]


@dataclass
class Checks:
    """For each job, by namespace and name: the time at which its check was first seen as ended (``ended``), and the
    time at which its status first showed attempt 1 (``opened``). The times are those of `time.monotonic`."""

    ended: dict[Name, float] = field(default_factory=dict)
    opened: dict[Name, float] = field(default_factory=dict)

    def seconds(self, namespace: str) -> list[float]:
        """Return, sorted, the seconds from the end of the check to attempt 1 for each job of ``namespace`` that has an
        attempt. The number is 0 for a job whose check was not seen as ended."""
        return sorted(at - self.ended.get(name, at) for name, at in self.opened.items() if name[0] == namespace)

    def opened_in(self, namespace: str, count: int) -> bool:
        """Return whether at least ``count`` jobs of ``namespace`` have an attempt."""
        return sum(name[0] == namespace for name in self.opened) >= count


async def follow_pods(admin: Admin, checks: Checks) -> None:
    """Watch pods without end, and record in ``checks`` when the pod of each job's check was first seen as ended."""
    async for event in admin.watch("/api/v1/pods"):
        pod = event["object"]
        labels = pod["metadata"].get("labels", {})
        if PREFLIGHT in labels and pod["status"].get("phase") in ("Succeeded", "Failed"):
            checks.ended.setdefault((pod["metadata"]["namespace"], labels[JOB_NAME]), time.monotonic())


async def follow_jobs(admin: Admin, checks: Checks) -> None:
    """Watch FineTuneJobs without end, and record in ``checks`` when each job was first seen with an attempt."""
    async for event in admin.watch(JOBS):
        job = event["object"]
        if job.get("status", {}).get("attempts", {}).get("started"):
            checks.opened.setdefault((job["metadata"]["namespace"], job["metadata"]["name"]), time.monotonic())


def apply(world: World, namespace: str, names: list[str]) -> None:
    """Create a job of one pod for each name in ``names``. The function does not wait until the jobs exist."""
    manifests = [one_pod("done", name=name) for name in names]
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
    world.loop.spawn(create_all(world.admin, path, manifests, Fleet()))


def run() -> None:
    """Run the measurement and print its table."""
    console = Console(width=120)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_world(Path(folder), direct=True, flags=UNTHROTTLED, settings={"preflight": "Run"}) as world,
    ):
        checks = Checks()
        world.loop.spawn(follow_pods(world.admin, checks))
        world.loop.spawn(follow_jobs(world.admin, checks))
        world.operator.start()
        world.operator.wait_ready(120)

        idle = world.namespace()
        for number in range(1, SINGLE_JOBS + 1):
            apply(world, idle, [f"job-{number}"])
            world.wait("attempt 1", partial(checks.opened_in, idle, number), 120)

        crowd, beside = world.namespace(), world.namespace()
        apply(world, crowd, [f"job-{number}" for number in range(JOBS_NEW)])
        applied = 0
        began = time.monotonic()
        while not checks.opened_in(crowd, JOBS_NEW) and time.monotonic() < began + PATIENCE_SECONDS:
            apply(world, beside, [f"job-{applied + number}" for number in range(JOBS_AT_ONCE)])
            applied += JOBS_AT_ONCE
            world.wait("attempt 1 beside the others", partial(checks.opened_in, beside, applied), PATIENCE_SECONDS)
        world.wait("attempt 1 of all jobs", partial(checks.opened_in, crowd, JOBS_NEW), PATIENCE_SECONDS, 1)
        alone, others, among = (checks.seconds(namespace) for namespace in (idle, beside, crowd))
        rows = [
            ("attempt 1 after the end of the check: one job at a time, most", f"{alone[-1]:.2f} s", "1 s"),
            (
                f"{applied} jobs, few at once, beside {JOBS_NEW} that are new, p99",
                f"{percentile(others, 0.99):.2f} s",
                "5 s",
            ),
            (f"the {JOBS_NEW} jobs themselves, p50", f"{percentile(among, 0.5):.2f} s", ""),
            (f"the {JOBS_NEW} jobs themselves, p99", f"{percentile(among, 0.99):.2f} s", ""),
        ]
        print_gates(console, rows)


if __name__ == "__main__":
    run()
