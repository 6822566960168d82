"""Requests and limits of a training container are made of planned and chosen amounts, and resources that a job names
itself are passed on or refused with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.planning.host_resources import (
    GPU_RESOURCE,
    LOCK_MEMORY,
    HostChoices,
    PlannedHost,
    extended_problem,
    host_resources,
)
from finetune_core.planning.scratch import GIBIBYTE

EIGHT_GPUS = PlannedHost(gpus=8, cpus=64, memory_bytes=220 * GIBIBYTE + 1)
ON_CPUS = PlannedHost(gpus=0, cpus=8, memory_bytes=3 * GIBIBYTE)
Amounts = dict[str, str]
CASES: list[tuple[str, PlannedHost, HostChoices, Amounts, Amounts]] = [
    (
        "with GPUs the CPUs have no limit",
        EIGHT_GPUS,
        HostChoices(),
        {"cpu": "64", "memory": "221Gi", GPU_RESOURCE: "8"},
        {"memory": "221Gi", GPU_RESOURCE: "8"},
    ),
    (
        "without GPUs the CPUs have a limit",
        ON_CPUS,
        HostChoices(),
        {"cpu": "8", "memory": "3Gi"},
        {"cpu": "8", "memory": "3Gi"},
    ),
    (
        "what the job sets is taken",
        EIGHT_GPUS,
        HostChoices(cpu="96", memory="1000Gi"),
        {"cpu": "96", "memory": "1000Gi", GPU_RESOURCE: "8"},
        {"memory": "1000Gi", GPU_RESOURCE: "8"},
    ),
    (
        "a limit of CPUs by choice",
        EIGHT_GPUS,
        HostChoices(limit_cpu=True),
        {"cpu": "64", "memory": "221Gi", GPU_RESOURCE: "8"},
        {"cpu": "64", "memory": "221Gi", GPU_RESOURCE: "8"},
    ),
    (
        "resources of RDMA are requested whole",
        EIGHT_GPUS,
        HostChoices(extended={"vpc.amazonaws.com/efa": "32", "hugepages-2Mi": "5120Mi"}),
        {"cpu": "64", "memory": "221Gi", GPU_RESOURCE: "8", "vpc.amazonaws.com/efa": "32", "hugepages-2Mi": "5120Mi"},
        {"memory": "221Gi", GPU_RESOURCE: "8", "vpc.amazonaws.com/efa": "32", "hugepages-2Mi": "5120Mi"},
    ),
]


@pytest.mark.parametrize(("case", "planned", "choices", "requests", "limits"), CASES, ids=[case for case, *_ in CASES])
def test_the_resources_of_a_container(
    case: str, planned: PlannedHost, choices: HostChoices, requests: Amounts, limits: Amounts
) -> None:
    found = host_resources(planned, choices)
    assert (found.requests, found.limits) == (requests, limits), case
    assert found.added_capabilities == []


def test_memory_is_locked_by_choice_alone() -> None:
    assert host_resources(EIGHT_GPUS, HostChoices(lock_memory=True)).added_capabilities == [LOCK_MEMORY]


@pytest.mark.parametrize(
    ("name", "amount", "problem"),
    [
        ("rdma/hca_shared_devices_a", "1", None),
        ("rdma/ib", "8", None),
        ("vpc.amazonaws.com/efa", "32", None),
        ("hugepages-2Mi", "5120Mi", None),
        ("hugepages-1Gi", "4Gi", None),
        ("hugepages-2Mi", "5Gi", None),
        ("hugepages-2Mi", "3Mi", "must be a multiple of 2Mi, such as 8Mi"),
        ("hugepages-2Mi", "7", "must be a multiple of 2Mi, such as 8Mi"),
        ("rdma/ib", "0", "must be a whole number from 1 to 999999"),
        ("rdma/ib", "1.5", "must be a whole number from 1 to 999999"),
        ("rdma/ib", "1Gi", "must be a whole number from 1 to 999999"),
        (GPU_RESOURCE, "8", "must not be set here: resources.gpusPerNode sets it"),
        ("requests.example.com/x", "1", "must not be a name that Kubernetes keeps for itself"),
        ("kubernetes.io/x", "1", "must not be a name that Kubernetes keeps for itself"),
        ("node.kubernetes.io/x", "1", "must not be a name that Kubernetes keeps for itself"),
        ("a/b/c", "1", "must be a domain and a name of at most 63 letters, digits, `-`, `_` and `.`"),
        ("/x", "1", "must be a domain and a name of at most 63 letters, digits, `-`, `_` and `.`"),
        ("rdma/", "1", "must be a domain and a name of at most 63 letters, digits, `-`, `_` and `.`"),
    ],
)
def test_a_resource_that_a_job_names_is_taken_or_refused(name: str, amount: str, problem: str | None) -> None:
    assert extended_problem(name, amount) == problem


@pytest.mark.parametrize("name", ["cpu", "memory", "ephemeral-storage", "hugepages-0Mi", ""])
def test_resources_that_have_their_own_fields_are_refused(name: str) -> None:
    assert "must be the name of an extended resource" in str(extended_problem(name, "1"))


@given(st.text(), st.text())
def test_any_name_and_amount_are_judged(name: str, amount: str) -> None:
    problem = extended_problem(name, amount)
    assert problem is None or problem.startswith("must ")


@given(st.integers(0, 1 << 45), st.integers(0, 16))
def test_the_memory_is_rounded_up_to_whole_gibibytes(memory: int, gpus: int) -> None:
    planned = replace(EIGHT_GPUS, memory_bytes=memory, gpus=gpus)
    requested = int(host_resources(planned, HostChoices()).requests["memory"].removesuffix("Gi")) * GIBIBYTE
    assert 0 <= requested - memory < GIBIBYTE
