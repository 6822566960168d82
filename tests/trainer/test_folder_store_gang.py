"""A training whose runs lie in a folder of this machine has the same bits as with an object store. It goes on after a
stop and after a kill, needs no network, and is ended by the fence when another run of the job begins."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import Outcome, RunConfig
from finetune_core.layout import COMMIT, checkpoint_folder
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.sources.identities import input_identities
from finetune_trainer.sources.inputs import fetch_inputs
from finetune_trainer.storage.root import open_root, source_store
from finetune_trainer.storage.step_log import StepRow
from tests.trainer import tiny
from tests.trainer.conftest import StartPods
from tests.trainer.gangs import train_all
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.preflights import paths_in, run_program

LONG: dict[str, Any] = {"optimization__maxSteps": 24, "storage__checkpointEverySteps": 4, "storage__keepLast": 3}
METHODS: dict[str, dict[str, Any]] = {
    "folder-full": {**LONG, "method": "Full", "optimization__precision": "bf16"},
    "folder-lora": {**LONG, "lora__dropout": "0.1", "evaluation__everySteps": 6, "evaluation__artifactFrom": "Best"},
    # This artifact has a base model of its own, which lies beside the runs of all jobs.
    "folder-tokens": {**LONG, "model__addedTokens": ["<A>"]},
}
TIMES = {name for name in StepRow.model_fields if name.endswith("seconds")} | {"mfu", "memory_bytes"}
TIMES |= {"memory_peak_bytes"}
"""Figures of a step that differ from run to run."""


def offline(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the run file of a job whose runs lie in ``folder``, and whose object store nobody can reach."""
    config["storage"] |= {"folder": str(folder), "endpoint": "http://127.0.0.1:9"}
    return config


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def comparable(files: dict[str, bytes], bases: str) -> dict[str, Any]:
    """Return the objects of a job by key, without what differs from run to run and without the address of
    extended base models, ``bases``."""
    found: dict[str, Any] = {}
    for key, data in files.items():
        if "/metrics/" in key:
            rows = [json.loads(line) for line in data.decode().splitlines()]
            found[key] = [{name: value for name, value in row.items() if name not in LEFT_OUT} for row in rows]
        elif "/settings/" in key:
            # The run files differ in where the store is, and in nothing else.
            settings = json.loads(data)
            storage = settings["storage"]
            found[key] = settings | {"storage": {**storage, "folder": None, "endpoint": None}}
        else:
            found[key] = data.replace(bases.encode(), b"BASES/")
    return found


LEFT_OUT = {StepRow.model_fields[name].alias for name in TIMES}


@pytest.fixture(scope="module")
def trained(store: ObjectStore, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder store of jobs that were trained twice, with the same settings: once into this store, and once into the
    object store."""
    folder = tmp_path_factory.mktemp("trained")
    inputs = Inputs(
        model=tiny_model,
        train=tiny.write_jsonl(folder / "train.jsonl", tiny.rows(20, seed=1)),
        validation=tiny.write_jsonl(folder / "validation.jsonl", tiny.rows(7, seed=2)),
    )
    here = folder / "store"
    here.mkdir()
    configs = [run_config(store, name, **changes) for name, changes in METHODS.items()]
    configs += [offline(run_config(store, name, **changes), here) for name, changes in METHODS.items()]
    results = train_all(configs, inputs, folder, credentials=store.credentials)
    for result, name in zip(results[len(METHODS) :], METHODS, strict=True):
        assert result.artifact is not None
        assert result.artifact.uri == f"{here}/{BUCKET}/runs/default/{name}/uid-1/artifacts/000001"
        assert (Path(result.artifact.uri) / COMMIT).is_file()
    return here


@pytest.mark.gang
@pytest.mark.parametrize("name", METHODS)
def test_every_object_has_the_same_bytes_as_in_an_object_store(name: str, trained: Path, store: ObjectStore) -> None:
    here = comparable(files_below(trained / BUCKET / "runs" / "default" / name), f"{trained}/{BUCKET}/runs/_bases/")
    keys = store.keys(f"runs/default/{name}/")
    there = {key.removeprefix(f"runs/default/{name}/"): store.read(key) for key in keys}
    expected = comparable(there, f"s3://{BUCKET}/runs/_bases/")
    assert here.keys() == expected.keys()
    assert len([key for key in here if key.endswith(f"/{COMMIT}")]) >= 4
    different = {key for key in here if here[key] != expected[key]}
    # The adapter of an extended base model names the address of that model, so the digests of its files differ.
    artifact = "uid-1/artifacts/000001"
    digests = {"uid-1/ARTIFACT", f"{artifact}/manifest.json", f"{artifact}/{COMMIT}"}
    assert different == (digests if name == "folder-tokens" else set())


@pytest.mark.gang
def test_an_adapter_names_the_folder_of_its_base_model(trained: Path, store: ObjectStore) -> None:
    artifact = trained / BUCKET / "runs" / "default" / "folder-tokens" / "uid-1" / "artifacts" / "000001"
    base = Path(json.loads((artifact / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert base.parent == trained / BUCKET / "runs" / "_bases"
    assert files_below(base) == {
        key.removeprefix(f"runs/_bases/{base.name}/"): store.read(key)
        for key in store.keys(f"runs/_bases/{base.name}/")
    }


@pytest.fixture
def volumes(tiny_model: Path, tmp_path: Path) -> Path:
    """Folders of this machine in the place of volumes: the model and the rows of `run_config`."""
    folder = tmp_path / "volumes"
    (folder / "rows").mkdir(parents=True)
    tiny.write_jsonl(folder / "rows" / "train.jsonl", tiny.rows(20, seed=1))
    tiny.write_jsonl(folder / "rows" / "validation.jsonl", tiny.rows(7, seed=2))
    (folder / "models").symlink_to(tiny_model.parent)
    return folder


def local_config(store: ObjectStore, name: str, folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Return the run file of one launcher with two ranks, whose model, rows and runs all lie in folders of this
    machine."""
    config = offline(run_config(store, name, world__nodes=1, world__processesPerNode=2, **changes), folder)
    config["model"] = {"volume": {"claimName": "models", "path": model.name}}
    for part in ("train", "validation"):
        config["dataset"][part] = {"volume": {"claimName": "rows", "path": f"{part}.jsonl"}}
    return config


def committed_steps(root: Path) -> list[int]:
    return sorted(int(path.parent.name.split("-")[1]) for path in root.glob(f"checkpoints/*/{COMMIT}"))


def weights_of(root: Path) -> bytes:
    """Return the file with the weights of a job's artifact."""
    pointer = json.loads((root / "ARTIFACT").read_bytes())
    return Path(root, pointer["folder"], "adapter_model.safetensors").read_bytes()


def test_without_a_network_a_stopped_and_a_killed_training_come_to_the_same_model(
    store: ObjectStore, tiny_model: Path, volumes: Path, pods: StartPods, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    undisturbed, root = (folder / BUCKET / "runs" / "default" / name / "uid-1" for name in ("undisturbed", "disturbed"))
    lora = METHODS["folder-lora"]
    config = local_config(store, "disturbed", folder, tiny_model, **lora)
    options: dict[str, Any] = {
        "forked": True,
        "credentials": tmp_path / "no credentials",
        "arguments": ("--volumes", str(volumes)),
    }
    whole = pods(local_config(store, "undisturbed", folder, tiny_model, **lora), **options)
    assert whole.wait() == [0], whole.output
    first = pods(config, **options)
    first.wait_for(lambda: bool(committed_steps(root)), "the first checkpoint")
    first.pods[0].process.send_signal(signal.SIGTERM)
    assert first.wait() == [143], first.output
    stopped = committed_steps(root)[-1]
    result = first.pods[0].result
    assert result.outcome is Outcome.STOPPED
    assert result.message == f"told to stop: the checkpoint of step {stopped} is committed"
    assert result.checkpoint == str(root / checkpoint_folder(1, stopped))

    second = pods(config, attempt=2, **options)
    second.wait_for(lambda: committed_steps(root)[-1] > stopped, "a checkpoint of the second attempt")
    os.kill(second.pods[0].workers()[1], signal.SIGKILL)
    assert second.wait() == [1], second.output
    assert f"resumed from step {stopped} of run 1" in second.output
    newest = committed_steps(root)[-1]

    third = pods(config, attempt=3, **options)
    assert third.wait() == [0], third.output
    assert f"resumed from step {newest} of run 2" in third.output
    assert weights_of(root) == weights_of(undisturbed)
    assert not [path for path in folder.rglob("*") if path.name.startswith(".partial-")]


def test_of_two_runs_at_the_same_time_the_earlier_one_is_ended_by_the_fence(
    store: ObjectStore, tiny_model: Path, volumes: Path, pods: StartPods, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    root = folder / BUCKET / "runs" / "default" / "twice" / "uid-1"
    config = local_config(store, "twice", folder, tiny_model, **{**LONG, "optimization__maxSteps": 100_000})
    options: dict[str, Any] = {"forked": True, "arguments": ("--volumes", str(volumes))}
    first = pods(config, **options)
    first.wait_for(lambda: bool(committed_steps(root)), "the first checkpoint")
    second = pods(config, attempt=2, **options)
    assert first.wait() == [75], first.output
    message = "run 2 of this job has started, so run 1 stopped writing to the bucket"
    assert first.pods[0].result.message == message
    second.wait_for(
        lambda: any(path.parent.name.startswith("000002-") for path in root.glob(f"checkpoints/*/{COMMIT}")),
        "a checkpoint of the second run",
    )
    assert not (root / "ARTIFACT").exists()


def test_the_preflight_check_needs_no_object_store_either(
    store: ObjectStore, tiny_model: Path, volumes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    paths = paths_in(tmp_path, store).model_copy(update={"credentials": tmp_path / "none"})
    config = local_config(store, "checked", folder, tiny_model, **LONG)
    paths.run_file.write_text(json.dumps(config))
    ended = run_program(paths)
    assert (ended.code, ended.result.findings) == (0, []), ended.log
    assert list(folder.iterdir()) == [], "the object that tested the store is deleted"

    folder.rmdir()
    ended = run_program(paths)
    assert (ended.code, [finding.message for finding in ended.result.findings]) == (
        75,
        [f"storage.folder: there is no folder {folder}"],
    )


def test_model_and_rows_of_an_object_store_are_fetched_from_there(store: ObjectStore, tmp_path: Path) -> None:
    folder, fetched = tmp_path / "store", tmp_path / "fetched"
    folder.mkdir()
    fetched.mkdir()
    config = run_config(store, "fetched", storage__folder=str(folder))
    paths, read = paths_in(tmp_path, store), RunConfig.model_validate(config)
    root = open_root(read, paths)
    inputs = fetch_inputs(read, paths, root, fetched)
    assert (inputs.model / "model.safetensors").read_bytes() == store.read("models/tiny/model.safetensors")
    assert input_identities(read, paths, source_store(root, read, paths), tmp_path / "identities").keys() == {
        "model",
        "dataset.train",
        "dataset.validation",
    }
    root.write("runs/000001.json", b"{}")
    assert files_below(folder) == {f"{BUCKET}/runs/default/fetched/uid-1/runs/000001.json": b"{}"}
    assert store.keys("runs/default/fetched/") == []
