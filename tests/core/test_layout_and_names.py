"""The names that are computed for objects in the cluster are valid and short enough. The keys that are computed for
objects in the bucket have the documented form."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.api.job import NAME_MAX_LENGTH, NAME_PATTERN, FineTuneJob
from finetune_core.api.status import PreflightStatus, TakenOverStatus
from finetune_core.errors import UserError
from finetune_core.layout import Location, checkpoint_folder, parse_uri, run_key, run_root, run_root_of
from finetune_core.names import attempt_name, worker_name
from tests.core.jobs import quickstart

DNS_LABEL_LIMIT = 63


@given(st.from_regex(NAME_PATTERN, fullmatch=True), st.uuids(), st.integers(1, 999), st.integers(0, 98))
def test_every_worker_name_is_a_dns_label(name: str, uid: object, attempt: int, index: int) -> None:
    child = attempt_name(name[:NAME_MAX_LENGTH], str(uid), attempt)
    assert len(worker_name(child, index)) <= DNS_LABEL_LIMIT


def test_a_job_created_anew_under_the_same_name_gets_other_children() -> None:
    assert attempt_name("job", "uid-1", 1) != attempt_name("job", "uid-2", 1)
    assert attempt_name("job", "uid-1", 1) == attempt_name("job", "uid-1", 1)


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("s3://bucket", Location("bucket", "")),
        ("s3://bucket/", Location("bucket", "")),
        ("s3://bucket/a/b/", Location("bucket", "a/b")),
    ],
)
def test_uris_are_split(uri: str, location: Location) -> None:
    assert parse_uri(uri) == location


@pytest.mark.parametrize("uri", ["bucket/key", "s3:/bucket", "https://bucket/key", ""])
def test_something_else_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="s3://bucket/key"):
        parse_uri(uri)


def test_keys_sort_as_numbers_do() -> None:
    assert run_key(9) < run_key(10)
    assert checkpoint_folder(2, 90) < checkpoint_folder(2, 1000)


def test_a_bucket_without_prefix_has_no_empty_part() -> None:
    assert run_root("s3://bucket/", "ns", "job", "run") == "s3://bucket/ns/job/run"
    assert parse_uri("s3://bucket").key("a", "b") == "a/b"


def test_the_folder_of_runs_is_the_chosen_one_or_else_that_of_the_run_taken_over_or_else_named_after_the_uid() -> None:
    time = datetime(2026, 1, 1, tzinfo=UTC)
    record = PreflightStatus(start_time=time, taken_over=TakenOverStatus(run_id="former", time=time))
    free, chosen = quickstart(), quickstart("storage.runId", "study")
    for manifest, preflight, folder in (
        (free, None, "1234"),
        (free, record.model_copy(update={"taken_over": None}), "1234"),
        (free, record, "former"),
        (chosen, record, "study"),
    ):
        root = run_root_of(FineTuneJob.model_validate(manifest), preflight)
        assert root == f"s3://finetune/runs/default/quickstart/{folder}"
