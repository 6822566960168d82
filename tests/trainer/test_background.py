"""Checkpoints are committed in the background. No training step waits for the object store, and while the store fails,
training continues until the time budget of the uploads is spent.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_core.contract import Outcome
from finetune_trainer.pod.plan import Inputs
from tests.trainer import tiny
from tests.trainer.conftest import StartPods
from tests.trainer.gangs import train_all
from tests.trainer.objectstore import ACCESS_KEY, SECRET_KEY, ObjectStore, write_credentials
from tests.trainer.pods import Attempt, fill_bucket, run_config
from tests.trainer.smallstore import FULL, fill, make_room, small_store
from tests.trainer.storeproxy import Fault, Request, StoreProxy, pass_all, proxy_before
from tests.trainer.test_recovery import committed_steps
from tests.trainer.test_store_faults import assert_every_commit_verifies

ENDLESS = {
    "world__nodes": 1,
    "method": "Full",
    "optimization__maxSteps": 1_000_000,
    "storage__checkpointEverySteps": 10,
    "dataset__validation": None,
}


@pytest.fixture
def proxy(store: ObjectStore) -> Iterator[StoreProxy]:
    with proxy_before(store.endpoint) as running:
        yield running


def newest_step(attempt: Attempt) -> int:
    """Return the last step that the pods' logs name, or 0 if they name none."""
    found = re.findall(r"^step (\d+)/", attempt.output, re.MULTILINE)
    return int(found[-1]) if found else 0


def newest_commit(store: ObjectStore, name: str) -> int:
    return max(committed_steps(store, name), default=0)


def test_trap_20_no_step_waits_for_the_store_and_what_fails_for_a_while_is_made_up_for(
    store: ObjectStore, proxy: StoreProxy, pods: StartPods, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    write_credentials(keys, ACCESS_KEY, SECRET_KEY)
    attempt = pods(run_config(store, "background", storage__endpoint=proxy.endpoint, **ENDLESS), credentials=keys)
    attempt.wait_for(lambda: newest_step(attempt) >= 1, "the first step")

    # At 20 kB/s, uploading 0.9 MB of state takes most of a minute. In this time the run trains far more than 60 steps,
    # and takes several snapshots.
    proxy.bytes_per_second = 20_000
    seen = len(proxy.requests)
    start = newest_step(attempt)
    attempt.wait_for(lambda: newest_step(attempt) >= start + 60, "60 steps while an upload is under way")
    commits = [request for request in proxy.requests[seen:] if request.path.endswith("/COMMIT")]
    assert len(commits) <= 2, "the store was not slow enough to show anything"
    proxy.bytes_per_second = None
    attempt.wait_for(lambda: newest_commit(store, "background") >= start + 50, "what waited is committed")

    proxy.down = True
    attempt.wait_for(lambda: "training goes on: storage.endpoint: http" in attempt.output, "the trainer says it")
    start, committed = newest_step(attempt), newest_commit(store, "background")
    attempt.wait_for(lambda: newest_step(attempt) >= start + 40, "40 steps without a store")
    assert newest_commit(store, "background") == committed
    proxy.down = False
    attempt.wait_for(lambda: newest_commit(store, "background") > start, "checkpoints after the store is back")
    attempt.wait_for(lambda: "checkpoints are committed again" in attempt.output, "the trainer says that too")

    write_credentials(keys, ACCESS_KEY, "rotated-away")
    said = attempt.output.count("training goes on")
    attempt.wait_for(lambda: attempt.output.count("training goes on") > said, "the trainer says it again")
    start = newest_step(attempt)
    attempt.wait_for(lambda: newest_step(attempt) >= start + 20, "20 steps with refused credentials")
    assert "storage.credentialsSecretRef" in attempt.output
    write_credentials(keys, ACCESS_KEY, SECRET_KEY)
    attempt.wait_for(lambda: newest_commit(store, "background") > start, "checkpoints with the new credentials")

    assert_no_key_is_told(attempt)
    attempt.pods[0].process.send_signal(signal.SIGTERM)
    assert attempt.wait() == [143]
    result = attempt.pods[0].result
    assert result.message == f"told to stop: the checkpoint of step {result.step} is committed"
    assert newest_commit(store, "background") == result.step


def test_a_store_that_deletes_nothing_for_a_while_is_told_too(
    store: ObjectStore, proxy: StoreProxy, pods: StartPods
) -> None:
    """The next checkpoint waits while old ones are deleted, so an outage in this moment must not stay untold."""

    def fault(request: Request) -> Fault | None:
        deletes = request.method == "DELETE" or (request.method == "POST" and request.path.endswith("?delete="))
        return Fault.RESET_BEFORE if deletes else None

    attempt = pods(run_config(store, "undeleting", storage__endpoint=proxy.endpoint, **ENDLESS))
    attempt.wait_for(lambda: newest_step(attempt) >= 1, "the first step")
    proxy.plan = fault
    said = (
        "checkpoints: old checkpoints can't be deleted, so the next one waits, training goes on: storage.endpoint: http"
    )
    attempt.wait_for(lambda: said in attempt.output, "the trainer says it")
    start = newest_step(attempt)
    attempt.wait_for(lambda: newest_step(attempt) >= start + 20, "20 steps meanwhile")
    proxy.plan = pass_all
    attempt.wait_for(lambda: "checkpoints are committed again" in attempt.output, "the trainer says that too")
    attempt.pods[0].process.send_signal(signal.SIGTERM)
    assert attempt.wait() == [143]


def assert_no_key_is_told(attempt: Attempt) -> None:
    """Assert that the secret access keys are not in the logs and files of the attempt, and not in the arguments or the
    environment of its processes."""
    secrets = (SECRET_KEY.encode(), b"rotated-away")
    folder = attempt.pods[0].log.parent
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(secret in data for secret in secrets), path
    for pid in [attempt.pods[0].process.pid, *attempt.pods[0].workers()]:
        for name in ("cmdline", "environ"):
            data = (Path("/proc") / str(pid) / name).read_bytes()
            assert not any(secret in data for secret in secrets), name


@pytest.mark.gang
def test_a_store_that_stays_away_from_one_rank_ends_all_with_its_sentence_after_the_budget(
    store: ObjectStore, proxy: StoreProxy, tiny_model: Path, tmp_path: Path
) -> None:
    proxy.plan = lambda request: (
        Fault.ERROR if request.method == "PUT" and "state-00001-of-00002" in request.path else None
    )
    config = run_config(store, "budget", storage__endpoint=proxy.endpoint, **{**ENDLESS, "world__nodes": 2})
    rows = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.rows(20, seed=1))
    inputs = Inputs(model=tiny_model, train=rows, validation=None)
    fault = {"kind": "budget", "seconds": 3}
    (result,) = train_all([config], inputs, tmp_path / "gang", credentials=store.credentials, faults=[fault])
    assert result.outcome is Outcome.OUTSIDE_FAILURE
    assert result.message.startswith(f"storage.endpoint: {proxy.endpoint}")
    assert committed_steps(store, "budget") == []
    log = (tmp_path / "gang" / "rank-0.log").read_text()
    steps = [int(step) for step in re.findall(r"^step (\d+)/", log, re.MULTILINE)]
    assert max(steps) > 20, "training went on until the budget was spent"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_server_that_is_down_for_three_minutes_costs_nothing(
    store: ObjectStore, proxy: StoreProxy, pods: StartPods
) -> None:
    import time

    attempt = pods(run_config(store, "away", storage__endpoint=proxy.endpoint, **ENDLESS))
    attempt.wait_for(lambda: newest_commit(store, "away") > 0, "the first checkpoint")
    proxy.down = True
    until = time.monotonic() + 180
    start = newest_step(attempt)
    attempt.wait_for(lambda: time.monotonic() > until, "three minutes", seconds=300)
    assert newest_step(attempt) > start + 100
    proxy.down = False
    reached = newest_step(attempt)
    attempt.wait_for(lambda: newest_commit(store, "away") > reached, "checkpoints after the store is back")
    attempt.pods[0].process.send_signal(signal.SIGTERM)
    assert attempt.wait() == [143]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_training_goes_on_beside_a_full_disk_and_commits_once_there_is_room(
    minio: Path, tiny_model: Path, pods: StartPods, tmp_path: Path
) -> None:
    with small_store(minio, tmp_path / "small") as small:
        fill_bucket(small, tiny_model, tmp_path / "bucket")
        # The job saves only every 100 steps. Ten steps take a quarter of a second, and MinIO keeps deleted checkpoints
        # in its trash for seconds, so more frequent checkpoints would fill the disk by themselves.
        config = run_config(small, "full", **{**ENDLESS, "storage__checkpointEverySteps": 100})
        attempt = pods(config, credentials=small.credentials)
        attempt.wait_for(lambda: newest_commit(small, "full") > 0, "the first checkpoint")
        assert fill(small, tmp_path) > 1
        attempt.wait_for(lambda: FULL.search(attempt.output) is not None, "the trainer says that the disk is full")
        start = newest_step(attempt)
        attempt.wait_for(lambda: newest_step(attempt) >= start + 300, "300 steps beside a full disk")
        assert attempt.output.count("training goes on") > attempt.output.count("checkpoints are committed again")
        assert_every_commit_verifies(small, "runs/default/full/")

        assert make_room(small, tmp_path / "small") > 1
        reached = newest_step(attempt)
        attempt.wait_for(lambda: newest_commit(small, "full") > reached, "checkpoints after there is room again")
        attempt.wait_for(lambda: "checkpoints are committed again" in attempt.output, "the trainer says that too")
        attempt.pods[0].process.send_signal(signal.SIGTERM)
        assert attempt.wait() == [143]
        assert newest_commit(small, "full") == attempt.pods[0].result.step
        assert assert_every_commit_verifies(small, "runs/default/full/") > 0


@pytest.mark.gang
def test_checkpoints_that_can_not_be_deleted_are_named_once_and_are_not_overdue(
    store: ObjectStore, proxy: StoreProxy, tiny_model: Path, tmp_path: Path
) -> None:
    """Many credentials permit writing but not deleting."""
    proxy.plan = lambda request: (
        Fault.DENIED if request.method == "DELETE" or (request.method == "POST" and "delete" in request.path) else None
    )
    kept = {"storage__keepLast": 1, "storage__checkpointEverySteps": 1, "optimization__maxSteps": 5}
    config = run_config(store, "undeleted", storage__endpoint=proxy.endpoint, **{**ENDLESS, **kept})
    rows = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.rows(20, seed=1))
    inputs = Inputs(model=tiny_model, train=rows, validation=None)
    (result,) = train_all([config], inputs, tmp_path / "gang", credentials=store.credentials)
    assert result.outcome is Outcome.COMPLETED
    assert committed_steps(store, "undeleted") == [1, 2, 3, 4, 5]
    log = (tmp_path / "gang" / "rank-0.log").read_text()
    (said,) = re.findall(r"^.*old checkpoints can't be deleted.*$", log, re.MULTILINE)
    assert said.startswith("notice: ")
    assert "AccessDenied" in said
    assert "checkpoints: " not in log
