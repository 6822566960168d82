"""Before its first step, a run tries the export of its artifact without the weights, so that no training is lost at the
export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from minio.credentials import AssumeRoleProvider
from transformers import GenerationConfig

from finetune_core.contract import Identity, RunConfig
from finetune_core.errors import UserError
from finetune_trainer.checkpoints.rehearsal import rehearse_export
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.model.structure import read_structure
from finetune_trainer.model.tensor_names import TensorNames
from finetune_trainer.model.weight_files import WeightFiles
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import Paths
from finetune_trainer.preparation import prepare_node
from tests.trainer import tiny
from tests.trainer.conftest import StartPods
from tests.trainer.exporting import options_of
from tests.trainer.families import write_family
from tests.trainer.objectstore import ACCESS_KEY, BUCKET, SECRET_KEY, ObjectStore, write_credentials
from tests.trainer.pods import run_config

WITHOUT_DO_SAMPLE = {"eos_token_id": 1, "temperature": 0.9, "top_p": 0.6}
"""The generation configuration of some models of the Llama 2 kind. transformers reads such a configuration, but refuses
to save it after a change."""
TWO_ENDS = {"do_sample": True, "temperature": 0.7, "eos_token_id": [1, 5]}
DOCUMENTED = ["GetObject", "PutObject", "DeleteObject", "ListBucketMultipartUploads", "AbortMultipartUpload"]
"""The actions that docs/storage.md asks for, beside ListBucket."""


def put_base(store: ObjectStore, folder: Path, name: str, generation: dict[str, Any]) -> dict[str, Any]:
    """Upload a tiny model with the given generation configuration, and return the model's source."""
    base = tiny.write_model(folder / name)
    (base / "generation_config.json").write_text(json.dumps(generation))
    store.upload(f"models/{name}", base)
    return {"s3": {"uri": f"s3://{BUCKET}/models/{name}"}}


def fetched(store: ObjectStore, name: str, target: Path, file: str = "generation_config.json") -> Path:
    """Fetch a file of the artifact of run 1 of the job ``name`` into the folder ``target``, and return the folder."""
    target.mkdir(parents=True, exist_ok=True)
    (target / Path(file).name).write_bytes(store.read(f"runs/default/{name}/uid-1/artifacts/000001/{file}"))
    return target


def saves_after_a_change(folder: Path) -> GenerationConfig:
    """Load the generation configuration in ``folder`` as a user does, change and save it, and return it."""
    config = GenerationConfig.from_pretrained(folder)
    config.max_new_tokens = 7
    config.save_pretrained(folder / "changed")
    return config


def test_a_full_run_whose_base_samples_without_do_sample_is_exported(
    store: ObjectStore, pods: StartPods, tmp_path: Path
) -> None:
    source = put_base(store, tmp_path, "without-do-sample", WITHOUT_DO_SAMPLE)
    changes = {"method": "Full", "model": {**source, "addedTokens": ["<END_A>"]}, "optimization__maxSteps": 2}
    suffix = {"dataset__format__promptCompletion__completionSuffix": "<END_A>"}
    attempt = pods(run_config(store, "f1-full", world__nodes=1, **changes, **suffix), forked=True)
    assert attempt.wait() == [0], attempt.output
    config = saves_after_a_change(fetched(store, "f1-full", tmp_path / "full"))
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.9, 0.6)
    assert config.eos_token_id == [1, 64]
    assert "has temperature 0.9, top_p 0.6 without do_sample; the artifact has do_sample true" in attempt.output


def test_every_artifact_of_a_lora_run_stops_where_the_base_model_stops(
    store: ObjectStore, pods: StartPods, tmp_path: Path
) -> None:
    source = put_base(store, tmp_path, "two-ends", TWO_ENDS)
    changes = {"model": source, "storage__artifact": "Both", "optimization__maxSteps": 2}
    attempt = pods(run_config(store, "f1-lora", world__nodes=1, **changes), forked=True)
    assert attempt.wait() == [0], attempt.output
    for number, file in enumerate(("generation_config.json", "merged/generation_config.json")):
        config = saves_after_a_change(fetched(store, "f1-lora", tmp_path / f"lora-{number}", file))
        assert config.eos_token_id == [1, 5]


def restricted(store: ObjectStore, folder: Path, actions: Sequence[str], *, below: Sequence[str]) -> Path:
    """Return a folder with credentials that may read models and data, list the bucket, and do ``actions`` with the
    objects whose keys fit ``below``."""
    statements = [
        {"Effect": "Allow", "Action": [f"s3:{action}" for action in actions], "Resource": resources}
        for actions, resources in (
            (["ListBucket", "ListBucketMultipartUploads"], [f"arn:aws:s3:::{BUCKET}"]),
            (["GetObject"], [f"arn:aws:s3:::{BUCKET}/models/*", f"arn:aws:s3:::{BUCKET}/data/*"]),
            ([a for a in actions if a != "ListBucketMultipartUploads"], [f"arn:aws:s3:::{BUCKET}/{p}" for p in below]),
        )
    ]
    session = AssumeRoleProvider(
        sts_endpoint=store.endpoint,
        access_key=ACCESS_KEY,
        secret_key=SECRET_KEY,
        duration_seconds=3600,
        policy=json.dumps({"Version": "2012-10-17", "Statement": statements}),
    ).retrieve()
    assert session.session_token
    write_credentials(folder, session.access_key, session.secret_key)
    (folder / "AWS_SESSION_TOKEN").write_text(session.session_token)
    return folder


def test_the_documented_permissions_are_enough_and_the_rehearsal_leaves_nothing_behind(
    store: ObjectStore, pods: StartPods, tmp_path: Path
) -> None:
    keys = restricted(store, tmp_path / "keys", DOCUMENTED, below=["runs/*"])
    changes = {"model": {"s3": {"uri": f"s3://{BUCKET}/models/tiny"}, "addedTokens": ["<A>"]}}
    attempt = pods(
        run_config(store, "permitted", world__nodes=1, optimization__maxSteps=2, **changes),
        credentials=keys,
        forked=True,
    )
    assert attempt.wait() == [0], attempt.output
    manifest = json.loads(store.read("runs/default/permitted/uid-1/artifacts/000001/manifest.json"))
    assert {"README.md", "adapter_config.json"} <= {file["name"] for file in manifest["files"]}
    assert store.read("runs/default/permitted/uid-1/artifacts/000001/README.md").startswith(b"---\n")
    assert "runs/_bases/rehearsal" not in store.keys("runs/_bases/")


def test_a_store_that_does_not_take_the_artifact_ends_the_attempt_before_its_first_step(
    store: ObjectStore, pods: StartPods, tmp_path: Path
) -> None:
    own = "runs/default/not-permitted/uid-1"
    allowed = [f"{own}/{folder}/*" for folder in ("runs", "metrics", "checkpoints", "evaluation", "preflight")]
    keys = restricted(store, tmp_path / "keys", DOCUMENTED, below=[*allowed, f"{own}/ARTIFACT"])
    attempt = pods(run_config(store, "not-permitted", world__nodes=1), credentials=keys, forked=True)
    assert attempt.wait() == [75]
    assert "Traceback" not in attempt.output
    assert attempt.pods[0].result.message.startswith("storage.")
    assert not [key for key in store.keys(f"{own}/") if "/checkpoints/" in key or "/metrics/" in key]


def test_a_store_that_does_not_delete_is_told_about_and_gets_the_artifact(
    store: ObjectStore, pods: StartPods, tmp_path: Path
) -> None:
    actions = [action for action in DOCUMENTED if action != "DeleteObject"]
    keys = restricted(store, tmp_path / "keys", actions, below=["runs/*"])
    attempt = pods(
        run_config(store, "no-delete", world__nodes=1, optimization__maxSteps=2), credentials=keys, forked=True
    )
    assert attempt.wait() == [0], attempt.output
    assert "which tested the store, can't be deleted" in attempt.output
    assert store.read("runs/default/no-delete/uid-1/artifacts/000001/README.md").startswith(b"---\n")


def plan_of(store: ObjectStore, base: Path, folder: Path, **changes: Any) -> WorkerPlan:
    """Return the plan of a worker that trains the model in ``base``."""
    identity = Identity(namespace="n", name="n", uid="u", attempt=1, pod_name="p", pod_uid="p", node_rank=0)
    return WorkerPlan(
        paths=Paths(),
        identity=identity,
        config=RunConfig.model_validate(run_config(store, "rehearsed", dataset__validation=None, **changes)),
        inputs=Inputs(model=base, train=tiny.write_jsonl(folder / "train.jsonl", tiny.rows(4, seed=1))),
        folder=folder / "attempt",
    )


def test_a_generation_configuration_that_can_not_be_read_is_bad_input_before_a_model_is_loaded(
    store: ObjectStore, tmp_path: Path
) -> None:
    base = tiny.write_model(tmp_path / "base")
    (base / "generation_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"^model: its generation_config\.json can't be used"):
        prepare_node(plan_of(store, base, tmp_path), graded=())


def test_an_adapter_that_can_not_be_merged_is_bad_input_before_a_model_is_loaded(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_family("mixtral", tmp_path / "base")

    def no_way_back(*_: object) -> object:
        raise ValueError("no way back")

    monkeypatch.setattr("finetune_trainer.model.tensor_names.revert_weight_conversion", no_way_back)
    plan = plan_of(store, base, tmp_path, storage__artifact="Merged")
    with pytest.raises(UserError, match=r"^storage\.artifact: must be Adapter: .* no way back$"):
        prepare_node(plan, graded=())
    (tmp_path / "again").mkdir()
    assert prepare_node(plan_of(store, base, tmp_path / "again"), graded=()).context == 64


def test_a_rehearsal_reads_no_weight_and_leaves_no_file(tmp_path: Path) -> None:
    base = write_family("qwen3-moe", tmp_path / "base")
    structure, shapes = read_structure(base), WeightFiles.of(base).shapes
    (base / "model.safetensors").unlink()
    options = options_of(base, names=TensorNames(structure.model, shapes))
    trained = [name for name, _ in structure.model.named_parameters()]
    before = sorted(tmp_path.rglob("*"))
    assert rehearse_export(load_tokenizer(base), options, trained, tmp_path / "scratch") == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_that_is_another_one_after_it_was_saved_is_bad_input(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tokenizer = load_tokenizer(base)
    tokenizer.save_pretrained = lambda folder: load_tokenizer(base).save_pretrained(folder)
    tokenizer.add_tokens(["<LOST>"])
    with pytest.raises(UserError, match=r"^model: its tokenizer can't be exported: it has another number of tokens"):
        rehearse_export(tokenizer, options_of(base), [], tmp_path / "scratch")
