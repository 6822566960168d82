"""`resolve` makes the run file of a job, and chooses the defaults that depend on other fields. It refuses a job that
can't be run, with the path of the field."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_core.api import FineTuneJob
from finetune_core.errors import UserError
from finetune_core.planning.training_plan import micro_batch_size, total_steps, zero_stage
from finetune_core.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]


def job(**sections: dict[str, Any]) -> FineTuneJob:
    """Return the quickstart job with some fields of sections replaced. ``sections`` maps the name of a section to its
    new fields. The value None removes a field."""
    document = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8"))
    document["metadata"]["uid"] = "1234"
    for section, fields in sections.items():
        document["spec"].setdefault(section, {})
        document["spec"][section] = {
            key: value for key, value in {**document["spec"][section], **fields}.items() if value is not None
        }
    return FineTuneJob.model_validate(document)


def test_defaults_by_method() -> None:
    lora = resolve(job(training={"learningRate": None}), report=None)
    assert lora.optimization.learning_rate == 1e-4
    document = job(training={"learningRate": None}).model_dump(by_alias=True, exclude_none=True)
    document["spec"]["method"] = "Full"
    del document["spec"]["lora"]
    full = resolve(FineTuneJob.model_validate(document), report=None)
    assert full.optimization.learning_rate == 5e-6
    assert full.lora is None


def test_the_run_lies_below_namespace_name_and_uid() -> None:
    assert resolve(job(), report=None).storage.uri == "s3://finetune/runs/default/quickstart/1234"
    again = resolve(job(storage={"runId": "study-1"}), report=None)
    assert again.storage.uri == "s3://finetune/runs/default/quickstart/study-1"


def test_best_needs_a_validation_set() -> None:
    assert resolve(job(), report=None).evaluation.artifact_from == "Best"
    assert resolve(job(dataset={"validation": None}), report=None).evaluation.artifact_from == "Last"


def test_a_run_file_survives_the_wire() -> None:
    config = resolve(job(), report=None)
    assert type(config).model_validate_json(config.to_json()) == config


def test_a_micro_batch_beyond_its_share_is_named() -> None:
    with pytest.raises(UserError, match=r"spec\.training\.microBatchSize: must be at most 8"):
        resolve(job(training={"microBatchSize": 9}), report=None)


@pytest.mark.parametrize(
    ("requested", "processes", "lora", "configured", "stage"),
    [
        ("Auto", 1, True, False, None),
        ("Auto", 1, True, True, 2),
        ("Auto", 1, False, False, 2),
        ("Auto", 2, True, False, 2),
        ("Auto", 2, False, False, 2),
        ("None", 1, False, False, None),
        (0, 2, True, False, 0),
        (3, 1, True, False, 3),
    ],
)
def test_zero_stage(requested: int | str, processes: int, lora: bool, configured: bool, stage: int | None) -> None:
    assert zero_stage(requested, processes=processes, lora=lora, configured=configured) == stage


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({}, None),
        ({"method": "Full"}, 2),
        ({"deepspeed": {"zeroStage": "None"}, "method": "Full"}, None),
        ({"deepspeed": {"offloadOptimizer": "CPU"}}, 2),
        ({"deepspeed": {"overrides": '{"steps_per_print": 10}'}}, 2),
    ],
)
def test_one_process_uses_deepspeed_where_the_job_asks_for_it(changes: dict[str, Any], stage: int | None) -> None:
    document = job().model_dump(by_alias=True, exclude_none=True)
    document["spec"] |= changes
    document["spec"]["resources"] |= {"nodes": 1}
    if changes.get("method") == "Full":
        del document["spec"]["lora"]
    assert resolve(FineTuneJob.model_validate(document), report=None).optimization.zero_stage == stage


def test_micro_batch_covers_the_share() -> None:
    assert micro_batch_size(None, global_batch_size=3, processes=2) == 2
    assert micro_batch_size(None, global_batch_size=64, processes=2) == 8
    assert micro_batch_size(1, global_batch_size=64, processes=2) == 1


def test_the_last_batch_of_an_epoch_counts() -> None:
    assert total_steps(rows=33, global_batch_size=16, epochs=2, max_steps=None) == 6
    assert total_steps(rows=33, global_batch_size=16, epochs=None, max_steps=7) == 7


def test_accumulation_leaves_the_micro_batch() -> None:
    assert micro_batch_size(None, accumulation_steps=4, global_batch_size=64, processes=2) == 8


def test_checkpoints_come_every_hundred_steps_unless_said_otherwise() -> None:
    assert resolve(job(storage={"checkpoint": {}}), report=None).storage.checkpoint_every_steps == 100
    assert resolve(job(storage={"checkpoint": {"everySteps": 7}}), report=None).storage.checkpoint_every_steps == 7


def test_storage_reaches_the_run_file() -> None:
    plain = resolve(job(), report=None).storage
    assert (plain.credentials, plain.addressing, plain.encryption, plain.keep_best) == ("Secret", None, None, 1)
    strict = resolve(
        job(
            storage={
                "credentialsSecretRef": None,
                "addressing": "VirtualHosted",
                "encryption": {"kms": {"keyId": "key"}},
                "checkpoint": {"everyMinutes": 5, "keepLast": 3, "keepBest": 2},
            }
        ),
        report=None,
    ).storage
    assert (strict.credentials, strict.addressing) == ("Identity", "VirtualHosted")
    assert strict.encryption is not None
    assert strict.encryption.kms is not None
    assert strict.encryption.kms.key_id == "key"
    assert (strict.checkpoint_every_steps, strict.checkpoint_every_minutes) == (None, 5)
    assert (strict.keep_last, strict.keep_best) == (3, 2)
