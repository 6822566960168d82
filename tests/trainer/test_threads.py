"""The number of compute threads of each worker follows from CPU request, CPU limit and cores of its pod."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.contract.pod import CPU_REQUEST_VARIABLE
from finetune_core.errors import UserError
from finetune_trainer.pod.cgroup import cpu_request, threads_per_process


@pytest.mark.parametrize(
    ("processes", "limit", "requested", "cores", "threads"),
    [
        (1, 1.0, None, 64, 1),
        (1, 0.5, None, 64, 1),
        (2, 8.0, None, 64, 4),
        (1, None, None, 2, 2),
        (1, 4.0, None, 2, 2),
        (3, 8.0, None, 64, 2),
        # Without a limit the request decides, on nodes of any size.
        (1, None, 8.0, 64, 8),
        (8, None, 64.0, 192, 8),
        (8, None, 4.0, 192, 1),
        (1, None, 0.05, 64, 1),
        (1, None, 8.0, 4, 4),
        # A LimitRange may have set a limit above the request.
        (1, 16.0, 8.0, 64, 8),
    ],
)
def test_threads_follow_from_request_and_limit(
    processes: int, limit: float | None, requested: float | None, cores: int, threads: int
) -> None:
    assert threads_per_process(processes, limit=limit, request=requested, cores=cores) == threads


AMOUNTS = st.one_of(st.none(), st.integers(0, 999_900).map(lambda hundredths: hundredths / 100))


@given(st.integers(1, 16), AMOUNTS, AMOUNTS, st.integers(1, 512))
def test_the_threads_of_a_pod_fit_its_cpus(
    processes: int, limit: float | None, requested: float | None, cores: int
) -> None:
    threads = threads_per_process(processes, limit=limit, request=requested, cores=cores)
    assert threads >= 1
    assert threads == 1 or all(threads * processes <= bound for bound in (limit, requested, cores) if bound is not None)


def test_the_cpu_request_comes_from_the_environment() -> None:
    assert cpu_request({}) is None
    assert cpu_request({CPU_REQUEST_VARIABLE: "8000"}) == 8.0
    assert cpu_request({CPU_REQUEST_VARIABLE: "50"}) == 0.05


@given(st.one_of(st.text(max_size=30), st.sampled_from(["-1", "1.5", "8m", "", "٣", "1\n", "99999999999"])))
def test_a_cpu_request_that_is_no_number_is_refused_by_name(text: str) -> None:
    if re.fullmatch("[0-9]{1,10}", text):
        assert cpu_request({CPU_REQUEST_VARIABLE: text}) == int(text) / 1000
        return
    with pytest.raises(UserError, match=f"^environment variable {CPU_REQUEST_VARIABLE}: must be a whole number"):
        cpu_request({CPU_REQUEST_VARIABLE: text})
