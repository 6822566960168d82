"""Requests and limits of a training container are made of its amounts: CPUs have no limit unless the job asks for one,
and everything else has its request as its limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetune_core.planning.host_resources import host_resources

NAMES = st.sampled_from(["nvidia.com/gpu", "rdma/ib", "vpc.amazonaws.com/efa", "hugepages-2Mi"])


def test_the_cpus_have_a_limit_by_choice_alone() -> None:
    whole: dict[str, int | str] = {"nvidia.com/gpu": 8, "vpc.amazonaws.com/efa": "32", "hugepages-2Mi": "5120Mi"}
    limits = {"memory": "221Gi", "nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "32", "hugepages-2Mi": "5120Mi"}
    free = host_resources(cpu="64", memory="221Gi", whole=whole, limit_cpu=False)
    assert (free.requests, free.limits) == ({"cpu": "64"} | limits, limits)
    bound = host_resources(cpu="64", memory="221Gi", whole=whole, limit_cpu=True)
    assert bound.requests == bound.limits == free.requests


@given(st.dictionaries(NAMES, st.one_of(st.integers(1, 9999), st.sampled_from(["1", "4Mi"]))), st.booleans())
def test_what_can_not_be_shared_out_has_its_request_as_its_limit(whole: dict[str, int | str], limit_cpu: bool) -> None:
    found = host_resources(cpu="500m", memory="3Gi", whole=whole, limit_cpu=limit_cpu)
    assert {*found.requests} == {"cpu", "memory", *whole}
    assert {*found.requests} - {*found.limits} == (set() if limit_cpu else {"cpu"})
    assert all(found.requests[name] == amount for name, amount in found.limits.items())
    assert all(isinstance(amount, str) for amount in found.requests.values())
