"""What `finetune run` makes of a job file and its options, before anything starts."""

from __future__ import annotations

import copy
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from finetune_cli.commands.run_command import volume
from finetune_cli.compare.folders import LocalFolder
from finetune_cli.localrun.former_settings import (
    check_same_training,
    former_settings,
    run_id_of,
)
from finetune_cli.localrun.local_job import (
    LocalPaths,
    checked_store,
    cpus_asked,
    local_config,
    localised,
    without_files,
)
from finetune_cli.localrun.run_job import RunOptions, resources_here
from finetune_cli.localrun.state_folder import locked, state_folder
from finetune_cli.localrun.trainer_process import GpusHere, trainer_environment
from finetune_core.api.job import FineTuneJob
from finetune_core.errors import UserError
from finetune_core.resolve import resolve
from finetune_core.validation.validate_job import validate_job
from tests.cli.local_jobs import job_document

NO_PATHS = LocalPaths()


def config_of(document: dict[str, Any], store: Path | None = None, **resources: Any) -> Any:
    local = localised(document, NO_PATHS, resources, "local")
    return local_config(local.job, store=store, endpoint=None, today=date(2026, 12, 1))


def test_the_run_file_is_that_of_the_operator_with_all_processes_in_one_node(tmp_path: Path) -> None:
    document = job_document("here")
    config = config_of(document, tmp_path)
    stored = copy.deepcopy(document)
    stored["spec"]["storage"]["runId"] = "local"
    cluster = resolve(FineTuneJob.model_validate(stored), report=None)
    assert (config.world.nodes, config.world.processes_per_node, config.world.size) == (1, 2, cluster.world.size)
    same = {"world": cluster.world, "storage": cluster.storage}
    assert config.model_copy(update=same) == cluster
    assert config.storage.model_copy(update={"folder": None, "credentials": "Secret"}) == cluster.storage.model_copy(
        update={"credentials": "Secret"}
    )
    assert config.storage.folder == str(tmp_path)


def test_a_path_takes_the_place_of_a_source_and_keeps_what_stands_beside_it(tmp_path: Path) -> None:
    document = job_document("here")
    document["spec"]["model"]["addedTokens"] = ["<A>"]
    document["spec"]["storage"]["cache"] = {"claimName": "models"}
    (tmp_path / "model").mkdir()
    (tmp_path / "rows[1].jsonl").touch()
    rows = tmp_path / "rows"
    rows.mkdir()
    paths = LocalPaths(
        {
            "--model": str(tmp_path / "model"),
            "--train": str(tmp_path / "rows[1].jsonl"),
            "--validation": str(rows / "*.jsonl"),
        }
    )
    local = localised(document, paths, {}, "local")
    spec = local.job.spec
    assert spec.model.volume is not None
    assert (local.volumes[spec.model.volume.claim_name], spec.model.volume.path) == (tmp_path, "model")
    assert (spec.model.s3, spec.model.added_tokens, spec.storage.cache) == (None, ["<A>"], None)
    train, validation = spec.dataset.train.volume, spec.dataset.validation
    assert train is not None
    assert validation is not None
    assert validation.volume is not None
    assert (local.volumes[train.claim_name], train.path) == (tmp_path, "rows[1].jsonl")
    assert (local.volumes[validation.volume.claim_name], validation.volume.path) == (rows, "*.jsonl")
    assert "volume" not in document["spec"]["model"], "the document of the caller is as it was"


def with_files(folder: Path) -> dict[str, Any]:
    """Return a job whose model and training rows are paths beside its file, and write these."""
    document = job_document("here")
    document["spec"]["model"] = {"file": "model", "addedTokens": ["<A>"]}
    document["spec"]["dataset"]["train"] = {"file": str(folder / "rows.jsonl")}
    (folder / "model").mkdir()
    (folder / "rows.jsonl").touch()
    return document


def test_paths_in_the_job_file_begin_in_its_folder_and_an_option_wins(tmp_path: Path) -> None:
    document = with_files(tmp_path)
    changed, files = without_files(document, tmp_path)
    assert files == {"--model": str(tmp_path / "model"), "--train": str(tmp_path / "rows.jsonl")}
    local = localised(changed, LocalPaths(files=files), {}, "local")
    model, train = local.job.spec.model, local.job.spec.dataset.train.volume
    assert model.volume is not None
    assert train is not None
    assert (local.volumes[model.volume.claim_name], model.volume.path) == (tmp_path, "model")
    assert model.added_tokens == ["<A>"]
    assert (local.volumes[train.claim_name], train.path) == (tmp_path, "rows.jsonl")
    (tmp_path / "others.jsonl").touch()
    other = localised(changed, LocalPaths({"--train": str(tmp_path / "others.jsonl")}, files=files), {}, "local")
    assert other.job.spec.dataset.train.volume is not None
    assert other.job.spec.dataset.train.volume.path == "others.jsonl"
    assert document["spec"]["model"] == {"file": "model", "addedTokens": ["<A>"]}, "the caller's document is as it was"


def test_a_path_in_the_job_file_to_nothing_is_refused_by_its_field(tmp_path: Path) -> None:
    changed, files = without_files(with_files(tmp_path), tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"^spec\.model\.file: must name a folder, and .*elsewhere/model is none"):
        localised(changed, LocalPaths(files=files), {}, "local")


NO_FILES: list[Any] = [{"file": ""}, {"file": 3}, {"file": "a", "volume": {"claimName": "c"}}, "file", None]
NO_JOBS: list[dict[str, Any]] = [{}, {"spec": None}, {"spec": {"dataset": []}}]


@pytest.mark.parametrize("source", NO_FILES)
def test_what_is_no_path_is_left_to_the_check(source: Any, tmp_path: Path) -> None:
    document = job_document("here")
    document["spec"]["dataset"]["train"] = source
    assert without_files(document, tmp_path) == (document, {})
    for strange in NO_JOBS:
        assert without_files(strange, tmp_path) == (strange, {})


def test_a_cluster_refuses_a_path_of_one_machine_and_says_who_reads_it(tmp_path: Path) -> None:
    problems = {str(problem) for problem in validate_job(with_files(tmp_path)).problems}
    for where in ("spec.model.file", "spec.dataset.train.file"):
        assert any(
            text.startswith(f"{where}: is a path of one machine, and only `finetune run` reads it") for text in problems
        )


@pytest.mark.parametrize(
    ("sources", "problem"),
    [
        ({"--train": "missing.jsonl"}, "--train: must name a file or a folder, and missing.jsonl is none"),
        ({"--model": "missing"}, "--model: must name a folder, and missing is none"),
        ({"--model": __file__}, f"--model: must name the folder of a model, and {__file__} is a file"),
        ({"--test": "missing/*.jsonl"}, "--test: must name a folder, and "),
    ],
)
def test_a_path_to_nothing_is_refused_by_its_option(sources: dict[str, str], problem: str) -> None:
    with pytest.raises(UserError, match=f"^{problem}"):
        localised(job_document("here"), LocalPaths(sources), {}, "local")


def test_a_volume_must_be_mapped_and_a_job_of_the_cluster_is_refused(tmp_path: Path) -> None:
    document = job_document("here")
    document["spec"]["dataset"]["train"] = {"volume": {"claimName": "rows", "path": "train.jsonl"}}
    with pytest.raises(UserError, match=r"^spec.dataset.train.volume.claimName: .* --volume rows=FOLDER$"):
        localised(document, NO_PATHS, {}, "local")
    assert localised(document, LocalPaths(volumes={"rows": tmp_path}), {}, "local").volumes == {"rows": tmp_path}
    document = job_document("here")
    document["spec"]["model"]["adapter"] = {"job": {"name": "other"}, "use": "Continue"}
    with pytest.raises(UserError, match=r"^spec.model.adapter.job: names a job of a cluster"):
        localised(document, NO_PATHS, {}, "local")


def test_a_number_of_processes_that_the_job_can_not_have_names_the_field() -> None:
    document = job_document("here")
    document["spec"]["training"] |= {"gradientAccumulationSteps": 1, "microBatchSize": 3}
    document["spec"]["training"]["globalBatchSize"] = 6
    with pytest.raises(UserError, match="globalBatchSize"):
        localised(document, NO_PATHS, {"nodes": 1, "gpusPerNode": 4}, "local")


NO_GPU, TWO_GPUS = GpusHere(0, ""), GpusHere(2, "NVIDIA-L4")
ON_GPUS = {"nodes": 2, "gpusPerNode": 1}
ON_CPUS = {"nodes": 2, "gpusPerNode": 0, "device": "CPU"}


@pytest.mark.parametrize(
    ("resources", "options", "found", "expected"),
    [
        (ON_CPUS, {}, TWO_GPUS, {}),
        (ON_CPUS, {"processes": 1}, NO_GPU, {"device": "CPU", "nodes": 1, "gpusPerNode": 0}),
        (ON_CPUS, {"processes": 3}, NO_GPU, {"device": "CPU", "nodes": 1, "gpusPerNode": 3}),
        (
            ON_GPUS,
            {},
            TWO_GPUS,
            {"device": "GPU", "nodes": 1, "gpusPerNode": 2, "gpuProduct": "NVIDIA-L4"},
        ),
        (
            ON_CPUS,
            {"device": "GPU", "processes": 1},
            TWO_GPUS,
            {"device": "GPU", "nodes": 1, "gpusPerNode": 1, "gpuProduct": "NVIDIA-L4"},
        ),
        (ON_GPUS, {}, NO_GPU, {"device": "CPU", "nodes": 1, "gpusPerNode": 0}),
        (ON_GPUS, {"device": "CPU", "processes": 2}, TWO_GPUS, {"device": "CPU", "nodes": 1, "gpusPerNode": 2}),
        ({}, {}, GpusHere(1, ""), {"device": "GPU", "nodes": 1, "gpusPerNode": 1, "gpuProduct": ""}),
    ],
)
def test_the_processes_and_the_device_of_this_machine(
    resources: dict[str, Any], options: dict[str, Any], found: GpusHere, expected: dict[str, Any]
) -> None:
    assert resources_here(resources, RunOptions("job.yaml", **options), lambda: found) == expected


def test_too_few_gpus_are_told_with_the_option_that_helps() -> None:
    with pytest.raises(UserError, match=r"needs 8 GPUs, and this machine has 2: run again with --processes 2$"):
        resources_here({"nodes": 2, "gpusPerNode": 4}, RunOptions("job.yaml"), lambda: TWO_GPUS)
    with pytest.raises(UserError, match=r"^--device: must be cpu"):
        resources_here(ON_GPUS, RunOptions("job.yaml", device="GPU"), lambda: NO_GPU)


def test_the_cpus_of_all_pods_come_together_because_the_threads_follow_from_them() -> None:
    job = localised(job_document("here"), NO_PATHS, {}, "local").job
    assert cpus_asked(job) == 2 * 900
    environment = trainer_environment(
        {"PET_NODE_RANK": "7", "HOME": "/home/me"}, namespace="n", name="j", uid="u", cpus=1800, variables={"A": "b"}
    )
    assert environment["FTJ_CPU_REQUEST"] == "1800"
    assert (environment["PET_NODE_RANK"], environment["HOME"], environment["A"]) == ("0", "/home/me", "b")


@pytest.mark.parametrize(
    ("names", "fresh", "expected"),
    [
        ([], False, "local"),
        ([], True, "local"),
        (["local"], False, "local"),
        (["local"], True, "local-2"),
        (["local", "local-2", "local-10", "study", "local-x"], False, "local-10"),
        (["local-10", "local"], True, "local-11"),
    ],
)
def test_the_newest_folder_goes_on_and_a_fresh_one_is_behind_it(names: list[str], fresh: bool, expected: str) -> None:
    assert run_id_of(names, fresh=fresh) == expected


def test_another_training_is_told_with_the_fields_and_other_settings_are_not(tmp_path: Path) -> None:
    document = job_document("here")
    former = config_of(document, tmp_path)
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "000009.json").write_text("{}")
    assert former_settings(LocalFolder(tmp_path)) is None
    (tmp_path / "settings" / "000010.json").write_text(former.to_json())
    assert former_settings(LocalFolder(tmp_path)) == former
    document["spec"]["storage"]["checkpoint"] = {"everySteps": 7}
    check_same_training(former, config_of(document, nodes=1), anew="-")
    document["spec"]["training"]["learningRate"] = "2e-3"
    document["spec"]["lora"]["rank"] = 16
    with pytest.raises(UserError) as told:
        check_same_training(former, config_of(document), anew="add --fresh")
    assert str(told.value) == (
        "lora.rank: differs from the run in the store, which has 4 and not 16, and so do optimization.learningRate;"
        " that run can't go on: add --fresh"
    )


def test_a_second_holder_of_the_lock_is_refused_until_the_first_one_is_gone(tmp_path: Path) -> None:
    folder = state_folder(tmp_path, "default", "here", "local")
    with locked(folder, "default/here"):
        with pytest.raises(UserError, match="is being trained by another `finetune run`"), locked(folder, "here"):
            pytest.fail("two processes hold the lock")
        with locked(state_folder(tmp_path, "default", "here", "local-2"), "here"):
            pass
    with locked(folder, "default/here"):
        pass


def test_a_store_that_the_trainer_can_not_name_is_refused(tmp_path: Path) -> None:
    assert checked_store(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", Path("/" + "a" * 300), Path("/a\nb")):
        with pytest.raises(UserError, match=r"^--store: must"):
            checked_store(path)


@pytest.mark.parametrize("text", ["models", "=folder", "models=", "Models=folder", "a/b=c"])
def test_a_volume_without_name_or_folder_is_refused(text: str) -> None:
    with pytest.raises(Exception, match="must be the name of a claim and a folder"):
        volume(text)
    assert volume("models=/data/a=b") == ("models", Path("/data/a=b"))
