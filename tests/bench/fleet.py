"""Measure the operator with thousands of jobs, for R2 to R4 of docs/performance.md. These are gates, which means
requirements with a limit.

First `floor.py` measures how long a client alone takes to make the writes for 1000 new jobs. Then 1000 PyTorchJobs run
with Kubeflow's training-operator alone, and then 1000 FineTuneJobs with our operator and the training-operator (R3).
Then the operator is restarted twice: first with the 1000 ended jobs in the cluster (R2), and then with these jobs and
4000 suspended jobs in the cluster (R4). No real pod runs: a stub node sets the status of each pod. The results are two
tables. `FINETUNE_BENCH_JOBS` sets another number instead of 1000, and the number of suspended jobs is four times that
number.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from finetune_core.api import FineTuneJob
from finetune_operator.objects.backends.pytorchjob import build_pytorchjob
from finetune_operator.objects.pod_template import AttemptSpec
from tests.bench import floor
from tests.faults.admin import Admin, Manifest
from tests.faults.operators import OperatorProcess
from tests.faults.world import CHILDREN, JOBS, World, job, running_world, settled
from tests.operator.builders import is_observed

JOBS_NEW = int(os.environ.get("FINETUNE_BENCH_JOBS", "1000"))
JOBS_IDLE = 5 * JOBS_NEW
PATIENCE_SECONDS = 900
PROBE_SECONDS = 0.1
RESYNC_SECONDS = 120
"""Seconds between two resyncs (the operator's lists of all jobs). The operator's default is 300 s, but R4 waits for a
resync, so this measurement shortens the time."""
SCRAPE_SECONDS = 2.0
"""Seconds between two reads of the operator's metrics. The reads are rare, because with thousands of jobs each read
takes the operator some time."""
UNTHROTTLED = {"training-operator": ["--kube-api-qps=500", "--kube-api-burst=1000"]}
"""Flags that raise the training-operator's limit of API requests per second. The default limit of 20 requests allows
only three jobs per second. The measurement would then show this limit, and not the speed of the operator."""
API_SERVER, TRAINING_OPERATOR = "api-server", "training-operator"


@dataclass
class Fleet:
    """When many jobs reached certain states. ``created`` maps the name of a job to the time (`time.monotonic`) right
    before the request that created the job. Each of the other dictionaries, except ``processor``, maps the name of a
    job to the time at which a watch first observed one state of the job."""

    created: dict[str, float] = field(default_factory=dict)
    first_event: dict[str, float] = field(default_factory=dict)
    """Time of the first watch event of each job."""
    first_status: dict[str, float] = field(default_factory=dict)
    """Time at which each job's status first had conditions."""
    ended: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    """CPU seconds that each program used during the run, by the name of the program."""

    def seconds(self, moments: dict[str, float]) -> list[float]:
        """Return, sorted, the seconds from each job's creation to its time in ``moments``, which is one of the
        dictionaries of this object."""
        return sorted(moments[name] - self.created[name] for name in moments)

    def span(self, moments: dict[str, float]) -> float:
        """Return the seconds from the creation of the first job to the last time in ``moments``, which is one of the
        dictionaries of this object."""
        return max(moments.values()) - min(self.created.values())


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile of ``values``, which must be sorted: at least ``share`` of them are not above the result.
    ``share`` is 0.99 for the 99th percentile."""
    return values[min(len(values) - 1, int(share * len(values)))]


async def follow(admin: Admin, path: str, namespace: str, fleet: Fleet, is_over: Callable[[Manifest], bool]) -> None:
    """Watch the objects at ``path`` without end. Record in ``fleet`` when each object of ``namespace`` was first
    observed, when it first had conditions, and when ``is_over`` was first true for it."""
    async for event in admin.watch(path):
        manifest = event["object"]
        if manifest["metadata"]["namespace"] != namespace:
            continue
        name, now = manifest["metadata"]["name"], time.monotonic()
        fleet.first_event.setdefault(name, now)
        if manifest.get("status", {}).get("conditions"):
            fleet.first_status.setdefault(name, now)
        if is_over(manifest):
            fleet.ended.setdefault(name, now)


async def create_all(admin: Admin, path: str, manifests: Sequence[Manifest], fleet: Fleet) -> None:
    """Create the objects with at most 16 requests at a time. Record in ``fleet`` for each object the time right before
    its request."""
    turns = asyncio.Semaphore(16)

    async def create(manifest: Manifest) -> None:
        async with turns:
            fleet.created[manifest["metadata"]["name"]] = time.monotonic()
            await admin.call("POST", path, manifest)

    await asyncio.gather(*(create(manifest) for manifest in manifests))


def child_is_over(manifest: Manifest) -> bool:
    """Return whether the PyTorchJob has succeeded."""
    conditions = manifest.get("status", {}).get("conditions") or []
    return any(item["type"] == "Succeeded" and item["status"] == "True" for item in conditions)


def one_pod(*words: str, name: str, **spec: Any) -> Manifest:
    """Return the manifest of a FineTuneJob with one pod. ``words`` is the script (see stub_node.py) that determines how
    the stub node ends the pods. The script has one word for each attempt. ``spec`` replaces whole sections of the
    job's spec."""
    manifest = job(*words, name=name, **spec)
    manifest["spec"]["resources"]["nodes"] = 1
    return manifest


def measure_children(world: World) -> tuple[Fleet, int]:
    """Run the PyTorchJobs that our operator would create, but without our operator. Return the observed times, and the
    training-operator's memory in bytes."""
    namespace = world.namespace()
    manifests = []
    for number in range(JOBS_NEW):
        raw = one_pod("done", name=f"job-{number}")
        raw["metadata"] |= {"namespace": namespace, "uid": f"uid-{number}", "generation": 1}
        plan = AttemptSpec(
            number=1, name=f"job-{number}", image="localhost/trainer:1", report_base_url="https://operator"
        )
        child = build_pytorchjob(FineTuneJob.model_validate(raw), plan)
        del child["metadata"]["ownerReferences"]
        child["metadata"]["labels"] = {}
        manifests.append(child)
    path = f"/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs"
    fleet = run_fleet(world, CHILDREN, path, namespace, manifests, child_is_over)
    resident = resident_bytes(world.cluster.components[TRAINING_OPERATOR].pid)
    return fleet, resident


def run_fleet(
    world: World,
    watched: str,
    path: str,
    namespace: str,
    manifests: Sequence[Manifest],
    is_over: Callable[[Manifest], bool],
) -> Fleet:
    """Create the objects of ``manifests``, wait until ``is_over`` holds for all of them, and return the observed
    times."""
    fleet = Fleet()
    before = processor_seconds(world)
    world.loop.spawn(follow(world.admin, watched, namespace, fleet, is_over))
    world.loop.run(create_all(world.admin, path, manifests, fleet), PATIENCE_SECONDS)
    world.wait("all to end", lambda: len(fleet.ended) == len(manifests), PATIENCE_SECONDS, 0.5)
    fleet.processor = {name: took - before.get(name, 0.0) for name, took in processor_seconds(world).items()}
    return fleet


def processor_seconds(world: World) -> dict[str, float]:
    """Return the CPU seconds that each program has used since its start, by name: API server, training-operator and, if
    it runs, our operator."""
    pids = {name: world.cluster.components[name].pid for name in (API_SERVER, TRAINING_OPERATOR)}
    if world.operator.pid is not None:
        pids["operator"] = world.operator.pid
    # The CPU times are fields 14 and 15 of /proc/PID/stat. The line is split after the last parenthesis, because the
    # program's name is in parentheses and may contain spaces.
    fields = {name: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for name, pid in pids.items()}
    return {name: (int(each[11]) + int(each[12])) / os.sysconf("SC_CLK_TCK") for name, each in fields.items()}


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@contextmanager
def lag_of(operator: OperatorProcess) -> Iterator[list[float]]:
    """Request `/healthz` of the operator at most 10 times per second during the block, and yield the list of response
    times in seconds.

    The health server runs in the operator's event loop. A response time is therefore an upper bound of the loop's
    delay.
    """
    taken: list[float] = []
    over = threading.Event()

    def probe() -> None:
        while not over.wait(PROBE_SECONDS):
            began = time.monotonic()
            operator.answers("/healthz")
            taken.append(time.monotonic() - began)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        over.set()
        thread.join()


def reconciles(operator: OperatorProcess) -> float:
    """Return how many reconciles the operator has made since its start."""
    return operator.metric("finetune_reconciles_total")


def writes(operator: OperatorProcess) -> float:
    """Return how often the operator has written the status of a job since its start."""
    return operator.metric("finetune_status_writes_total")


def all_reconciled(operator: OperatorProcess, jobs: int) -> bool:
    """Return whether the operator has made at least ``jobs`` reconciles and has no key left in its queue."""
    return reconciles(operator) >= jobs and operator.metric("finetune_queue_depth") == 0


def restart(world: World, jobs: int) -> tuple[float, float, float]:
    """Restart the operator. Return the seconds until it is ready, the seconds until it has reconciled every job, and
    how often it has written the status of a job since the restart."""
    world.operator.stop()
    began = time.monotonic()
    world.operator.start()
    world.operator.wait_ready(120)
    ready = time.monotonic() - began
    world.wait("a look at every job", lambda: all_reconciled(world.operator, jobs), PATIENCE_SECONDS, SCRAPE_SECONDS)
    return ready, time.monotonic() - began, writes(world.operator)


def run() -> None:
    """Run all measurements of this module and print both tables."""
    console = Console(width=120)
    manifests = [one_pod("done", name=f"job-{number}") for number in range(JOBS_NEW)]
    bare_writes = floor.measure(one_pod("done", name=floor.SAMPLE), manifests, UNTHROTTLED)
    console.print(f"a bare client's writes for {JOBS_NEW} jobs: {bare_writes:.1f} s")
    with (
        tempfile.TemporaryDirectory() as folder,
        running_world(
            Path(folder), direct=True, flags=UNTHROTTLED, settings={"resync_seconds": str(RESYNC_SECONDS)}
        ) as world,
    ):
        beneath, go_memory = measure_children(world)
        console.print(f"training-operator alone: {beneath.span(beneath.ended):.0f} s")
        world.operator.start()
        world.operator.wait_ready(120)
        rows: list[tuple[str, str, str]] = []
        namespace = world.namespace()
        path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
        children = Fleet()
        world.loop.spawn(follow(world.admin, CHILDREN, namespace, children, child_is_over))
        status_writes = writes(world.operator)
        reconciled = reconciles(world.operator)
        with lag_of(world.operator) as lag:
            above = run_fleet(world, JOBS, path, namespace, manifests, settled)
        reconciled = reconciles(world.operator) - reconciled
        our_memory = world.operator.memory()
        status_writes = writes(world.operator) - status_writes
        print_side_by_side(console, beneath, above, go_memory, our_memory["VmHWM"])

        both = max(above.span(above.first_status), max(children.first_event.values()) - min(above.created.values()))
        rows.append((f"R3 {JOBS_NEW} new jobs: all have a child and a status after", f"{both:.1f} s", "30 s"))
        rows.append(
            ("R3 the same writes by a bare client, ratio", f"{bare_writes:.1f} s, {both / bare_writes:.2f}", "")
        )
        rows.append(("R3 looks a job", f"{reconciled / JOBS_NEW:.1f}", ""))
        rows.append(("R3 status writes a job", f"{status_writes / JOBS_NEW:.1f}", ""))
        rows.append(("R3 RSS, highest", f"{our_memory['VmHWM'] / 1e6:.0f} MB", "150 MB"))
        rows.append(("R3 loop lag p99", f"{percentile(sorted(lag), 0.99) * 1000:.0f} ms", ""))
        ready, all_seen, written = restart(world, JOBS_NEW)
        rows.append((f"R2 restart with {JOBS_NEW} settled jobs: ready after", f"{ready:.1f} s", "15 s"))
        rows.append(("R2 all looked at after", f"{all_seen:.1f} s", ""))
        rows.append(("R2 status writes", f"{written:.0f}", "0"))

        idle = [one_pod("run", name=f"idle-{n}", runPolicy={"suspend": True}) for n in range(JOBS_IDLE - JOBS_NEW)]
        world.loop.run(create_all(world.admin, path, idle, Fleet()), PATIENCE_SECONDS)

        def all_have_a_status() -> bool:
            return sum(is_observed(found) for found in world.jobs(namespace)) == JOBS_IDLE

        world.wait("all statuses", all_have_a_status, PATIENCE_SECONDS, 2)
        ready, all_seen, written = restart(world, JOBS_IDLE)
        rows.append((f"R4 restart with {JOBS_IDLE} idle jobs: ready after", f"{ready:.1f} s", ""))
        rows.append(("R4 all looked at (a whole resync) after", f"{all_seen:.1f} s", "30 s"))
        rows.append(("R4 status writes", f"{written:.0f}", "0"))
        before = reconciles(world.operator)
        with lag_of(world.operator) as lag:
            world.wait(
                "the next resync",
                # The resync leaves out the ended jobs, because their last reconcile left nothing to do, and they have
                # not changed since then.
                lambda: reconciles(world.operator) >= before + JOBS_IDLE - JOBS_NEW,
                PATIENCE_SECONDS,
                SCRAPE_SECONDS,
            )
        rows.append(("R4 loop lag in a resync p99", f"{percentile(sorted(lag), 0.99) * 1000:.0f} ms", "100 ms"))
        rows.append(("R4 RSS", f"{world.operator.memory()['VmRSS'] / 1e6:.0f} MB", "250 MB"))
        print_gates(console, rows)


def print_side_by_side(console: Console, beneath: Fleet, above: Fleet, go_memory: int, our_memory: int) -> None:
    """Print a table that compares PyTorchJobs under the training-operator alone (``beneath``) with FineTuneJobs under
    both operators (``above``)."""
    table = Table(title=f"{JOBS_NEW} jobs of one pod, load average {os.getloadavg()[0]:.1f}")
    for column in ("", "PyTorchJob", "FineTuneJob", "ratio"):
        table.add_column(column, justify="right")

    def row(name: str, go: float, ours: float, unit: str) -> None:
        table.add_row(name, f"{go:.2f} {unit}", f"{ours:.2f} {unit}", f"{ours / go:.2f}")

    row("all ended after", beneath.span(beneath.ended), above.span(above.ended), "s")
    row("jobs per second", JOBS_NEW / beneath.span(beneath.ended), JOBS_NEW / above.span(above.ended), "")
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        go, ours = (percentile(fleet.seconds(fleet.first_status), share) for fleet in (beneath, above))
        row(f"created to first status, {name}", go, ours, "s")
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        go, ours = (percentile(fleet.seconds(fleet.ended), share) for fleet in (beneath, above))
        row(f"created to ended, {name}", go, ours, "s")
    row("memory of the operator", go_memory / 1e6, our_memory / 1e6, "MB")
    go, ours = (fleet.processor[name] for fleet, name in ((beneath, TRAINING_OPERATOR), (above, "operator")))
    row("processor time of the operator, a job", go / JOBS_NEW * 1000, ours / JOBS_NEW * 1000, "ms")
    for name in (API_SERVER, TRAINING_OPERATOR):
        go, ours = (fleet.processor[name] for fleet in (beneath, above))
        row(f"processor time of the {name}, a job", go / JOBS_NEW * 1000, ours / JOBS_NEW * 1000, "ms")
    console.print(table)


def print_gates(console: Console, rows: Sequence[tuple[str, str, str]]) -> None:
    """Print ``rows`` as a table. Each row has the name of a figure, the measured figure, and its limit, which is empty
    if the figure has no limit."""
    table = Table(title=f"gates, load average {os.getloadavg()[0]:.1f}")
    for column in ("gate", "figure", "bar on 2 idle cores"):
        table.add_column(column, justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    run()
