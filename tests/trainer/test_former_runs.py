"""The preflight check finds the run of a former job with the same namespace, name and training. It finds no other run,
unless the job names the folder of that run.

One real job is trained. Most tests copy the folder of this job in the bucket to a job name of their own, change
something in the copy, and then check a job with this name and another uid. The object store is a real MinIO.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from minio.commonconfig import CopySource

from finetune_core.api.sources import HuggingFaceDataSource
from finetune_core.contract import RunConfig
from finetune_core.contract.preflight_result import FoundRun, PreflightResult
from finetune_core.errors import UserError
from finetune_core.layout import COMMIT, MANIFEST
from finetune_trainer.checkpoints.resume import start_run
from finetune_trainer.pod.settings import Paths
from finetune_trainer.preflight import entrypoint
from finetune_trainer.preflight.findings import Findings
from finetune_trainer.preflight.former_run import EVALUATION_BYTES, MANIFEST_BYTES
from finetune_trainer.sources.file_tags import PIECE_BYTES, WHOLE_BYTES, file_tag
from finetune_trainer.sources.hub_datasets import HubDataFiles
from finetune_trainer.sources.identities import input_identities
from finetune_trainer.storage.lineage import RunRecord, claim_run_number, read_records
from finetune_trainer.storage.root import RunRoot, object_store
from tests.trainer import data_hub
from tests.trainer.hub import TOKEN, running_hub
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.pods import run_config, start_pods
from tests.trainer.test_recovery import root_of
from tests.trainer.test_start import identity

pytestmark = pytest.mark.gang

TRAINED = "former-trained"
FORMER, NEW = "uid-1", "uid-2"


@pytest.fixture(scope="module")
def trained(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a job that the real trainer has trained: it has two checkpoints and an artifact."""
    attempt = start_pods(
        run_config(store, TRAINED, world__nodes=1),
        tmp_path_factory.mktemp("trained"),
        credentials=store.credentials,
        forked=True,
    )
    try:
        assert attempt.wait() == [0], attempt.output
    finally:
        attempt.end()
    return TRAINED


class Bucket:
    """The folder in the bucket for all jobs of one name, which a test fills and changes."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.store, self.name = store, name

    def add(self, run_id: str = FORMER, *, artifact: bool = True) -> None:
        """Copy the trained job's folder to the folder ``run_id``. Without ``artifact`` the copy looks like the folder
        of an unfinished job."""
        source = f"runs/default/{TRAINED}/{FORMER}/"
        for key in self.store.keys(source):
            if not artifact and re.match(r"(ARTIFACT|artifacts/|evaluation/)", key.removeprefix(source)):
                continue
            target = f"runs/default/{self.name}/{run_id}/{key.removeprefix(source)}"
            self.store.client.copy_object(BUCKET, target, CopySource(BUCKET, key))

    def root(self, run_id: str = FORMER) -> RunRoot:
        root = root_of(self.store, self.name)
        location = root.location._replace(prefix=f"runs/default/{self.name}/{run_id}")
        return RunRoot(root.store, location)

    def change_record(self, change: Callable[[dict[str, Any]], object], run_id: str = FORMER) -> None:
        """Write the record of run 1 anew, after ``change`` has changed its content."""
        content = json.loads(self.root(run_id).read("runs/000001.json") or b"")
        change(content)
        self.root(run_id).write("runs/000001.json", json.dumps(content).encode())


@pytest.fixture
def bucket(store: ObjectStore, trained: str, tmp_path: Path) -> Bucket:
    return Bucket(store, f"former-{tmp_path.name}".replace("_", "-"))


Check = Callable[..., PreflightResult]


@pytest.fixture
def check(store: ObjectStore, bucket: Bucket, tmp_path: Path) -> Check:
    """A function that runs the preflight check of a new job with the name of ``bucket``, and returns the check's
    result."""

    def run(*, run_id: str = NEW, **changes: Any) -> PreflightResult:
        paths = Paths(
            run_file=tmp_path / "run.json",
            credentials=store.credentials,
            storage_ca_file=tmp_path / "no-ca",
            scratch=tmp_path / "scratch",
            volumes=tmp_path / "volumes",
        )
        uri = f"s3://{BUCKET}/runs/default/{bucket.name}/{run_id}"
        config = run_config(store, bucket.name, **({"world__nodes": 1, "storage__uri": uri} | changes))
        paths.run_file.write_text(json.dumps(config))
        findings = Findings()
        entrypoint.run_checks(findings, paths, uid=NEW)
        return findings.result

    return run


def found(result: PreflightResult) -> FoundRun:
    assert (result.findings, result.found is not None) == ([], True), result
    assert result.found is not None
    return result.found


def test_the_committed_artifact_of_the_same_training_is_found(bucket: Bucket, check: Check) -> None:
    bucket.add()
    run = found(check())
    assert (run.run_id, run.uid, run.step) == (FORMER, FORMER, 6)
    assert run.artifact is not None
    assert run.artifact.run == 1
    assert run.evaluation is not None
    assert PreflightResult.from_termination_message(check().to_termination_message()) is not None


@pytest.mark.parametrize("artifact", [True, False])
def test_the_date_of_chat_templates_is_found_with_a_run_and_does_not_define_the_training(
    artifact: bool, bucket: Bucket, check: Check
) -> None:
    bucket.add(artifact=artifact)
    assert found(check()).template_date is None
    bucket.change_record(lambda content: content["training"].update(templateDate="2026-11-03"))
    run = found(check(template_date="2026-11-29"))
    assert run.template_date == date(2026, 11, 3)


def test_a_run_that_is_not_finished_is_found_with_its_newest_checkpoint(bucket: Bucket, check: Check) -> None:
    bucket.add(artifact=False)
    run = found(check())
    assert (run.run_id, run.step, run.artifact) == (FORMER, 6, None)
    bucket.root().delete([f"checkpoints/000001-000000006/{COMMIT}"])
    assert 0 < found(check()).step < 6, "without COMMIT a checkpoint does not count"


@pytest.mark.parametrize(
    "change",
    [
        {"optimization__seed": 43},
        {"optimization__learningRate": 2e-3},
        {"optimization__maxSteps": 7},
        {"lora": {"rank": 8, "alpha": 8}},
        {"dataset__maxLength": 63},
        {"dataset__test": {"s3": {"uri": f"s3://{BUCKET}/data/validation.jsonl"}}},
        {"dataset__train": {"s3": {"uri": f"s3://{BUCKET}/data/validation.jsonl"}}},
        {"evaluation__artifactFrom": "Best"},
        {"storage__artifact": "Merged"},
        {"model__addedTokens": ["<X>"]},
    ],
    ids=str,
)
def test_another_training_is_begun_anew(change: dict[str, Any], bucket: Bucket, check: Check) -> None:
    bucket.add()
    assert check(**change).found is None


@pytest.mark.parametrize(
    "change",
    [
        {"world__nodes": 4},
        {"optimization__microBatchSize": 1},
        {"optimization__zeroStage": 3},
        {"optimization__gradientCheckpointing": True},
        {"storage__checkpointEverySteps": 100},
        {"storage__keepLast": 7},
    ],
    ids=str,
)
def test_the_same_training_on_other_machines_is_found(change: dict[str, Any], bucket: Bucket, check: Check) -> None:
    bucket.add()
    assert found(check(**change)).run_id == FORMER


@pytest.mark.parametrize("what", ["train.jsonl", "validation.jsonl", "model.safetensors", "tokenizer.json"])
def test_with_changed_data_or_another_base_it_trains_anew_by_itself(
    what: str, bucket: Bucket, check: Check, store: ObjectStore
) -> None:
    bucket.add()
    (key,) = [key for folder in ("data/", "models/tiny/") for key in store.keys(folder) if key.endswith(what)]
    original = store.read(key)
    root = bucket.root()
    # JSON and JSON Lines allow a space at the end. Of the weights, one bit of the last value changes.
    changed = original + b" " if what != "model.safetensors" else original[:-1] + bytes([original[-1] ^ 1])
    try:
        root.store.write(BUCKET, key, changed)
        result = check()
        assert (result.findings, result.found) == ([], None)
    finally:
        root.store.write(BUCKET, key, original)
    assert found(check()).run_id == FORMER, "the content counts, not the time at which it was written"


def test_missing_data_is_a_finding_and_no_reason_to_train_or_to_settle(bucket: Bucket, check: Check) -> None:
    absent = {"s3": {"uri": f"s3://{BUCKET}/data/absent.jsonl"}}
    bucket.add()
    result = check(dataset__train=absent)
    assert result.found is None
    assert [finding.message for finding in result.findings] == [
        f"dataset.train.s3.uri: there is no object s3://{BUCKET}/data/absent.jsonl"
    ]


def test_a_finished_run_comes_before_newer_ones_and_the_newest_before_older_ones(bucket: Bucket, check: Check) -> None:
    bucket.add("older", artifact=False)
    _let_a_second_pass(bucket)
    bucket.add("newer", artifact=False)
    assert found(check()).run_id == "newer"
    bucket.add("done")
    _let_a_second_pass(bucket)
    bucket.add("again", artifact=False)
    assert found(check()).run_id == "done"


def _let_a_second_pass(bucket: Bucket) -> None:
    """Write an object again and again until the store records a later second as the time of the change."""
    root, first = bucket.root("clock"), None
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        root.write("tick", b"")
        modified = root.list_objects("tick")[0].modified.replace(microsecond=0)
        first = first or modified
        if modified > first:
            return
    raise AssertionError("the clock of the object store stands still")


def test_a_chosen_folder_is_not_searched_beside_and_is_found_as_it_is(bucket: Bucket, check: Check) -> None:
    bucket.add()
    assert check(run_id="chosen").found is None
    bucket.add("chosen", artifact=False)
    assert found(check(run_id="chosen")).run_id == "chosen"
    # Where a person names a folder, the job takes over the run in it, whatever the run was trained with.
    bucket.add("other")
    assert found(check(run_id="other", optimization__seed=7)).run_id == "other"


def test_a_job_that_has_begun_keeps_its_own_folder(bucket: Bucket, check: Check) -> None:
    bucket.add()
    assert claim_run_number(bucket.root(NEW), 1, RunRecord(attempt=1, pod_uid="pod", uid=NEW))
    assert check().found is None


PLANTS: dict[str, Callable[[Bucket], object]] = {
    "no record": lambda bucket: bucket.root().delete(["runs/000001.json"]),
    "a record of an older version": lambda bucket: bucket.change_record(lambda record: record.pop("training")),
    "a record that is no JSON": lambda bucket: bucket.root().write("runs/000001.json", b"{"),
    "a record that is too long": lambda bucket: bucket.change_record(lambda record: record.update(x="y" * 300_000)),
    "a second run on other data": lambda bucket: claim_run_number(
        bucket.root(), 2, read_records(bucket.root())[1].model_copy(update={"training": None})
    ),
    "a uid with a line break": lambda bucket: bucket.change_record(lambda record: record.update(uid="a\nb")),
    "a uid that is too long": lambda bucket: bucket.change_record(lambda record: record.update(uid="u" * 65)),
    "an artifact elsewhere": lambda bucket: bucket.root().write(
        "ARTIFACT", (bucket.root().read("ARTIFACT") or b"").replace(b"artifacts/000001", b"../../other/artifacts")
    ),
    "an artifact without its COMMIT": lambda bucket: bucket.root().delete([f"artifacts/000001/{COMMIT}"]),
    "an artifact without a file": lambda bucket: bucket.root().delete(["artifacts/000001/adapter_model.safetensors"]),
    "a manifest that is too long": lambda bucket: bucket.root().write(
        f"artifacts/000001/{MANIFEST}", b" " * (MANIFEST_BYTES + 1)
    ),
    "an ARTIFACT that is no JSON": lambda bucket: bucket.root().write("ARTIFACT", b"[]"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_folder_that_is_not_whole_is_left_alone_and_holds_nothing_up(name: str, bucket: Bucket, check: Check) -> None:
    bucket.add()
    PLANTS[name](bucket)
    result = check()
    assert (result.findings, result.found) == ([], None)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
@pytest.mark.parametrize("key", ["ARTIFACT", "evaluation/000001.json"])
def test_a_malformed_object_in_the_own_folder_is_a_finding(
    key: str, content: bytes, bucket: Bucket, check: Check
) -> None:
    bucket.add(NEW)
    bucket.root(NEW).write(key, content)
    assert [finding.message for finding in check().findings if "malformed" in finding.message]


def test_scores_that_are_too_long_are_left_out(bucket: Bucket, check: Check) -> None:
    bucket.add()
    bucket.root().write("evaluation/000001.json", b" " * (EVALUATION_BYTES + 1))
    assert found(check()).evaluation is None


def test_many_former_jobs_are_looked_through_in_seconds(bucket: Bucket, check: Check) -> None:
    bucket.add()
    for number in range(200):
        root = bucket.root(f"other-{number}")
        assert claim_run_number(root, 1, RunRecord(attempt=1, pod_uid="pod", uid=f"other-{number}"))
    assert found(check()).run_id == FORMER


def test_of_two_jobs_with_one_folder_the_later_one_keeps_it(bucket: Bucket, tmp_path: Path) -> None:
    """Two clusters with one bucket: the restored job takes the run over, and the first job must not take it back."""
    bucket.add(artifact=False)
    root, first = bucket.root(), identity("pod-2").model_copy(update={"uid": FORMER})
    second = identity("pod-3").model_copy(update={"uid": NEW})
    assert start_run(root, first, tmp_path / "resume").run == 2
    assert start_run(root, second, tmp_path / "resume").run == 3
    assert start_run(root, second, tmp_path / "resume").run == 4
    with pytest.raises(UserError, match=f"uid {NEW} has taken this run over"):
        start_run(root, first, tmp_path / "resume")
    assert start_run(root, identity("pod-4").model_copy(update={"uid": "uid-3"}), tmp_path / "resume").run == 5
    with pytest.raises(UserError, match="uid uid-3 has taken this run over"):
        start_run(root, second, tmp_path / "resume")


def test_files_on_a_volume_are_told_apart_by_their_content(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"rows")
    tag = file_tag(small)
    os.utime(small, ns=(1, 1))
    assert file_tag(small) == tag
    small.write_bytes(b"Rows")
    assert file_tag(small) != tag

    with large.open("wb") as file:
        file.truncate(WHOLE_BYTES + 1)
    os.utime(large, ns=(1, 1))
    tag = file_tag(large)
    for position in (0, WHOLE_BYTES, PIECE_BYTES // 2):
        with large.open("r+b") as file:
            file.seek(position)
            file.write(b"x")
        os.utime(large, ns=(1, 1))
        assert file_tag(large) != tag, position
        tag = file_tag(large)
    with large.open("r+b") as file:
        file.seek(PIECE_BYTES * 2)
        file.write(b"x")
    assert file_tag(large) != tag, "the time tells of a change between the pieces that are read"


def test_files_on_the_hub_are_told_apart_by_their_content_and_not_by_the_commit(
    store: ObjectStore, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(tiny_model, folder)
    (tmp_path / "token").write_text(TOKEN)
    paths = Paths(credentials=store.credentials, storage_ca_file=tmp_path / "no-ca", hub_token_file=tmp_path / "token")
    config = RunConfig.model_validate(
        run_config(store, "hub", world__nodes=1, model={"huggingFace": {"repo": "team/tiny"}})
    )
    opened = object_store(config, paths)
    with running_hub({"team/tiny": folder}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        first = input_identities(config, paths, opened, tmp_path / "hub")
        (folder / "README.md").write_text("a new commit, and the same model")
        assert input_identities(config, paths, opened, tmp_path / "hub") == first
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
        changed = input_identities(config, paths, opened, tmp_path / "hub")
        assert not [request for request in hub.requests if "/resolve/" in request], "nothing is downloaded"
    assert {name for name in first if first[name] != changed[name]} == {"model"}

    data = data_hub.Hub("acme/rows", {"train.jsonl": b"{}", "test.jsonl": b"{}"})
    split = HuggingFaceDataSource(repo="acme/rows", split="train")
    with data_hub.served(data):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", data.endpoint)

        def tags() -> list[str]:
            found = HubDataFiles(split, "dataset.train", None, tmp_path / "train")
            return [found.tag(file) for file in found.files]

        before = tags()
        data.files["test.jsonl"] = b"[]"
        assert tags() == before
        data.files["train.jsonl"] = b"[]"
        assert tags() != before
