"""Where the adapter of `model.adapter` comes from: the bucket, a volume, the Hugging Face Hub, or the artifact of
another job, whose manifest must be the one that the operator recorded. An adapter that
has changed since the first attempt is refused.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import RunConfig
from finetune_core.contract.preflight_result import PreflightResult
from finetune_core.contract.same_training import settings_digest
from finetune_core.errors import UserError
from finetune_core.layout import Manifest, ManifestFile, digest
from finetune_trainer.model.given_adapter import GivenAdapter
from finetune_trainer.pod.settings import Paths
from finetune_trainer.sources.identities import input_identities
from finetune_trainer.sources.inputs import adapter_name, fetch_inputs, model_revision
from finetune_trainer.storage.root import object_store, open_root
from finetune_trainer.storage.run_store import digest_of_file
from tests.trainer.conftest import StartPods
from tests.trainer.given_adapters import CONFIG, WEIGHTS, with_config, write_adapter
from tests.trainer.hub import COMMIT, TOKEN, running_hub
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.preflights import paths_in, run_program

JOB = {"job": {"name": "first"}}


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "adapter")


def config_of(store: ObjectStore, source: dict[str, Any], *, use: str = "Continue", **changes: Any) -> dict[str, Any]:
    given = {"world__nodes": 1, "lora": {}, "model__adapter": {**source, "use": use}}
    return run_config(store, changes.pop("name", "adapter-source"), **(given | changes))


def write_object(store: ObjectStore, key: str, data: bytes) -> None:
    store.client.put_object(BUCKET, key, io.BytesIO(data), len(data))


def committed(store: ObjectStore, folder: Path, prefix: str) -> dict[str, Any]:
    """Upload the files in ``folder`` as the artifact of a job, and return the field `adapterArtifact` of a run file."""
    files = [
        ManifestFile(name=path.name, bytes=path.stat().st_size, sha256=digest_of_file(path).sha256)
        for path in sorted(folder.iterdir())
    ]
    data = Manifest(kind="Artifact", run=1, step=6, files=files).encode()
    store.upload(prefix, folder)
    write_object(store, f"{prefix}/manifest.json", data)
    return {"uri": f"s3://{BUCKET}/{prefix}", "manifestSha256": digest(data), "jobUid": "uid-of-first"}


def fetched(config: RunConfig, paths: Paths, folder: Path) -> Path:
    """Fetch the inputs as the launcher does, and return the folder of the adapter."""
    folder.mkdir()
    found = fetch_inputs(config, paths, open_root(config, paths), folder).adapter
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["s3", "volume", "huggingFace", "job"])
def test_an_adapter_of_every_source_is_fetched_with_its_two_files_only(
    kind: str, store: ObjectStore, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "volumes" / "claim" / "given"
    shutil.copytree(adapter, given)
    (given / "optimizer.safetensors").write_bytes(b"no part of the adapter")
    paths = paths_in(tmp_path, store).model_copy(update={"hub_data_tokens": tmp_path / "tokens"})
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "model.adapter").write_text(TOKEN)
    sources: dict[str, dict[str, Any]] = {
        "s3": {"s3": {"uri": f"s3://{BUCKET}/given/adapter"}},
        "volume": {"volume": {"claimName": "claim", "path": "given"}},
        "huggingFace": {
            "huggingFace": {"repo": "team/adapter", "tokenSecretRef": {"name": "hub", "key": "token"}},
        },
        "job": JOB,
    }
    store.upload("given/adapter", given)
    artifact = committed(store, given, "given/job") if kind == "job" else None
    config = RunConfig.model_validate(config_of(store, sources[kind]) | {"adapterArtifact": artifact})
    with running_hub({"team/adapter": given}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        folder = fetched(config, paths, tmp_path / "inputs")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {CONFIG, WEIGHTS}
    assert GivenAdapter.read(folder).sha256 == GivenAdapter.read(adapter).sha256
    source = config.model.adapter
    assert source is not None
    assert model_revision(source, folder, CONFIG) == (COMMIT if kind == "huggingFace" else None)
    names_by_kind = {
        "s3": f"s3://{BUCKET}/given/adapter",
        "volume": "claim/given",
        "huggingFace": "team/adapter",
        "job": f"s3://{BUCKET}/given/job",
    }
    assert adapter_name(config) == names_by_kind[kind]


def change_weights(store: ObjectStore, prefix: str) -> None:
    data = store.read(f"{prefix}/{WEIGHTS}")
    write_object(store, f"{prefix}/{WEIGHTS}", data[:-1] + bytes([data[-1] ^ 1]))


def cut_weights(store: ObjectStore, prefix: str) -> None:
    write_object(store, f"{prefix}/{WEIGHTS}", store.read(f"{prefix}/{WEIGHTS}")[:-4])


def change_manifest(store: ObjectStore, prefix: str) -> None:
    write_object(
        store, f"{prefix}/manifest.json", store.read(f"{prefix}/manifest.json").replace(b'"run":1', b'"run":2')
    )


def delete_manifest(store: ObjectStore, prefix: str) -> None:
    store.client.remove_object(BUCKET, f"{prefix}/manifest.json")


def delete_folder(store: ObjectStore, prefix: str) -> None:
    for key in store.keys(f"{prefix}/"):
        store.client.remove_object(BUCKET, key)


CHANGES: dict[str, tuple[Callable[[ObjectStore, str], None], str]] = {
    "weights": (change_weights, f"the sha256 of {WEIGHTS} differs"),
    "cut": (cut_weights, f"{WEIGHTS} is missing or has another size"),
    "manifest": (change_manifest, "the sha256 of its manifest.json is"),
    "gone": (delete_manifest, "is gone"),
    "vanished": (delete_folder, "is gone"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_artifact_that_is_not_what_the_other_job_committed_is_refused(
    name: str, store: ObjectStore, adapter: Path, tmp_path: Path
) -> None:
    prefix = f"changed/{name}"
    artifact = committed(store, adapter, prefix)
    change, told = CHANGES[name]
    change(store, prefix)
    config = RunConfig.model_validate(config_of(store, JOB) | {"adapterArtifact": artifact})
    with pytest.raises(UserError) as refused:
        fetched(config, paths_in(tmp_path, store), tmp_path / "inputs")
    assert str(refused.value).startswith("model.adapter.job: the artifact of job first (s3://")
    assert told in str(refused.value)


@pytest.mark.parametrize("uri", ["", "s3://", "https://elsewhere/x", "s3://b/a/../b", "x\ny"])
def test_a_recorded_address_that_is_none_is_a_sentence(uri: str, store: ObjectStore, tmp_path: Path) -> None:
    artifact = {"uri": uri, "manifestSha256": "ab" * 32, "jobUid": "uid-of-first"}
    config = RunConfig.model_validate(config_of(store, JOB) | {"adapterArtifact": artifact})
    with pytest.raises(UserError, match=r"model\.adapter\.job: the artifact of job first \([^\n]*\) "):
        fetched(config, paths_in(tmp_path, store), tmp_path / "inputs")


def test_a_whole_model_of_another_job_is_refused(store: ObjectStore, tiny_model: Path, tmp_path: Path) -> None:
    artifact = committed(store, tiny_model, "changed/model")
    config = RunConfig.model_validate(config_of(store, JOB) | {"adapterArtifact": artifact})
    with pytest.raises(UserError, match=r"model\.adapter\.job: there is no adapter_config\.json: .* a whole model"):
        fetched(config, paths_in(tmp_path, store), tmp_path / "inputs")


def test_the_same_artifact_in_another_folder_is_the_same_training(
    store: ObjectStore, adapter: Path, tmp_path: Path
) -> None:
    """In a restored cluster the other job has another uid, and its artifact may lie in another folder."""
    found = []
    for prefix in ("twice/a", "twice/b"):
        artifact = committed(store, adapter, prefix) | {"jobUid": prefix}
        config = RunConfig.model_validate(config_of(store, JOB) | {"adapterArtifact": artifact})
        paths = paths_in(tmp_path, store)
        inputs = input_identities(config, paths, object_store(config, paths), tmp_path / "identities")
        found.append((settings_digest(config), inputs["model.adapter"]))
    assert found[0] == found[1]


def test_other_bytes_or_another_use_are_another_training(store: ObjectStore, adapter: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(adapter, changed)
    with_config(lora_alpha=9)(changed)
    paths, found = paths_in(tmp_path, store), set()
    for folder, use in ((adapter, "Continue"), (changed, "Continue"), (adapter, "Merge")):
        store.upload("given/other", folder, replacing=True)
        config = RunConfig.model_validate(config_of(store, {"s3": {"uri": f"s3://{BUCKET}/given/other"}}, use=use))
        inputs = input_identities(config, paths, object_store(config, paths), tmp_path / "identities")
        found.add((settings_digest(config), inputs["model.adapter"]))
    assert len(found) == 3


def test_an_adapter_is_kept_in_the_cache_like_the_base_model(
    store: ObjectStore, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store.upload("given/cached", adapter)
    config = RunConfig.model_validate(config_of(store, {"s3": {"uri": f"s3://{BUCKET}/given/cached"}}))
    paths = paths_in(tmp_path, store)
    paths.model_cache.mkdir()
    fetched(config, paths, tmp_path / "first")
    capfd.readouterr()
    again = fetched(config, paths, tmp_path / "second")
    assert "2 of 2 files came from the cache" in capfd.readouterr().out
    assert (again / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


def checked(config: dict[str, Any], store: ObjectStore, folder: Path) -> PreflightResult:
    folder.mkdir(exist_ok=True)
    paths = paths_in(folder, store)
    paths.run_file.write_text(json.dumps(config))
    return run_program(paths).result


def test_the_program_of_the_check_passes_a_job_with_an_adapter_and_refuses_one_that_does_not_fit(
    store: ObjectStore, adapter: Path, tmp_path: Path
) -> None:
    store.upload("given/checked", adapter)
    config = config_of(store, {"s3": {"uri": f"s3://{BUCKET}/given/checked"}}, name="adapter-checked")
    passed = checked(config, store, tmp_path / "good")
    assert passed.findings == []
    assert any("the adapter names the base model" in notice for notice in passed.notices)
    changed = tmp_path / "changed"
    shutil.copytree(adapter, changed)
    with_config(r=8)(changed)
    store.upload("given/checked", changed, replacing=True)
    (finding,) = checked(config, store, tmp_path / "bad").findings
    assert finding.message.startswith("model.adapter: does not fit the base model: its tensor")


def test_pods_start_from_the_artifact_of_another_job_and_a_changed_adapter_is_found_before_the_next_attempt(
    store: ObjectStore, pods: StartPods, adapter: Path, tmp_path: Path
) -> None:
    artifact = committed(store, adapter, "given/of-job")
    config = config_of(store, JOB, name="adapter-pods", optimization__maxSteps=2) | {"adapterArtifact": artifact}
    attempt = pods(config)
    assert attempt.wait() == [0], attempt.output
    prefix = "runs/default/adapter-pods/uid-1"
    pointer = json.loads(store.read(f"{prefix}/ARTIFACT"))
    manifest = Manifest.model_validate_json(store.read(f"{prefix}/{pointer['folder']}/manifest.json"))
    assert manifest.adapter is not None
    assert (manifest.adapter.source, manifest.adapter.job_uid) == (artifact["uri"], "uid-of-first")
    store.client.remove_object(BUCKET, f"{prefix}/ARTIFACT")
    changed = tmp_path / "changed"
    shutil.copytree(adapter, changed)
    with_config(base_model_name_or_path="another")(changed)
    other = config | {"adapterArtifact": committed(store, changed, "given/of-job-again")}
    (finding,) = checked(other, store, tmp_path / "check").findings
    assert finding.message.startswith("model.adapter: is not what run 1 started from")
