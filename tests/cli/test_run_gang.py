"""`finetune run` as a user runs it, without a cluster, an object store or a network: the trained model has the bits of
the pods, Ctrl-C and the same command again come to the same model, and a second run at the same time is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_core.api.job import FineTuneJob
from finetune_core.layout import COMMIT
from finetune_core.resolve import resolve
from tests.cli.local_jobs import job_document
from tests.trainer import tiny
from tests.trainer.conftest import tiny_model  # noqa: F401  (a fixture)
from tests.trainer.pods import children, start_pods

pytestmark = pytest.mark.gang

SECONDS = 240.0
OF_THE_START = {"README.md", "manifest.json", COMMIT}
"""Files of an artifact that name the job, its uid and the store, or have the digest of such a file."""


@dataclass
class Machine:
    """A folder with the model, the rows and job files, and the environment of the commands."""

    folder: Path
    environment: dict[str, str]

    def job(self, document: dict[str, Any]) -> Path:
        file = self.folder / f"{document['metadata']['name']}.json"
        file.write_text(json.dumps(document))
        return file

    def start(self, file: Path, *options: str) -> subprocess.Popen[str]:
        paths = ("--model", "model", "--train", "train.jsonl", "--validation", "validation.jsonl", "--store", "store")
        command = [sys.executable, "-m", "finetune_cli", "run", file.name, *paths, *options]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, file: Path, *options: str) -> tuple[int, str, str]:
        process = self.start(file, *options)
        try:
            out, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        return process.returncode, out, err

    def root(self, name: str, store: str = "store", run_id: str = "local") -> Path:
        return self.folder / store / "finetune" / "runs" / "default" / name / run_id

    def log(self, name: str) -> str:
        return (self.folder / "store" / ".finetune" / "default" / name / "local" / "trainer.log").read_text()


@pytest.fixture(scope="module")
def machine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Machine:  # noqa: F811
    folder = tmp_path_factory.mktemp("machine")
    (folder / "model").symlink_to(tiny_model)
    tiny.write_jsonl(folder / "train.jsonl", tiny.rows(20, seed=1))
    tiny.write_jsonl(folder / "validation.jsonl", tiny.rows(7, seed=2))
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in ("PYTHONPATH", "PYTHONPYCACHEPREFIX", "DS_BUILD_OPS", "LANG")
    }
    # No kubeconfig, no programs but Python itself, and no hub.
    environment |= {"PATH": "/nonexistent", "HOME": str(folder), "HF_HUB_OFFLINE": "1", "KUBECONFIG": "/nonexistent"}
    return Machine(folder, environment)


def unchecked(name: str) -> dict[str, Any]:
    """Return a job without the check before the training, which takes longer than the training of the tiny model."""
    document = job_document(name)
    document["spec"]["runPolicy"] = {"preflight": "Skip"}
    return document


def committed_steps(root: Path) -> list[int]:
    return sorted(int(path.parent.name.split("-")[1]) for path in root.glob(f"checkpoints/*/{COMMIT}"))


def artifact_of(root: Path) -> dict[str, bytes]:
    """Return the files of a job's artifact that do not name the start."""
    folder = root / json.loads((root / "ARTIFACT").read_bytes())["folder"]
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in OF_THE_START}
    config = json.loads(found["adapter_config.json"])
    # The name of the base model is that of its volume.
    del config["base_model_name_or_path"]
    return found | {"adapter_config.json": json.dumps(config).encode()}


def losses_of(root: Path) -> dict[int, float]:
    rows = [json.loads(line) for path in sorted(root.glob("metrics/*")) for line in path.read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        assert process.poll() is None, (f"ended before {what}", process.communicate())
        # Pause between two checks; the deadline bounds their total time.
        time.sleep(0.05)


def has_pending_stop(process: int) -> bool:
    """Return whether a stopped process will get SIGTERM when it goes on (man 5 proc_pid_status)."""
    status = dict(line.split(":\t") for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(status["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1)


def gone(process: int) -> bool:
    """Return whether a process has ended. A process that nobody has waited for yet has ended too."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def trained(machine: Machine) -> tuple[int, str, str]:
    """How a whole run ended."""
    return machine.run(machine.job(unchecked("whole")), "--every", "6")


def test_a_job_is_trained_without_a_cluster(machine: Machine, trained: tuple[int, str, str]) -> None:
    code, out, err = trained
    assert code == 0, (out, err, machine.log("whole"))
    lines = out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert steps[-1].startswith("step 60/60  loss ")
    assert " tokens/s" in steps[-1]
    assert any(line.startswith("base model: perplexity ") for line in lines)
    assert any(line.startswith("tuned model: perplexity ") for line in lines)
    artifact = machine.root("whole") / "artifacts" / "000001"
    assert lines[-1] == str(artifact)
    assert (artifact / COMMIT).is_file()
    left = {path.name for path in (machine.folder / "store" / ".finetune" / "default" / "whole" / "local").iterdir()}
    assert left == {"lock", "run.json", "result.json", "trainer.log"}


def test_the_model_has_the_bits_of_the_pods(
    machine: Machine,
    trained: tuple[int, str, str],
    tmp_path: Path,
    tiny_model: Path,  # noqa: F811
) -> None:
    assert trained[0] == 0, trained
    document = job_document("pods")
    spec = document["spec"]
    spec["model"] = {"volume": {"claimName": "models", "path": "model"}}
    for part in ("train", "validation"):
        spec["dataset"][part] = {"volume": {"claimName": "models", "path": f"{part}.jsonl"}}
    document["metadata"]["uid"] = "uid-1"
    config = json.loads(resolve(FineTuneJob.model_validate(document), report=None).to_json())
    (tmp_path / "store").mkdir()
    config["storage"]["folder"] = str(tmp_path / "store")
    volume = tmp_path / "volumes" / "models"
    volume.mkdir(parents=True)
    # A link out of a volume is refused, so the volume has copies.
    shutil.copytree(tiny_model, volume / "model")
    for part in ("train", "validation"):
        shutil.copy(machine.folder / f"{part}.jsonl", volume)
    pods = start_pods(
        config,
        tmp_path / "attempt",
        credentials=tmp_path / "none",
        arguments=("--volumes", str(tmp_path / "volumes")),
        forked=True,
    )
    try:
        assert pods.wait(SECONDS) == [0, 0], pods.output
    finally:
        pods.end()
    root = tmp_path / "store" / "finetune" / "runs" / "default" / "pods" / "uid-1"
    assert losses_of(machine.root("whole")) == losses_of(root)
    ours, theirs = artifact_of(machine.root("whole")), artifact_of(root)
    assert ours.keys() == theirs.keys() > {"adapter_model.safetensors"}
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_ctrl_c_saves_and_the_same_command_comes_to_the_same_model(
    machine: Machine, trained: tuple[int, str, str]
) -> None:
    assert trained[0] == 0, trained
    document = unchecked("stopped")
    file, root = machine.job(document), machine.root("stopped")
    first = machine.start(file)
    wait_for(lambda: bool(committed_steps(root)), first, "the first checkpoint")
    (launcher,) = children(first.pid)
    # The tiny model would be trained before the second command has started.
    os.killpg(launcher, signal.SIGSTOP)
    code, out, err = machine.run(file)
    assert (code, out) == (2, "")
    assert err.startswith("finetune: default/stopped: is being trained by another `finetune run` with this store: ")
    first.send_signal(signal.SIGINT)
    wait_for(lambda: has_pending_stop(launcher), first, "the order to stop")
    os.killpg(launcher, signal.SIGCONT)
    out, err = first.communicate(timeout=SECONDS)
    assert first.returncode == 130, (out, err)
    assert "finetune: stopping: a checkpoint is saved; Ctrl-C again ends the training at once" in err
    step = committed_steps(root)[-1]
    assert out.splitlines()[-1] == (
        f"Stopped: told to stop: the checkpoint of step {step} is committed; run the same command again to go on"
    )
    assert gone(launcher)
    assert step < 60, "the signal came too late to stop anything"

    changed = json.loads(json.dumps(document))
    changed["spec"]["training"]["learningRate"] = "2e-3"
    code, out, err = machine.run(machine.job(changed))
    assert (code, out) == (2, "")
    assert err == (
        "finetune: optimization.learningRate: differs from the run in the store, which has 0.001 and not 0.002; that"
        " run can't go on: add --fresh or give the job another metadata.name to train anew\n"
    )

    code, out, err = machine.run(machine.job(document))
    assert code == 0, (out, err, machine.log("stopped"))
    assert f"resumed from step {step} of run 1" in machine.log("stopped")
    assert artifact_of(root) == artifact_of(machine.root("whole"))
    assert losses_of(root) == losses_of(machine.root("whole"))


def test_bad_rows_are_refused_before_the_training_by_the_check_of_the_operator(machine: Machine) -> None:
    document = job_document("bad")
    document["spec"]["dataset"]["format"]["promptCompletion"]["promptField"] = "missing"
    code, out, err = machine.run(machine.job(document))
    assert code == 1, (out, err)
    assert err.startswith("finetune: dataset.format.promptCompletion.promptField: ")
    assert not (machine.root("bad") / "runs").exists()


def test_a_dry_run_shows_the_run_file_and_the_first_examples_and_writes_nothing(machine: Machine) -> None:
    code, out, err = machine.run(machine.job(job_document("dry")), "--dry-run", "--store", "another")
    assert (code, err) == (0, ""), (out, err)
    assert out.startswith("checking model and data\n")
    assert not (machine.folder / "another").exists()
    before, _, after = out.partition("\nrun file:\n")
    assert "plan: none, because a plan is about GPUs" in before
    settings, _, examples = after.partition("\n\n")
    assert yaml.safe_load(settings)["optimization"]["learningRate"] == 0.001
    assert yaml.safe_load(settings)["world"] == {"nodes": 1, "processesPerNode": 2, "device": "CPU"}
    question, reply = (tiny.rows(20, seed=1)[0][name] for name in ("question", "reply"))
    lines = examples.splitlines()
    assert lines[0] == "first examples: {+learned+}, only read, [-cut off-]"
    assert lines[3] == f"  text: ask {question} answer{{+{reply} <end>+}}"
    assert sum(line.startswith("example ") for line in lines) == 3
