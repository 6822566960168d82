"""Measure the whole operator while a thousand running jobs report to it as the trainer does.

Each job has one pod, which runs on the stub node, and one reporter with a token that the API server issued for this
pod. Four figures have a limit: the operator's memory, the delay of its event loop, the age of the report that a status
shows, and the number of status writes. `reports.py` measures the report server alone.

    python -m tests.bench --only reporting
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from finetune_core.contract import CurvePoint, report_audience, report_path
from finetune_operator.objects.labels import ATTEMPT, JOB_NAME
from tests.bench.fleet import (
    API_SERVER,
    JOBS_NEW,
    PATIENCE_SECONDS,
    UNTHROTTLED,
    lag_of,
    one_pod,
    percentile,
    print_gates,
    processor_seconds,
    reconciles,
    writes,
)
from tests.cluster.layout import HOST_ADDRESS
from tests.faults.admin import Admin, Manifest
from tests.faults.world import JOBS, World, running_world
from tests.operator.report_servers import Streams, client_context, exchange, request
from tests.operator.test_report_server import body

REPORT_PORT = 18443
REPORT_SECONDS = 3.0
"""Seconds between two reports of a job, as in the trainer."""
WARM_SECONDS = 30.0
MEASURED_SECONDS = 60.0
CURVE = [CurvePoint(step=step, loss=1.25, perplexity=2.5) for step in range(60)]


@dataclass
class Reporting:
    """The reports that were sent, the reports that the statuses show, and the answers to the reports. Jobs are given by
    their names. Times are those of `time.monotonic`."""

    sent: dict[tuple[str, int], float] = field(default_factory=dict)
    """For each job and step, the time at which the report with this step was sent."""
    shown: dict[str, int] = field(default_factory=dict)
    """For each job, the newest step that its status shows."""
    answers: Counter[int] = field(default_factory=Counter)
    """For each HTTP status code, the number of reports that were answered with it. 0 counts the reports that got no
    answer."""

    def ages(self, now: float) -> list[float]:
        """Return, for each job, the seconds from the sending of the report that its status shows until ``now``."""
        return [now - self.sent[job, step] for job, step in self.shown.items()]


async def follow_statuses(admin: Admin, reporting: Reporting) -> None:
    """Watch the jobs without end, and record the step that each status shows."""
    async for event in admin.watch(JOBS):
        job = event["object"]
        step = job.get("status", {}).get("progress", {}).get("step")
        if step:
            reporting.shown[job["metadata"]["name"]] = step


async def token_of(admin: Admin, pod: Manifest, job_uid: str) -> str:
    """Return a service-account token for reports that is bound to ``pod``, as the kubelet requests it."""
    metadata = pod["metadata"]
    bound = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
    spec = {"audiences": [report_audience(job_uid)], "expirationSeconds": 3600, "boundObjectRef": bound}
    path = f"/api/v1/namespaces/{metadata['namespace']}/serviceaccounts/default/token"
    issued = await admin.call("POST", path, {"spec": spec})
    token: str = issued["status"]["token"]
    return token


async def report_forever(admin: Admin, number: int, pod: Manifest, job_uid: str, reporting: Reporting) -> None:
    """Send a report of ``pod`` every three seconds. All reports go over one connection until it ends, and then over a
    new connection. Each reporter has a source address of its own, as each pod has. ``number`` is the number of the
    reporter, which determines the address and the time of the first report."""
    name, pod_uid = pod["metadata"]["labels"][JOB_NAME], pod["metadata"]["uid"]
    token = await token_of(admin, pod, job_uid)
    path = report_path(pod["metadata"]["namespace"], name, int(pod["metadata"]["labels"][ATTEMPT]))
    source = f"127.1.{number // 250}.{number % 250 + 1}"
    streams: Streams | None = None
    step = 0
    await asyncio.sleep(REPORT_SECONDS * number / JOBS_NEW)
    while True:
        step += 1
        report = body(pod_uid=pod_uid, ranks=1, step=step, total_steps=10**6, history=CURVE)
        reporting.sent[name, step] = time.monotonic()
        try:
            streams = streams or await asyncio.open_connection(
                HOST_ADDRESS, REPORT_PORT, ssl=client_context(), local_addr=(source, 0)
            )
            status, _, _ = await exchange(streams, request(path, token, report))
        except OSError:
            status = 0
        reporting.answers[status] += 1
        if status == 0:
            streams = None
        await asyncio.sleep(REPORT_SECONDS)


async def start_reporters(world: World, namespace: str, reporting: Reporting) -> None:
    """Start a reporter for each pod of ``namespace``. The reporters run until the end of ``world``, whose
    event loop then cancels them."""
    pods = await world.admin.list_all(f"/api/v1/namespaces/{namespace}/pods")
    jobs = await world.admin.list_all(f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs")
    uids = {job["metadata"]["name"]: job["metadata"]["uid"] for job in jobs}
    for number, pod in enumerate(pods):
        uid = uids[pod["metadata"]["labels"][JOB_NAME]]
        world.loop.spawn(report_forever(world.admin, number, pod, uid, reporting))


def run() -> None:
    """Run the measurement and print its table."""
    console = Console(width=120)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_world(Path(folder), direct=True, flags=UNTHROTTLED) as world,
    ):
        world.operator.start()
        world.operator.wait_ready(120)
        namespace, reporting = world.namespace(), Reporting()
        world.create(namespace, *(one_pod("run", name=f"job-{number}") for number in range(JOBS_NEW)))

        def all_run() -> bool:
            running = [pod for pod in world.pods(namespace) if pod["status"].get("phase") == "Running"]
            return len(running) == JOBS_NEW

        world.wait("all pods to run", all_run, PATIENCE_SECONDS, 2)
        world.loop.spawn(follow_statuses(world.admin, reporting))
        world.loop.run(start_reporters(world, namespace, reporting))
        world.wait("a step in all statuses", lambda: len(reporting.shown) == JOBS_NEW, PATIENCE_SECONDS, 1)
        pause(WARM_SECONDS)
        written, received = writes(world.operator), sum(reporting.answers.values())
        looked, processor = reconciles(world.operator), processor_seconds(world)
        oldest: list[float] = []
        with lag_of(world.operator) as lag:
            began = time.monotonic()
            while time.monotonic() < began + MEASURED_SECONDS:
                pause(1)
                oldest.append(max(reporting.ages(time.monotonic())))
        written = (writes(world.operator) - written) / MEASURED_SECONDS
        received = sum(reporting.answers.values()) - received
        looked = (reconciles(world.operator) - looked) / MEASURED_SECONDS
        busy = {name: (took - processor[name]) / MEASURED_SECONDS for name, took in processor_seconds(world).items()}
        memory = world.operator.memory()["VmHWM"]
        print_gates(
            console,
            [
                (f"{JOBS_NEW} reporting jobs: memory of the operator, highest", f"{memory / 1e6:.0f} MB", "300 MB"),
                ("event loop late by, p99", f"{percentile(sorted(lag), 0.99) * 1000:.0f} ms", "100 ms"),
                ("oldest status of all jobs", f"{max(oldest):.1f} s", "15 s"),
                ("status writes a second for each 10 jobs", f"{written / JOBS_NEW * 10:.2f}", "1.00"),
                ("reports a second", f"{received / MEASURED_SECONDS:.0f}", ""),
                ("looks a second", f"{looked:.0f}", ""),
                ("processor time of the operator, cores", f"{busy['operator']:.2f}", ""),
                ("processor time of the API server, cores", f"{busy[API_SERVER]:.2f}", ""),
                ("answers", str(dict(reporting.answers)), ""),
            ],
        )


def pause(seconds: float) -> None:
    """Wait for ``seconds`` while the measured programs run."""
    # The length of the pause is a part of the measurement. The pause does not wait for a state of another program.
    time.sleep(seconds)


if __name__ == "__main__":
    run()
