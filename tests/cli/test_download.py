"""`finetune download` fetches an artifact from a real object store. The result is either a complete and verified
folder, or no folder at all."""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path

import pytest

from finetune_cli.bucket.download import artifact_of, download
from finetune_cli.bucket.object_store import AccessKey, ObjectStoreReader, access_key_from
from finetune_core.api.status import ArtifactStatus
from finetune_core.api.storage import StorageSpec
from finetune_core.errors import UserError
from finetune_core.layout import COMMIT, MANIFEST, Manifest, ManifestFile, digest
from tests.cli.stored import job
from tests.trainer.objectstore import ACCESS_KEY, BUCKET, SECRET_KEY, ObjectStore, free_port
from tests.trainer.storeproxy import Fault, proxy_before

FILES = {"adapter_model.safetensors": b"weights" * 400_000, "adapter_config.json": b"{}", "tokenizer/vocab.json": b"[]"}


def spec(store: ObjectStore) -> StorageSpec:
    """Return the storage section of a job that uses ``store``."""
    return StorageSpec.model_validate(
        {"uri": "s3://finetune/runs", "endpoint": store.endpoint, "credentialsSecretRef": {"name": "keys"}}
    )


def put(store: ObjectStore, key: str, content: bytes) -> None:
    """Write an object with ``content`` into the bucket."""
    path = store.credentials / "object"
    path.write_bytes(content)
    store.client.fput_object(BUCKET, key, str(path))


@pytest.fixture
def artifact(store: ObjectStore, request: pytest.FixtureRequest) -> ArtifactStatus:
    """A committed artifact in the bucket. The value of the fixture is the artifact as the job's status describes it."""
    folder = f"runs/{request.node.name}/artifacts/000001"
    for name, content in FILES.items():
        put(store, f"{folder}/{name}", content)
    return commit(store, folder, {name: digest(content) for name, content in FILES.items()})


def commit(store: ObjectStore, folder: str, digests: dict[str, str]) -> ArtifactStatus:
    """Write manifest and COMMIT of an artifact into ``folder``. ``digests`` maps the names of its files to their
    sha256. Return the artifact as the job's status describes it."""
    sizes = {name: len(FILES.get(name, b"")) for name in digests}
    files = [ManifestFile(name=name, bytes=sizes[name], sha256=sha256) for name, sha256 in digests.items()]
    encoded = Manifest(kind="Artifact", run=1, step=100, files=files).encode()
    put(store, f"{folder}/{MANIFEST}", encoded)
    put(store, f"{folder}/{COMMIT}", digest(encoded).encode())
    uri, size = f"s3://{BUCKET}/{folder}", sum(sizes.values())
    return ArtifactStatus(uri=uri, step=100, bytes=size, manifest_sha256=digest(encoded))


@pytest.fixture
def source(store: ObjectStore) -> ObjectStoreReader:
    return ObjectStoreReader(spec(store), AccessKey(ACCESS_KEY, SECRET_KEY))


def key_of(artifact: ArtifactStatus, name: str) -> str:
    """Return the key in the bucket of the artifact's file ``name``."""
    return f"{artifact.uri.removeprefix(f's3://{BUCKET}/')}/{name}"


def leftovers(folder: Path) -> list[str]:
    """Return the names of all files and folders in ``folder``, to find what a download has left there."""
    return [path.name for path in folder.iterdir()]


def test_all_files_arrive_as_they_were_committed(
    artifact: ArtifactStatus, source: ObjectStoreReader, tmp_path: Path
) -> None:
    fetched: list[int] = []
    manifest = download(artifact, source, tmp_path / "adapter", fetched.append)
    for name, content in FILES.items():
        assert (tmp_path / "adapter" / name).read_bytes() == content
    assert digest((tmp_path / "adapter" / MANIFEST).read_bytes()) == artifact.manifest_sha256
    assert sum(fetched) == manifest.total_bytes == artifact.bytes
    assert leftovers(tmp_path) == ["adapter"]


def test_a_changed_byte_is_found(
    store: ObjectStore, artifact: ArtifactStatus, source: ObjectStoreReader, tmp_path: Path
) -> None:
    changed = bytearray(FILES["adapter_model.safetensors"])
    changed[1_000_000] ^= 1
    put(store, key_of(artifact, "adapter_model.safetensors"), bytes(changed))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: is not what was committed"):
        download(artifact, source, tmp_path / "adapter", lambda count: None)
    assert leftovers(tmp_path) == []


def test_a_missing_file_is_named(
    store: ObjectStore, artifact: ArtifactStatus, source: ObjectStoreReader, tmp_path: Path
) -> None:
    store.client.remove_object(BUCKET, key_of(artifact, "adapter_config.json"))
    with pytest.raises(UserError, match=r"adapter_config\.json: it does not exist in the store at http"):
        download(artifact, source, tmp_path / "adapter", lambda count: None)
    assert leftovers(tmp_path) == []


def test_a_manifest_that_the_status_does_not_name_is_refused(
    store: ObjectStore, artifact: ArtifactStatus, source: ObjectStoreReader, tmp_path: Path
) -> None:
    commit(store, key_of(artifact, "").strip("/"), {"adapter_config.json": digest(b"{}")})
    with pytest.raises(UserError, match="is not the manifest that the job's status and COMMIT name"):
        download(artifact, source, tmp_path / "adapter", lambda count: None)


def test_a_folder_without_commit_is_no_artifact(
    store: ObjectStore, artifact: ArtifactStatus, source: ObjectStoreReader, tmp_path: Path
) -> None:
    store.client.remove_object(BUCKET, key_of(artifact, COMMIT))
    with pytest.raises(UserError, match="COMMIT: it does not exist"):
        download(artifact, source, tmp_path / "adapter", lambda count: None)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_never_writes_outside_its_folder(
    store: ObjectStore, source: ObjectStoreReader, tmp_path: Path, name: str
) -> None:
    folder = f"runs/outside-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    with pytest.raises(UserError, match="names a file outside its folder"):
        download(commit(store, folder, {name: digest(b"")}), source, tmp_path / "adapter", lambda count: None)
    assert leftovers(tmp_path) == []


def test_a_folder_that_exists_is_left_alone(
    artifact: ArtifactStatus, source: ObjectStoreReader, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        download(artifact, source, tmp_path / "mine", lambda count: None)
    assert (tmp_path / "mine").read_text() == "mine"


def test_refused_credentials_are_named(store: ObjectStore, artifact: ArtifactStatus, tmp_path: Path) -> None:
    refused = ObjectStoreReader(spec(store), AccessKey(ACCESS_KEY, "wrong-secret"))
    with pytest.raises(UserError, match=f"{store.endpoint}: refused the credentials for s3://finetune/runs/"):
        download(artifact, refused, tmp_path / "adapter", lambda count: None)


def test_an_address_that_nobody_answers_is_named(store: ObjectStore, artifact: ArtifactStatus, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    away = ObjectStoreReader(spec(store), AccessKey(ACCESS_KEY, SECRET_KEY), address)
    with pytest.raises(UserError, match=f"{address}: cannot be reached from here .*--endpoint"):
        download(artifact, away, tmp_path / "adapter", lambda count: None)


def test_a_store_that_asks_for_a_minute_is_asked_again_at_once(
    store: ObjectStore, artifact: ArtifactStatus, tmp_path: Path
) -> None:
    with proxy_before(store.endpoint) as proxy:
        proxy.plan = lambda request: Fault.SLOW_DOWN if request.index == 1 else None
        source = ObjectStoreReader(spec(store), AccessKey(ACCESS_KEY, SECRET_KEY), proxy.endpoint)
        began = time.monotonic()
        download(artifact, source, tmp_path / "adapter", lambda count: None)
        assert time.monotonic() - began < 30
        assert len(proxy.requests) > len(FILES) + 2


@pytest.mark.parametrize("what", ["digest", "read", "fetch"])
def test_a_transfer_that_breaks_off_is_repeated_and_then_named(
    what: str, store: ObjectStore, artifact: ArtifactStatus, tmp_path: Path
) -> None:
    key, content = key_of(artifact, "adapter_model.safetensors"), FILES["adapter_model.safetensors"]
    counted: list[int] = []
    with proxy_before(store.endpoint) as proxy:
        source = ObjectStoreReader(spec(store), AccessKey(ACCESS_KEY, SECRET_KEY), proxy.endpoint)

        def result() -> object:
            if what == "fetch":
                return source.fetch(BUCKET, key, tmp_path / "file", counted.append)
            return source.digest(BUCKET, key) if what == "digest" else source.read(BUCKET, key)

        proxy.plan = lambda request: Fault.CUT_DOWNLOAD if request.index < 2 else None
        expected = {"digest": digest(content), "read": content, "fetch": (len(content), digest(content))}
        assert result() == expected[what]
        assert sum(counted) == (len(content) if what == "fetch" else 0)
        proxy.plan = lambda _request: Fault.CUT_DOWNLOAD
        with pytest.raises(UserError, match=re.escape(f"s3://{BUCKET}/{key}: broke off 3 times")):
            result()


@pytest.mark.parametrize("address", ["minio:9000", "ftp://minio", "http://", "http://minio/path"])
def test_an_endpoint_that_is_no_address_is_refused(store: ObjectStore, address: str) -> None:
    with pytest.raises(UserError, match="must be an address of the form"):
        ObjectStoreReader(spec(store), AccessKey(ACCESS_KEY, SECRET_KEY), address)


def test_a_job_without_an_artifact_says_its_state() -> None:
    with pytest.raises(UserError, match="research/quickstart: has no artifact: its state is Running"):
        artifact_of(job("running"))


def test_half_an_access_key_is_none() -> None:
    assert access_key_from({"AWS_ACCESS_KEY_ID": "a"}) is None
    assert access_key_from({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}) == AccessKey("a", "b")
