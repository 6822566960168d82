"""The field `model.adapter`: what is refused before anything runs, what the run file says, and what defines the
training."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_core.api.job import FineTuneJob
from finetune_core.api.status import AdapterStatus
from finetune_core.contract import AdapterArtifact, RunConfig
from finetune_core.contract.same_training import settings_digest
from finetune_core.resolve import resolve
from finetune_core.validation.validate_job import validate_job
from tests.core.jobs import quickstart, set_at

JOB: dict[str, Any] = {"job": {"name": "first"}, "use": "Continue"}
S3: dict[str, Any] = {"s3": {"uri": "s3://finetune/adapters/first"}, "use": "Continue"}
HUB: dict[str, Any] = {"huggingFace": {"repo": "team/adapter"}, "use": "Merge"}
VOLUME: dict[str, Any] = {"volume": {"claimName": "claim", "path": "adapter"}, "use": "Merge"}


def document(adapter: dict[str, Any] | None, **spec: Any) -> dict[str, Any]:
    """Return the quickstart with the adapter. ``spec`` changes fields of the spec, with `__` for a dot."""
    made = quickstart("model.adapter", adapter)
    for path, value in spec.items():
        set_at(made["spec"], path.split("__"), value)
    return made


def problems(adapter: dict[str, Any], **spec: Any) -> list[str]:
    return [str(problem) for problem in validate_job(document(adapter, **spec)).problems]


def run_file(adapter: dict[str, Any] | None, found: AdapterStatus | None = None, **spec: Any) -> RunConfig:
    return resolve(FineTuneJob.model_validate(document(adapter, **spec)), report=None, adapter=found)


@pytest.mark.parametrize("adapter", [JOB, S3, HUB, VOLUME], ids=["job", "s3", "hub", "volume"])
def test_an_adapter_of_every_source_is_valid(adapter: dict[str, Any]) -> None:
    assert problems(adapter) == []


def test_a_full_training_can_merge_an_adapter() -> None:
    assert problems(HUB, method="Full", lora=None) == []


@pytest.mark.parametrize(
    ("adapter", "spec", "sentence"),
    [
        (JOB, {"method": "Full", "lora": None}, "`model.adapter.use` must be Merge unless `method` is LoRA"),
        ({"use": "Merge"}, {}, "exactly one of `huggingFace`, `s3`, `volume`, `job` must be set"),
        (JOB | S3, {}, "exactly one of `huggingFace`, `s3`, `volume`, `job` must be set"),
        ({"job": {"name": "first"}}, {}, "spec.model.adapter.use"),
        (JOB | {"use": "Stack"}, {}, "spec.model.adapter.use"),
        (JOB | {"job": {"name": "quickstart"}}, {}, "spec.model.adapter.job.name: must name another job"),
        (JOB | {"job": {"name": "other/first"}}, {}, "spec.model.adapter.job.name"),
        (JOB | {"job": {"name": "first", "namespace": "other"}}, {}, "unknown field"),
        (S3 | {"s3": {"uri": "bucket/key"}}, {}, "spec.model.adapter.s3.uri"),
    ],
    ids=str,
)
def test_what_can_not_be_meant_is_a_sentence_with_the_field(
    adapter: dict[str, Any], spec: dict[str, Any], sentence: str
) -> None:
    assert any(sentence in problem for problem in problems(adapter, **spec)), problems(adapter, **spec)


def test_the_run_file_names_the_artifact_that_the_operator_has_found() -> None:
    found = AdapterStatus(use="Continue", source="s3://b/artifacts/000001", job_uid="uid", manifest_sha256="ab" * 32)
    wanted = AdapterArtifact(uri="s3://b/artifacts/000001", manifest_sha256="ab" * 32, job_uid="uid")
    assert run_file(JOB, found).adapter_artifact == wanted
    assert run_file(S3, found).adapter_artifact is None


def test_new_adapters_have_default_settings_and_a_continued_one_keeps_what_the_job_leaves_out() -> None:
    for adapter, wanted in ((None, (8, 16, None)), (HUB, (8, 16, None)), (S3, (None, None, False))):
        lora = run_file(adapter, lora={"rsLoRA": False}).lora
        assert lora is not None
        assert (lora.rank, lora.alpha, lora.rs_lora) == wanted


def test_absent_settings_are_the_same_training_as_the_defaults() -> None:
    assert settings_digest(run_file(None, lora=None)) == settings_digest(run_file(None, lora={"rank": 8, "alpha": 16}))


def test_the_adapter_and_its_use_define_the_training_and_its_place_and_token_do_not() -> None:
    token = {"tokenSecretRef": {"name": "hub", "key": "token"}}
    found = AdapterStatus(use="Continue", source="s3://b/artifacts/000001", job_uid="uid", manifest_sha256="ab" * 32)
    digests = [
        settings_digest(config)
        for config in (
            run_file(None),
            run_file(S3),
            run_file(S3 | {"use": "Merge"}),
            run_file(HUB),
            run_file(JOB),
            run_file(JOB | {"job": {"name": "second"}}),
        )
    ]
    assert len(set(digests)) == len(digests)
    assert settings_digest(run_file(JOB, found)) == settings_digest(run_file(JOB))
    with_token = HUB | {"huggingFace": HUB["huggingFace"] | token}
    assert settings_digest(run_file(with_token)) == settings_digest(run_file(HUB))
