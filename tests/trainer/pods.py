"""Runs the real launcher as processes on loopback. Each launcher process takes the place of one pod of an attempt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_core.contract import Result, RunConfig
from tests.trainer import tiny
from tests.trainer.objectstore import BUCKET, ObjectStore, free_port
from tests.trainer.zygote import Forked, zygote

START_SECONDS = 90.0


def fill_bucket(store: ObjectStore, model: Path, folder: Path) -> None:
    """Write training and validation rows to ``folder``, and upload ``model`` and the rows to the addresses that
    `run_config` names."""
    folder.mkdir(exist_ok=True)
    tiny.write_jsonl(folder / "train.jsonl", tiny.rows(20, seed=1))
    tiny.write_jsonl(folder / "validation.jsonl", tiny.rows(7, seed=2))
    store.upload("models/tiny", model)
    store.upload("data", folder)


def run_config(store: ObjectStore, name: str, **changes: Any) -> dict[str, Any]:
    """Return a run file for the tiny model, with ``changes``.

    A change replaces a whole section, or a single field where its name has the form `section__field`. The value None
    removes the section or the field. With the method Full the run file has no section `lora`.
    """
    config: dict[str, Any] = {
        "version": 1,
        "world": {"nodes": 2, "processesPerNode": 1, "device": "CPU"},
        "model": {"s3": {"uri": f"s3://{BUCKET}/models/tiny"}},
        "dataset": {
            "train": {"s3": {"uri": f"s3://{BUCKET}/data/train.jsonl"}},
            "validation": {"s3": {"uri": f"s3://{BUCKET}/data/validation.jsonl"}},
            "format": {
                "promptCompletion": {"promptField": "question", "completionField": "reply", "template": tiny.TEMPLATE}
            },
            "maxLength": 64,
        },
        "method": "LoRA",
        "lora": {"rank": 4, "alpha": 8},
        "optimization": {
            "learningRate": 1e-3,
            "maxSteps": 6,
            "globalBatchSize": 6,
            "microBatchSize": 2,
            "schedule": "Constant",
            "warmupSteps": 0,
            "weightDecay": 0,
            "gradientClipping": 1.0,
            "precision": "fp32",
            "gradientCheckpointing": False,
            "seed": 42,
            "zeroStage": 2,
        },
        "evaluation": {"artifactFrom": "Last"},
        "storage": {
            "uri": f"s3://{BUCKET}/runs/default/{name}/uid-1",
            "endpoint": store.endpoint,
            "region": "us-east-1",
            "checkpointEverySteps": 3,
            "keepLast": 2,
        },
    }
    for path, value in changes.items():
        *sections, field_name = path.split("__")
        target = config
        for section in sections:
            target = target[section]
        if value is None:
            target.pop(field_name)
        else:
            target[field_name] = value
    if config["method"] == "Full":
        config.pop("lora", None)
    RunConfig.model_validate(config)
    return config


def children(process: int) -> list[int]:
    """Return the process ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@dataclass
class Pod:
    """One launcher process, which takes the place of a pod."""

    process: subprocess.Popen[bytes] | Forked
    scratch: Path
    log: Path
    termination_log: Path

    @property
    def result(self) -> Result:
        found = Result.from_termination_message(self.termination_log.read_text())
        assert found is not None, self.output
        return found

    @property
    def output(self) -> str:
        return self.log.read_text()

    def workers(self) -> list[int]:
        """Return the process ids of the workers.

        If a wrapper runs the launcher as its child, return the launcher's id instead.
        """
        return children(self.process.pid)


@dataclass
class Attempt:
    """The pods of one attempt."""

    pods: list[Pod] = field(default_factory=list)

    def wait(self, seconds: float = START_SECONDS) -> list[int]:
        """Wait until all pods have exited and return their exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [pod.process.wait(max(0.1, deadline - time.monotonic())) for pod in self.pods]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"pods still run after {seconds} s:\n{self.output}") from None

    @property
    def output(self) -> str:
        return "\n".join(pod.output for pod in self.pods)

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        """Wait until ``condition`` holds. Fail after ``seconds``, or if all pods exit before. ``what`` names the
        condition in the message of a failure."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}:\n{self.output}"
            assert any(pod.process.poll() is None for pod in self.pods), f"ended before {what}:\n{self.output}"
            # Pause between two checks; the deadline bounds their total time.
            time.sleep(0.05)

    def end(self) -> None:
        """Kill the processes that still run, workers first."""
        for pod in self.pods:
            if pod.process.poll() is None:
                for worker in pod.workers():
                    os.kill(worker, signal.SIGKILL)
                pod.process.kill()
                pod.process.wait()


def start_pods(
    config: dict[str, Any],
    folder: Path,
    *,
    credentials: Path,
    attempt: int = 1,
    arguments: tuple[str, ...] = (),
    variables: Mapping[str, str] | None = None,
    wrapper: tuple[str, ...] = (),
    forked: bool = False,
) -> Attempt:
    """Start one launcher process for each node of ``config``.

    ``variables`` are added to the launcher's environment. ``wrapper`` is the beginning of a command line that runs the
    launcher, such as `unshare` with its options. With ``forked`` the launchers and their workers are forks of a process
    that has imported torch, which saves many seconds. A test must not use ``forked`` if it is about the start of a
    process, or about properties that other programs see, such as the command line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run_file = folder / "run.json"
    run_file.write_text(json.dumps(config))
    nonce_file = folder / "nonce"
    nonce_file.write_text(f"nonce of attempt {attempt}")
    port = free_port()
    started = Attempt()
    for rank in range(config["world"]["nodes"]):
        scratch = folder / f"pod-{rank}"
        scratch.mkdir()
        log, termination_log = folder / f"pod-{rank}.log", folder / f"pod-{rank}.result"
        environment = {
            "PATH": "/nonexistent",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "FTJ_NAMESPACE": "default",
            "FTJ_NAME": "test",
            "FTJ_UID": "uid-1",
            "FTJ_ATTEMPT": str(attempt),
            "FTJ_POD_NAME": f"test-worker-{rank}",
            "FTJ_POD_UID": f"pod-uid-{attempt}-{rank}",
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
            **(variables or {}),
        }
        options = ["--run-file", str(run_file), "--nonce-file", str(nonce_file), "--scratch", str(scratch)]
        options += ["--credentials", str(credentials), "--termination-log", str(termination_log), *arguments]
        process: subprocess.Popen[bytes] | Forked
        if forked:
            assert not wrapper
            process = zygote().start("finetune_trainer", options, environment=environment, log=log)
        else:
            command = [*wrapper, sys.executable, "-m", "finetune_trainer", *options]
            with log.open("wb") as stream:
                process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        started.pods.append(Pod(process, scratch, log, termination_log))
    return started
