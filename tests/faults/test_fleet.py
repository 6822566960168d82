"""R1 and R15 of docs/performance.md: 50 kills at random times with 300 jobs; upgrade and rollback with running jobs."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from finetune_operator.objects.labels import ATTEMPT, JOB_NAME
from tests.faults.operators import OperatorProcess
from tests.faults.world import World, job, settled
from tests.operator.builders import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

CONVERGED_SECONDS = 30
PREVIOUS = "2433999"
"""Commit of the first version that ran jobs. That version had no leader election and an older form of the status."""


@pytest.mark.long
def test_random_kills_double_and_lose_no_job(world: World) -> None:
    choose = random.Random(5)
    namespace = world.namespace()
    lives = [("done",), ("exit-75", "done"), ("drained", "done"), ("exit-64",)]
    jobs = [job(*lives[number % 4], name=f"job-{number}") for number in range(300)]
    world.create(namespace, *jobs)
    kills = 0
    next_kill = last_kill = time.monotonic()

    def all_killed() -> bool:
        nonlocal kills, next_kill, last_kill
        world.keep_operator_alive()
        if time.monotonic() > next_kill:
            world.operator.stop()
            kills, last_kill = kills + 1, time.monotonic()
            next_kill = last_kill + choose.uniform(0.5, 4)
        return kills == 50

    began = time.monotonic()
    world.wait("50 kills", all_killed, 600, interval=0.1)
    over = ended_attempts(world, namespace)
    world.keep_operator_alive()
    world.wait(
        "the ended attempts to be recorded", lambda: over <= recorded_attempts(world, namespace), 3 * CONVERGED_SECONDS
    )
    print(f"{len(over)} ended attempts are recorded {time.monotonic() - last_kill:.1f} s after the last kill")
    world.wait("300 jobs to end", lambda: all(settled(found) for found in world.jobs(namespace)), 1200)
    ended = time.monotonic()
    print(f"300 jobs ended {ended - began:.1f} s after the first of 50 kills, {ended - last_kill:.1f} s after the last")
    found = world.jobs(namespace)
    started = sum(each["status"]["attempts"]["started"] for each in found)
    ever = Counter(attempt for where, attempt in world.created.values() if where == namespace)
    assert sum(ever.values()) == started, "no child was doubled, none is missing"
    assert len(world.children(namespace)) == 300
    verdicts = Counter(each["status"]["attempts"]["recent"][-1]["verdict"] for each in found)
    assert verdicts == {"Succeeded": 225, "Permanent": 75}


def ended_attempts(world: World, namespace: str) -> set[tuple[str, int]]:
    """Return a pair (job name, attempt number) for each attempt whose PyTorchJob has ended."""
    return {
        (child["metadata"]["labels"][JOB_NAME], int(child["metadata"]["labels"][ATTEMPT]))
        for child in world.children(namespace)
        if any(
            each["type"] in ("Succeeded", "Failed") and each["status"] == "True"
            for each in child.get("status", {}).get("conditions") or []
        )
    }


def recorded_attempts(world: World, namespace: str) -> set[tuple[str, int]]:
    """Return a pair (job name, attempt number) for each attempt whose end is recorded in the job's status."""
    return {
        (found["metadata"]["name"], attempt["number"])
        for found in world.jobs(namespace)
        for attempt in found.get("status", {}).get("attempts", {}).get("recent", [])
    }


def previous_release(folder: Path) -> Path | None:
    """Unpack the packages of commit PREVIOUS into ``folder``; return None where the git history lacks the commit."""
    archive = subprocess.run(
        ["git", "archive", PREVIOUS, "core", "operator"], cwd=REPOSITORY, capture_output=True, check=False
    )
    if archive.returncode != 0:
        return None
    subprocess.run(["tar", "--extract", f"--directory={folder}"], input=archive.stdout, check=True)
    return folder


@pytest.mark.long
def test_upgrade_and_rollback_restart_no_child(world: World, tmp_path: Path) -> None:
    source = previous_release(tmp_path)
    if source is None:
        # The old version comes from the git history, which a shallow clone or a source archive does not have.
        pytest.skip(f"the history does not reach back to {PREVIOUS}")
    namespace = world.namespace()
    world.operator.stop()
    server = f"https://127.0.0.1:{world.proxy.port}"
    previous = OperatorProcess(world.cluster, tmp_path, server=server, source=source, ports=(18444, 18081))
    try:
        previous.start()
        previous.wait_ready()
        world.create(namespace, *(job("run", name=f"job-{number}") for number in range(5)))
        world.wait("both pods of each", lambda: _running(world, namespace) == 5, 90)
        before = _objects(world, namespace)
        for turn in range(2):
            previous.stop()
            world.operator.start()
            world.operator.wait_ready()
            _wait_for_reconciles(world, namespace, "the new version")
            assert _objects(world, namespace) == before, f"upgrade {turn}"
            world.operator.stop()
            previous.start()
            previous.wait_ready()
            _wait_for_reconciles(world, namespace, "the previous version")
            assert _objects(world, namespace) == before, f"rollback {turn}"
    finally:
        previous.close()


def _running(world: World, namespace: str) -> int:
    attempts = [found.get("status", {}).get("attempts", {}) for found in world.jobs(namespace)]
    return sum(len(each.get("current", {}).get("pods", [])) == 2 for each in attempts)


def _objects(world: World, namespace: str) -> tuple[list[str], list[str], list[int]]:
    """Return the uids of all PyTorchJobs, the uids of all pods, and each job's number of started attempts."""
    return (
        sorted(child["metadata"]["uid"] for child in world.children(namespace)),
        sorted(pod["metadata"]["uid"] for pod in world.pods(namespace)),
        [found["status"]["attempts"]["started"] for found in world.jobs(namespace)],
    )


def _wait_for_reconciles(world: World, namespace: str, who: str) -> None:
    began = time.monotonic()
    paths = [f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs/job-{number}" for number in range(5)]

    def reconciled() -> bool:
        seen = Counter(record.request.path for record in world.proxy.records if record.at > began)
        return all(seen[path] >= 2 for path in paths)

    world.wait(f"two reconciles of each job by {who}", reconciled, 90)
