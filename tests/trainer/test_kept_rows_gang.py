"""Pods keep the tokenised rows on the volume of `storage.cache`, and all ranks of a pod train on the same files. A
SIGTERM while rows are tokenised ends the pod and all of its processes."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import Outcome
from finetune_trainer.data.prepared.example_cache import FOLDER
from finetune_trainer.data.prepared.prepared_rows import process_count
from finetune_trainer.pod import cgroup
from tests.trainer import tiny
from tests.trainer.conftest import StartPods
from tests.trainer.gangs import losses_of
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.pods import run_config

HAD = ", which storage.cache had already"


def config_of(store: ObjectStore, name: str) -> dict[str, Any]:
    return run_config(
        store,
        name,
        world__nodes=1,
        world__processesPerNode=2,
        optimization__maxSteps=2,
        storage__checkpointEverySteps=2,
    )


def test_the_pod_of_another_job_trains_on_the_rows_that_the_first_one_has_tokenised(
    store: ObjectStore, pods: StartPods, tmp_path: Path
) -> None:
    cache = tmp_path / "volume"
    cache.mkdir()
    outputs, names = [], ("kept-first", "kept-second")
    for name in names:
        attempt = pods(config_of(store, name), arguments=("--model-cache", str(cache)), forked=True)
        assert attempt.wait() == [0], attempt.output
        outputs.append(attempt.output)
    assert [output.count(HAD) for output in outputs] == [0, 2]
    assert all(f"20 rows of s3://{BUCKET}/data/train.jsonl, 20 examples" in output for output in outputs)
    assert losses_of(store, names[0]) == losses_of(store, names[1])
    assert len(list((cache / FOLDER).iterdir())) == 2


def descendants(process: int) -> set[int]:
    """Return the ids of the processes below ``process``, by whichever thread they were started."""
    found: set[int] = set()
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found |= {child, *descendants(child)}
    return found


def test_a_sigterm_while_rows_are_tokenised_leaves_no_process(
    store: ObjectStore, pods: StartPods, tmp_path: Path
) -> None:
    if not process_count(cgroup.available_cpus(limit=cgroup.cpu_limit(), request=None, cores=cgroup.usable_cores())):
        pytest.skip("with one CPU the first process tokenises all rows itself")
    (tmp_path / "rows").mkdir()
    tiny.write_jsonl(tmp_path / "rows" / "many.jsonl", tiny.rows(20, seed=1) * 50_000)
    store.upload("many-rows", tmp_path / "rows")
    config = config_of(store, "told-while-tokenising")
    config["dataset"]["train"] = {"s3": {"uri": f"s3://{BUCKET}/many-rows/many.jsonl"}}
    attempt = pods(config, forked=True)
    (pod,) = attempt.pods

    def tokenising() -> bool:
        """Return whether a worker, which is a child of the launcher, has a child."""
        return any(descendants(worker) for worker in pod.workers())

    attempt.wait_for(tokenising, "the processes that tokenise")
    processes = descendants(pod.process.pid)
    pod.process.send_signal(signal.SIGTERM)
    assert attempt.wait() == [143], attempt.output
    assert pod.result.outcome is Outcome.STOPPED
    assert "rows of s3://" not in attempt.output, "the preparation was not over"
    assert "Traceback" not in attempt.output
    assert not [process for process in processes if is_alive(process)]


def is_alive(process: int) -> bool:
    """Return whether a process exists and has not ended (man 5 proc)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
