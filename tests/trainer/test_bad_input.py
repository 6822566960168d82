"""A mistake of the user is reported early, in one sentence, with the right exit code and without a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import StartPods
from tests.trainer.objectstore import BUCKET, ObjectStore, free_port, write_credentials
from tests.trainer.pods import Attempt, run_config, start_pods

FIELD = "dataset__format__promptCompletion"


@dataclass
class Unreachable:
    """An attempt whose store does not answer."""

    attempt: Attempt
    endpoint: str


@pytest.fixture(scope="module", autouse=True)
def unreachable(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unreachable]:
    """An attempt whose store does not answer. The pod repeats its first request for up to 20 s, so it starts before the
    first test of this file and waits beside the other tests."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    config = run_config(store, "unreachable", world__nodes=1, storage__endpoint=endpoint)
    attempt = start_pods(config, tmp_path_factory.mktemp("unreachable"), credentials=store.credentials)
    yield Unreachable(attempt, endpoint)
    attempt.end()


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        (
            {f"{FIELD}__completionField": "answer"},
            64,
            "dataset.format.promptCompletion.completionField: no column 'answer' in train.jsonl;"
            " it has 'question', 'reply'",
        ),
        (
            {"dataset__train": {"s3": {"uri": f"s3://{BUCKET}/data/absent.jsonl"}}},
            64,
            f"dataset.train.s3.uri: there is no object s3://{BUCKET}/data/absent.jsonl",
        ),
        (
            {"dataset__validation": {"volume": {"claimName": "data", "path": "../../etc/passwd"}}},
            64,
            "dataset.validation.volume.path: must not lead out of the volume",
        ),
        (
            {"model": {"s3": {"uri": f"s3://{BUCKET}/data"}}},
            64,
            "model.s3.uri: there is no config.json: it must be a folder with a model in transformers' layout",
        ),
        (
            {"storage__uri": "s3://no-such-bucket/runs"},
            75,
            "storage.uri: bucket 'no-such-bucket' does not exist at {endpoint}",
        ),
        ({"dataset__maxLength": 12}, 64, "tokens, more than dataset.maxLength 12 (set dataset.longRows to Skip"),
        (
            {"dataset__task": {"name": "GSM8K"}, "evaluation__bestBy": "TaskScore"},
            64,
            "dataset.validation: none of 7 rows can be graded (7 because the gold row has no number after ####), and"
            " evaluation.bestBy needs a score of dataset.task",
        ),
        ({"lora__targetModules": ["q_prj"]}, 64, "lora.targetModules: must name modules of the model"),
    ],
    ids=[
        "wrong column",
        "no data",
        "outside volume",
        "no model",
        "no bucket",
        "long row",
        "nothing to grade",
        "no such module",
    ],
)
def test_the_cause_is_named(
    changes: dict[str, Any], code: int, sentence: str, store: ObjectStore, pods: StartPods
) -> None:
    attempt = pods(run_config(store, "bad-input", world__nodes=1, **changes), forked=True)
    assert attempt.wait() == [code]
    pod = attempt.pods[0]
    assert sentence.format(endpoint=store.endpoint) in pod.result.message
    assert pod.result.exit_code == code
    assert "Traceback" not in pod.output


def test_refused_credentials_are_named_at_once(store: ObjectStore, pods: StartPods, tmp_path: Path) -> None:
    write_credentials(tmp_path / "wrong", "test-access", "another-secret")
    attempt = pods(run_config(store, "refused", world__nodes=1), credentials=tmp_path / "wrong")
    assert attempt.wait(20) == [75]
    message = attempt.pods[0].result.message
    assert message.startswith(f"storage.credentialsSecretRef: {store.endpoint} refused the credentials")
    assert "another-secret" not in attempt.output
    assert "Traceback" not in attempt.output


def test_a_run_file_of_another_version_is_refused(store: ObjectStore, pods: StartPods) -> None:
    config = run_config(store, "version", world__nodes=1) | {"version": 2}
    attempt = pods(config)
    assert attempt.wait(20) == [64]
    assert "version: Input should be 1" in attempt.pods[0].result.message


def test_fewer_gpus_than_asked_for_never_falls_back_to_the_cpu(store: ObjectStore, pods: StartPods) -> None:
    attempt = pods(run_config(store, "gpu", world__nodes=1, world__device="GPU"), forked=True)
    assert attempt.wait() == [75]
    assert attempt.pods[0].result.message.startswith("NVIDIA driver: the pod has none: look at the device plugin")


@pytest.mark.skipif(shutil.which("cc") is None, reason="the library of a driver is compiled")
def test_a_driver_that_is_too_old_ends_the_job_with_both_versions(
    store: ObjectStore, pods: StartPods, tmp_path: Path
) -> None:
    """The pod finds the library of a driver for CUDA 12.8, which can do nothing but say so."""
    (tmp_path / "driver.c").write_text("int cuDriverGetVersion(int *version) { *version = 12080; return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"], check=True)
    config = run_config(store, "driver", world__nodes=1, world__device="GPU")
    attempt = pods(config, variables={"LD_LIBRARY_PATH": str(tmp_path)})
    assert attempt.wait() == [64]
    assert attempt.pods[0].result.message.startswith(
        "NVIDIA driver: must support CUDA 13 (driver R580 or newer), because the trainer image has torch with CUDA"
        " 13.0: the driver of this node supports CUDA 12.8. Update the driver"
    )


def test_rows_are_skipped_where_the_job_says_so(store: ObjectStore, pods: StartPods, tmp_path: Path) -> None:
    rows = [
        {"question": "w1", "reply": "w1"},
        {"question": "w2", "reply": ""},
        {"question": " ".join(["w3"] * 61), "reply": "w3"},
        {"question": "w4", "reply": "w4 w5"},
    ]
    folder = tmp_path / "volumes" / "rows"
    folder.mkdir(parents=True)
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "train.jsonl").write_text(text.replace('{"question": "w2"', '\n{"question": "w2"'))
    changes: dict[str, Any] = {
        "dataset__train": {"volume": {"claimName": "rows", "path": "train.jsonl"}},
        "dataset__badRows": "Skip",
        "dataset__longRows": "Skip",
        "optimization__maxSteps": None,
        "optimization__epochs": 2,
        "optimization__globalBatchSize": 2,
    }
    attempt = pods(
        run_config(store, "skipped", world__nodes=1, **changes),
        arguments=("--volumes", str(tmp_path / "volumes")),
        forked=True,
    )
    assert attempt.wait() == [0]
    assert "2 examples, 2 steps" in attempt.output
    assert "badRows: Skip); the first: rows/train.jsonl line 3 has an empty 'reply'" in attempt.output
    assert "longRows: Skip); the first: rows/train.jsonl line 4 has 65 tokens" in attempt.output


def test_a_store_that_does_not_answer_is_named_within_its_budget(unreachable: Unreachable) -> None:
    assert unreachable.attempt.wait(60) == [75]
    message = unreachable.attempt.pods[0].result.message
    assert message.startswith(f"storage.endpoint: {unreachable.endpoint} can't be reached")
