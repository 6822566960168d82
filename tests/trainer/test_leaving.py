"""After a SIGTERM at any moment, or a stall, all ranks exit together within a bounded time and report the reason."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import ExitCode, Identity, Outcome, Phase, RunConfig
from finetune_trainer.pod import cgroup
from finetune_trainer.pod.outcomes import WorkerExit, WorkerStatus, read_outcome, result_of_pod
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import Paths
from finetune_trainer.ranks.memory import out_of_memory_message
from tests.trainer import tiny
from tests.trainer.conftest import StartPods
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import Attempt, run_config
from tests.trainer.zygote import ends_of, zygote

LEAVE_SECONDS = 25.0
SLACK = 3.0
"""Factor by which a test may exceed its time limit, because the machine may be busy. The tests print the real time."""


def is_past(moment: float) -> bool:
    """Return whether the monotonic clock is past ``moment``."""
    return time.monotonic() > moment


def long_run(store: ObjectStore, name: str, **changes: Any) -> dict[str, Any]:
    """Return the run file of a long job with frequent evaluations, generated answers and checkpoints."""
    config = run_config(
        store,
        name,
        dataset__task={"name": "ExactMatch"},
        optimization__maxSteps=5000,
        storage__checkpointEverySteps=7,
        evaluation__everySteps=5,
        evaluation__bestBy="TaskScore",
        **changes,
    )
    config["evaluation"]["generation"] = {"maxNewTokens": 30, "batchSize": 2}
    # The job has a task only so that it generates answers.
    return config


def committed(store: ObjectStore, name: str) -> list[int]:
    keys = store.keys(f"runs/default/{name}/uid-1/checkpoints/")
    return sorted(int(key.split("/")[-2].split("-")[1]) for key in keys if key.endswith("/COMMIT"))


def assert_left_together(attempt: Attempt, store: ObjectStore, name: str, told_at: float) -> float:
    """Wait for the end of all pods, and return the seconds since the SIGTERM at ``told_at`` (monotonic).

    Assert that all pods were stopped by the SIGTERM, and that the last finished step, if there is one, is committed.
    """
    codes = attempt.wait(SLACK * LEAVE_SECONDS)
    took = time.monotonic() - told_at
    assert codes == [143] * len(codes), attempt.output
    steps = {pod.result.step for pod in attempt.pods}
    done = [int(step) for step in re.findall(r"^step (\d+)/", attempt.output, re.MULTILINE)]
    for pod in attempt.pods:
        assert pod.result.outcome is Outcome.STOPPED
        assert pod.result.message.startswith("told to stop"), pod.result
    if done:
        # No training is lost: the newest checkpoint holds the last finished step.
        assert len(steps) == 1, attempt.output
        assert committed(store, name)[-1] == steps.pop() >= max(done), attempt.output
    assert "Traceback" not in attempt.output
    return took


@pytest.mark.parametrize(
    ("moment", "whom", "pod"),
    [
        ("fetching model and data", "PID 1", 1),
        ("fetching model and data", "worker", 0),
        ("step 6/", "worker", 1),
    ],
)
def test_trap_21_told_at_some_moment_one_process_makes_all_leave(
    moment: str, whom: str, pod: int, store: ObjectStore, pods: StartPods
) -> None:
    name = f"told-{moment.split()[0]}-{whom[0]}{pod}".lower().replace("/", "")
    # A worker that gets SIGTERM before the first step must get it while it imports torch. Forked workers have imported
    # torch already, so only the pods that get SIGTERM later are forked.
    attempt = pods(long_run(store, name), forked=moment.startswith("step"))
    attempt.wait_for(lambda: moment in attempt.pods[0].output, moment)
    if whom == "worker":
        attempt.wait_for(lambda: bool(attempt.pods[pod].workers()), "the worker")
        os.kill(attempt.pods[pod].workers()[0], signal.SIGTERM)
    else:
        attempt.pods[pod].process.send_signal(signal.SIGTERM)
    took = assert_left_together(attempt, store, name, time.monotonic())
    print(f"{moment}, {whom} of pod {pod}: {took:.1f} s")


def test_a_pod_that_waits_for_a_store_leaves_at_once(store: ObjectStore, pods: StartPods) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        attempt = pods(run_config(store, "silent", world__nodes=1, storage__endpoint=endpoint))
        silent.settimeout(60)
        connection, _ = silent.accept()
        attempt.pods[0].process.send_signal(signal.SIGTERM)
        told_at = time.monotonic()
        with connection:
            assert attempt.wait(SLACK * 5) == [143]
    print(f"waiting for the store: {time.monotonic() - told_at:.1f} s")
    assert attempt.pods[0].result.message == "told to stop before training began: there is nothing to save"


@pytest.mark.long
@pytest.mark.timeout(540)
@pytest.mark.parametrize("part", range(10))
def test_trap_21_told_at_random_moments_all_ranks_leave_with_a_checkpoint(
    part: int, store: ObjectStore, pods: StartPods
) -> None:
    """In each of the ten parts of this test, five jobs get a SIGTERM at a random moment in their first 30 s.

    The SIGTERM goes to the launcher or to a worker of a random pod of the job.
    """
    rng = random.Random(part)
    for round_ in range(5):
        name = f"random-{part}-{round_}"
        attempt = pods(long_run(store, name))
        began = time.monotonic()
        wanted = rng.uniform(0.0, 30.0)
        pod, to_worker = rng.randrange(2), rng.random() < 0.5
        attempt.wait_for(partial(is_past, began + wanted), "the random moment")
        workers = attempt.pods[pod].workers() if to_worker else []
        os.kill(workers[0] if workers else attempt.pods[pod].process.pid, signal.SIGTERM)
        took = assert_left_together(attempt, store, name, time.monotonic())
        steps = len(re.findall(r"^step ", attempt.pods[0].output, re.MULTILINE))
        print(f"{name}: told after {wanted:.1f} s and {steps} steps, {'worker' if workers else 'PID 1'}: {took:.1f} s")


@pytest.mark.gang
def test_a_stall_ends_every_rank_with_75_and_stack_traces(tmp_path: Path) -> None:
    ranks = zygote().start_ranks("tests.trainer.stalling", [[str(tmp_path), "1"]] * 3, tmp_path)
    assert ends_of(ranks) == [75, 75, 75]
    outcomes = [read_outcome(tmp_path, rank) for rank in range(3)]
    for rank, outcome in enumerate(outcomes):
        text = (tmp_path / f"rank-{rank}.log").read_text()
        assert f"the stacks of all threads of rank {rank}:" in text
        assert ("a_call_that_hangs" if rank == 1 else "check_stop") in text
        assert outcome is not None
        assert outcome.result.outcome is Outcome.OUTSIDE_FAILURE
        assert "s in phase Training, after step 12 (stability.stallTimeoutSeconds is 2)" in outcome.result.message
    # The rank that noticed the stall first reports the stall as its own cause. The other ranks may have left because of
    # that rank.
    assert not all(outcome.caused_by_peer for outcome in outcomes if outcome)


@pytest.mark.gang
def test_a_stall_ends_the_rank_whose_disk_is_full(tmp_path: Path) -> None:
    """The rank can write neither heartbeats nor its outcome, because each is first written to a file without space."""
    for name in ("heartbeat-0.part", "outcome-0.part"):
        (tmp_path / name).symlink_to("/dev/full")
    ranks = zygote().start_ranks("tests.trainer.stalling", [[str(tmp_path), "0"]], tmp_path)
    assert ends_of(ranks) == [75]
    assert read_outcome(tmp_path, 0) is None
    log = (tmp_path / "rank-0.log").read_text()
    assert "a_call_that_hangs" in log
    assert log.count("the heartbeat of rank 0 can't be written: [Errno 28] No space left on device") == 1
    assert "OSError: [Errno 28] No space left on device" in log


@pytest.mark.gang
def test_a_worker_whose_outcome_can_not_be_written_ends_with_the_exit_code_of_its_outcome(
    store: ObjectStore, tiny_model: Path, tmp_path: Path
) -> None:
    """The SIGTERM of a launcher that is gone comes before the worker has joined, so the worker has nothing to save."""
    folder = tmp_path / "attempt"
    folder.mkdir()
    (folder / "outcome-0.part").symlink_to("/dev/full")
    train = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.rows(4, seed=1))
    plan = WorkerPlan(
        paths=Paths(credentials=store.credentials, scratch=tmp_path),
        identity=Identity(namespace="default", name="full", uid="u", attempt=1, pod_name="p", pod_uid="p", node_rank=0),
        config=RunConfig.model_validate(run_config(store, "full", world__nodes=1)),
        inputs=Inputs(model=tiny_model, train=train),
        folder=folder,
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    gone = "1"
    ranks = zygote().start_ranks("finetune_trainer.worker", [[str(tmp_path / "plan.json"), gone]], tmp_path)
    assert ends_of(ranks) == [ExitCode.STOPPED]
    assert read_outcome(folder, 0) is None
    assert "OSError: [Errno 28] No space left on device" in (tmp_path / "rank-0.log").read_text()


@pytest.mark.long
def test_a_frozen_rank_is_ended_by_its_launcher(store: ObjectStore, pods: StartPods) -> None:
    """A rank that is frozen by SIGSTOP can't exit by itself and blocks all other ranks."""
    attempt = pods(long_run(store, "frozen") | {"stability": {"stallTimeoutSeconds": 6}})
    attempt.wait_for(lambda: "step 3/" in attempt.output, "step 3", 270)
    os.kill(attempt.pods[1].workers()[0], signal.SIGSTOP)
    stopped_at = time.monotonic()
    assert attempt.wait(SLACK * 75) == [75, 75], attempt.output
    print(f"frozen rank: all left after {time.monotonic() - stopped_at:.1f} s")
    waiting, frozen = attempt.pods
    assert "stability.stallTimeoutSeconds is 6" in waiting.result.message
    assert "the stacks of all threads of rank 0:" in waiting.output
    assert "in _reduce" in waiting.output  # Rank 0 waits for the frozen rank in `_reduce`.
    assert "rank 1 gave no sign of life any more in phase" in frozen.result.message


@pytest.mark.parametrize(
    ("error", "phase", "step", "sentence"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB",
            "Training",
            12,
            "out of memory in phase Training, after step 12: 2.50 GiB more were asked for on a GPU of 79.10 GiB: lower"
            " training.microBatchSize (it is 2), set training.gradientCheckpointing, or take a larger GPU",
        ),
        (
            "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            " 4194304000 bytes. Error code 12",
            "Generating",
            0,
            "out of memory in phase Generating: 4,000 MiB more were asked for: lower"
            " evaluation.generation.batchSize (it is 8) or evaluation.generation.maxNewTokens",
        ),
        (
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB",
            "Loading",
            0,
            "out of memory in phase Loading: 20.00 MiB more were asked for on a GPU of 79.10 GiB: the model itself does"
            " not fit, take a larger GPU or more processes with deepspeed.zeroStage 3",
        ),
    ],
)
def test_lack_of_memory_is_told_with_phase_amount_and_remedy(
    error: str, phase: str, step: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "memory_limit", lambda: None)

    class Nowhere:
        endpoint = "http://127.0.0.1:1"

    config = RunConfig.model_validate(run_config(Nowhere(), "memory", world__device="GPU"))  # type: ignore[arg-type]
    assert out_of_memory_message(RuntimeError(error), WorkerStatus(step=step, phase=phase), config) == sentence


def test_a_kill_for_lack_of_memory_says_what_the_rank_was_doing() -> None:
    killed = WorkerExit(1, -9, None, last_seen="in phase Evaluating, after step 40")
    result = result_of_pod([killed], out_of_memory=True, memory_limit=6 << 30)
    assert (result.outcome, result.phase) == (Outcome.OUT_OF_MEMORY, Phase.EVALUATING)
    assert result.message == (
        "out of memory: rank 1 was killed in phase Evaluating, after step 40 because the pod reached its memory limit"
        " of 6.00 GiB: raise resources.memory, or lower training.microBatchSize or dataset.maxLength"
    )
