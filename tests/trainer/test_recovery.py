"""After a crash, a SIGTERM or damage in the bucket, the next attempt continues the training.

The final model equals that of an undisturbed job.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import Outcome
from finetune_core.layout import checkpoint_folder, parse_uri
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.lineage import RunRecord, claim_run_number
from finetune_trainer.storage.root import RunRoot
from tests.trainer import tiny
from tests.trainer.conftest import StartPods
from tests.trainer.gangs import losses_of, step_rows, train_all
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.pods import run_config

STEPS = 40
LONG = {"optimization__maxSteps": STEPS, "storage__checkpointEverySteps": 5}
METHODS = {
    "full": {**LONG, "method": "Full", "optimization__precision": "bf16"},
    "lora": {**LONG, "lora__dropout": "0.1", "evaluation__everySteps": 10, "evaluation__artifactFrom": "Best"},
}


def root_of(store: ObjectStore, name: str) -> RunRoot:
    return RunRoot(
        Store(store.endpoint, "us-east-1", store.credentials, budget_seconds=5),
        parse_uri(f"s3://{BUCKET}/runs/default/{name}/uid-1"),
    )


def committed_steps(store: ObjectStore, name: str) -> list[int]:
    keys = store.keys(f"runs/default/{name}/uid-1/checkpoints/")
    return sorted(int(key.split("/")[-2].split("-")[1]) for key in keys if key.endswith("/COMMIT"))


def artifact_files(store: ObjectStore, name: str) -> dict[str, bytes]:
    base = f"runs/default/{name}/uid-1"
    folder = json.loads(store.read(f"{base}/ARTIFACT"))["folder"]
    return {
        key.rpartition("/")[2]: store.read(key)
        for key in store.keys(f"{base}/{folder}/")
        if key.endswith((".safetensors", "config.json"))
    }


@pytest.fixture(scope="module")
def undisturbed(
    store: ObjectStore, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[float], dict[str, bytes]]]:
    """The losses and artifact files of an undisturbed job for each method, with which the tests compare."""
    folder = tmp_path_factory.mktemp("undisturbed")
    inputs = Inputs(
        model=tiny_model,
        train=tiny.write_jsonl(folder / "train.jsonl", tiny.rows(20, seed=1)),
        validation=tiny.write_jsonl(folder / "validation.jsonl", tiny.rows(7, seed=2)),
    )
    names = {method: f"undisturbed-{method}" for method in METHODS}
    configs = [run_config(store, names[method], **changes) for method, changes in METHODS.items()]
    train_all(configs, inputs, folder, credentials=store.credentials)
    return {method: (losses_of(store, name), artifact_files(store, name)) for method, name in names.items()}


def test_a_killed_worker_ends_both_pods_and_the_next_attempt_comes_to_the_same_model(
    store: ObjectStore, pods: StartPods, undisturbed: dict[str, tuple[list[float], dict[str, bytes]]]
) -> None:
    config = run_config(store, "killed", **METHODS["full"])
    first = pods(config, forked=True)
    first.wait_for(lambda: bool(committed_steps(store, "killed")), "the first checkpoint")
    os.kill(first.pods[1].workers()[0], signal.SIGKILL)
    killed_at = time.monotonic()
    assert first.wait() == [75, 1]
    assert time.monotonic() - killed_at < 40
    assert first.pods[1].result.outcome is Outcome.CRASHED
    assert first.pods[1].result.message == "rank 1 was ended by signal 9 and left no reason; its log has the details"
    assert "another rank" in first.pods[0].result.message
    newest = committed_steps(store, "killed")[-1]
    assert newest < STEPS

    second = pods(config, attempt=2, forked=True)
    assert second.wait() == [0, 0], second.output
    assert f"resumed from step {newest} of run 1" in second.output
    losses, files = undisturbed["full"]
    rows = step_rows(store, "killed")
    assert [row.loss for row in rows if row.step > newest][-1] == losses[-1]
    assert {row.step: row.loss for row in rows} == dict(enumerate(losses, start=1))
    assert artifact_files(store, "killed") == files

    started = time.monotonic()
    third = pods(config, attempt=3, forked=True)
    assert third.wait() == [0, 0]
    assert time.monotonic() - started < 10
    assert third.pods[1].result.artifact == second.pods[0].result.artifact
    assert "step 1/" not in third.output


def test_sigterm_to_one_pod_commits_and_damage_to_that_checkpoint_falls_back_to_the_one_before(
    store: ObjectStore, pods: StartPods, undisturbed: dict[str, tuple[list[float], dict[str, bytes]]]
) -> None:
    config = run_config(store, "stopped", **METHODS["lora"])
    first = pods(config, forked=True)
    first.wait_for(lambda: "step 12/" in first.output, "step 12")
    before = committed_steps(store, "stopped")
    told_at = time.monotonic()
    first.pods[1].process.send_signal(signal.SIGTERM)
    assert first.wait() == [143, 143]
    assert time.monotonic() - told_at < 25
    after = committed_steps(store, "stopped")
    newest, previous = after[-1], after[-2]
    assert newest > max(before)
    for pod in first.pods:
        assert pod.result.outcome is Outcome.STOPPED
        assert pod.result.message == f"told to stop: the checkpoint of step {newest} is committed"
        assert pod.result.step == newest
        assert pod.result.checkpoint is not None
        assert pod.result.checkpoint.endswith(checkpoint_folder(1, newest))

    key = f"runs/default/stopped/uid-1/{checkpoint_folder(1, newest)}/state-00001-of-00002.safetensors"
    flip_a_byte(store, key)
    second = pods(config, attempt=2, forked=True)
    assert second.wait() == [0, 0], second.output
    assert f"resumed from step {previous} of run 1" in second.output
    assert f"notice: checkpoint of step {newest} (run 1) was passed over" in second.output
    assert "state-00001-of-00002.safetensors is not what was committed" in second.output
    losses, files = undisturbed["lora"]
    assert {row.step: row.loss for row in step_rows(store, "stopped")} == dict(enumerate(losses, start=1))
    assert artifact_files(store, "stopped") == files


def flip_a_byte(store: ObjectStore, key: str) -> None:
    from io import BytesIO

    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.client.put_object(BUCKET, key, BytesIO(bytes(data)), len(data))


def test_a_newer_run_fences_an_older_one_that_is_still_alive(store: ObjectStore, pods: StartPods) -> None:
    changes: dict[str, Any] = {**LONG, "optimization__maxSteps": 5000}
    first = pods(run_config(store, "fenced", **changes), forked=True)
    first.wait_for(lambda: bool(committed_steps(store, "fenced")), "the first checkpoint")
    assert claim_run_number(root_of(store, "fenced"), 2, RunRecord(attempt=2, pod_uid="other"))
    assert first.wait() == [75, 75]
    at_the_end = committed_steps(store, "fenced")
    for pod in first.pods:
        assert pod.result.message == "run 2 of this job has started, so run 1 stopped writing to the bucket"
    assert committed_steps(store, "fenced") == at_the_end
    assert "runs/default/fenced/uid-1/ARTIFACT" not in store.keys("runs/default/fenced/")
