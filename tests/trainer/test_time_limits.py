"""Time limits grow with the bytes and the nodes of a job, and are never shorter than the constant limits were."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.pod.settings import PEER_WAIT_SECONDS
from finetune_trainer.pod.time_limits import MOST_SECONDS, JobSize, TimeLimits, time_limits
from finetune_trainer.ranks.gang import BACKGROUND_WORK_SECONDS, WORK_SECONDS

MB, GB = 10**6, 10**9
TABLE: list[tuple[str, JobSize, TimeLimits]] = [
    (
        "nothing to transfer",
        JobSize(model_bytes=0, artifact_bytes=0, checkpoint_bytes=0, data_bytes=0, nodes=1),
        TimeLimits(prepare=1200, fetch=1200, export=1200, share=1200, peers=300),
    ),
    (
        "LoRA of a 7B on one node, with 1.5 MB of rows",
        JobSize(
            model_bytes=14 * GB, artifact_bytes=GB // 20, checkpoint_bytes=GB // 4, data_bytes=3 * MB // 2, nodes=1
        ),
        TimeLimits(prepare=1650, fetch=1210, export=1203.5, share=1650, peers=300),
    ),
    (
        "Full of a 7B on two nodes",
        JobSize(model_bytes=14 * GB, artifact_bytes=14 * GB, checkpoint_bytes=81 * GB, data_bytes=0, nodes=2),
        TimeLimits(prepare=1620, fetch=4440, export=2180, share=4440, peers=860),
    ),
    (
        "merged model of a 70B on four nodes",
        JobSize(model_bytes=140 * GB, artifact_bytes=141 * GB, checkpoint_bytes=2 * GB, data_bytes=0, nodes=4),
        TimeLimits(prepare=5400, fetch=1280, export=11070, share=11070, peers=5900),
    ),
    (
        "Full of a 7B on forty nodes, which share the store",
        JobSize(model_bytes=14 * GB, artifact_bytes=14 * GB, checkpoint_bytes=81 * GB, data_bytes=0, nodes=40),
        TimeLimits(prepare=1620, fetch=7680, export=2180, share=7680, peers=1420),
    ),
    (
        "a million conversations on two nodes",
        JobSize(model_bytes=GB, artifact_bytes=0, checkpoint_bytes=0, data_bytes=GB, nodes=2),
        TimeLimits(prepare=21230, fetch=1200, export=1200, share=21230, peers=380),
    ),
    (
        "more than a day",
        JobSize(model_bytes=10**15, artifact_bytes=10**15, checkpoint_bytes=10**15, data_bytes=10**15, nodes=99),
        TimeLimits(
            prepare=MOST_SECONDS, fetch=MOST_SECONDS, export=MOST_SECONDS, share=MOST_SECONDS, peers=MOST_SECONDS
        ),
    ),
]
SIZES = st.builds(
    JobSize,
    model_bytes=st.integers(0, 10**14),
    artifact_bytes=st.integers(0, 10**14),
    checkpoint_bytes=st.integers(0, 10**14),
    data_bytes=st.integers(0, 10**14),
    nodes=st.integers(1, 99),
)
FIELDS = [field.name for field in fields(TimeLimits)]


@pytest.mark.parametrize(("case", "size", "expected"), TABLE, ids=[case for case, *_ in TABLE])
def test_the_limits_of_a_job(case: str, size: JobSize, expected: TimeLimits) -> None:
    found = time_limits(size)
    assert {name: getattr(found, name) for name in FIELDS} == pytest.approx(
        {name: getattr(expected, name) for name in FIELDS}
    ), case


@given(SIZES)
def test_no_limit_is_shorter_than_the_constant_one_or_longer_than_a_day(size: JobSize) -> None:
    found = time_limits(size)
    assert found.peers >= PEER_WAIT_SECONDS
    assert min(found.prepare, found.fetch, found.export, found.share) >= WORK_SECONDS
    assert found.share == max(found.prepare, found.fetch, found.export)
    assert max(found.share, found.peers) <= MOST_SECONDS <= BACKGROUND_WORK_SECONDS


@given(SIZES, st.sampled_from([field.name for field in fields(JobSize)]))
def test_a_limit_never_falls_when_a_job_grows(size: JobSize, field: str) -> None:
    small, large = time_limits(size), time_limits(replace(size, **{field: getattr(size, field) + 1}))
    assert all(getattr(small, name) <= getattr(large, name) for name in FIELDS)
