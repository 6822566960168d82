"""Every field of the run file defines what is trained unless it is listed as an exception, and the digest of the fields
stays the same from version to version."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import BaseModel

from finetune_core.api.job import FineTuneJob
from finetune_core.contract import RunConfig
from finetune_core.contract.run_file import StorageConfig
from finetune_core.contract.same_training import NOT_THE_TRAINING, digest_of_fields, settings_digest
from finetune_core.resolve import resolve
from tests.core.jobs import quickstart

DIGEST = "9d61a5982da4f0a64f5159518b2b143e2ed7d256430d98d012fb03986e2a2960"
"""Result of `settings_digest` for the run file of examples/quickstart.yaml."""


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the pydantic models that a field with this annotation may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, list):
        return [model for part in typing.get_args(annotation) for model in models_in(part)]
    return []


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the path of each field of ``model``, for example `nodes`. In place of a field that holds other
    models, yield the fields of these models, for example `world.nodes`. Each path begins with ``prefix``."""
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        if not inner:
            yield prefix + name
        for part in inner:
            yield from leaves(part, f"{prefix}{name}.")


def put(fields: Any, path: str, value: object) -> Any:
    """Return a copy of the nested mapping ``fields`` with ``value`` at ``path``. Sections that do not exist are
    created."""
    name, _, rest = path.partition(".")
    known: Mapping[str, Any] = fields if isinstance(fields, Mapping) else {}
    return {**known, name: put(known.get(name), rest, value) if rest else value}


def example(**spec: Any) -> RunConfig:
    """Return the run file of examples/quickstart.yaml; ``spec`` replaces sections of the spec."""
    manifest = quickstart()
    manifest["spec"] |= spec
    return resolve(FineTuneJob.model_validate(manifest), report=None)


def digest_with(path: str, value: object) -> str:
    """Return the digest of the example's run file with ``value`` at ``path``."""
    return digest_of_fields(put(example().model_dump(mode="json", exclude_none=True), path, value))


def test_every_field_counts_unless_it_is_listed() -> None:
    paths = list(leaves(RunConfig))
    assert len(paths) > 70, "the walk finds the fields of all sections"
    for path in paths:
        listed = any(path == name or path.startswith(f"{name}.") for name in NOT_THE_TRAINING)
        changed = digest_with(path, "one") != digest_with(path, "other")
        assert changed != listed, path


def test_only_fields_that_exist_are_listed() -> None:
    paths = list(leaves(RunConfig))
    unknown = [name for name in NOT_THE_TRAINING if not any(f"{path}.".startswith(f"{name}.") for path in paths)]
    assert unknown == []


def test_no_field_about_the_store_defines_the_training_but_the_form_of_the_artifact() -> None:
    fields = {f"storage.{name}" for name in StorageConfig.model_fields}
    assert fields - set(NOT_THE_TRAINING) == {"storage.artifact"}


def test_a_field_that_is_absent_leaves_the_digest_as_an_older_version_made_it() -> None:
    config = example()
    assert config.optimization.overrides is None
    assert "overrides" not in config.model_dump(exclude_none=True)["optimization"]
    assert settings_digest(config) == settings_digest(RunConfig.model_validate_json(config.to_json()))


def test_the_digest_of_a_job_stays_the_same_from_version_to_version() -> None:
    """If the digest changes, every restored job trains again. If this test fails because a field was added, the default
    of the field must be None. If the change to the training is intended, store the new digest in `DIGEST`."""
    assert settings_digest(example()) == DIGEST


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"runPolicy": {"maxRetries": 9}}, True),
        ({"resources": {"nodes": 4, "gpusPerNode": 2}}, True),
        ({"podTemplate": {"image": "trainer:2"}}, True),
        ({"training": {"maxSteps": 4, "globalBatchSize": 16, "seed": 1}}, False),
    ],
    ids=str,
)
def test_machines_and_policies_do_not_define_the_training(change: dict[str, Any], same: bool) -> None:
    base = {"training": {"maxSteps": 4, "globalBatchSize": 16}}
    digests = {settings_digest(example(**spec)) for spec in (base, base | change)}
    assert (len(digests) == 1) == same


def test_where_model_and_scratch_folder_lie_changes_nothing_that_a_pod_is_told() -> None:
    """The run file does not contain the cache and the volume of the scratch folder. So a trainer image of an older
    version can read the run file of a job with a cache, and trains without the cache."""
    storage, volume = quickstart()["spec"]["storage"], {"size": "9Gi", "storageClassName": "fast"}
    plain = example()
    assert example(storage=storage | {"cache": {"claimName": "models"}}) == plain
    assert example(storage=storage | {"cache": {"ephemeral": volume}}) == plain
    resources = quickstart()["spec"]["resources"] | {"scratch": volume}
    assert example(resources=resources) == plain


def test_the_scores_that_a_model_must_reach_do_not_define_the_training() -> None:
    required = {"require": [{"score": "perplexity", "atMost": "2"}]}
    assert settings_digest(example(evaluation={})) == settings_digest(example(evaluation=required))
