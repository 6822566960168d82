"""Requests and limits of a training container follow from the GPUs and the training state, and resources that a job
names itself are passed on or refused with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.planning.host_resources import (
    GIBIBYTE,
    GPU_RESOURCE,
    LOCK_MEMORY,
    HostChoices,
    HostDemand,
    extended_problem,
    host_memory_bytes,
    host_resources,
)

FULL_7B = HostDemand(
    processes=8,
    gpus=8,
    snapshot_bytes=12 * 6_738_415_616,
    staging_bytes=8 * 2 * 64 * (1 << 20),
    load_bytes=8 * 2 * 6_738_415_616,
    shared_memory_bytes=16 * GIBIBYTE,
)
"""Every parameter of a Llama-2-7B on one node. Each of the 8 processes loads the model by itself."""
LORA_7B = replace(FULL_7B, snapshot_bytes=12 * 20_000_000)
ON_CPU = HostDemand(processes=1, gpus=0, snapshot_bytes=12 * 1_000_000)
PLANNED: list[tuple[str, HostDemand, dict[str, str], dict[str, str]]] = [
    (
        "every parameter of a 7B: two snapshots of 75 GiB decide",
        FULL_7B,
        {"cpu": "64", "memory": "221Gi", GPU_RESOURCE: "8"},
        {"memory": "221Gi", GPU_RESOURCE: "8"},
    ),
    (
        "LoRA of a 7B: loading the model eight times decides",
        LORA_7B,
        {"cpu": "64", "memory": "166Gi", GPU_RESOURCE: "8"},
        {"memory": "166Gi", GPU_RESOURCE: "8"},
    ),
    (
        "every parameter of a 7B over two nodes",
        replace(FULL_7B, snapshot_bytes=6 * 6_738_415_616),
        {"cpu": "64", "memory": "166Gi", GPU_RESOURCE: "8"},
        {"memory": "166Gi", GPU_RESOURCE: "8"},
    ),
    (
        "one GPU",
        replace(LORA_7B, processes=1, gpus=1, load_bytes=2 * 6_738_415_616, staging_bytes=128 << 20),
        {"cpu": "8", "memory": "38Gi", GPU_RESOURCE: "1"},
        {"memory": "38Gi", GPU_RESOURCE: "1"},
    ),
    (
        "offload of the optimizer state",
        replace(FULL_7B, offload_bytes=12 * 6_738_415_616),
        {"cpu": "64", "memory": "304Gi", GPU_RESOURCE: "8"},
        {"memory": "304Gi", GPU_RESOURCE: "8"},
    ),
    ("CPUs alone keep their limit", ON_CPU, {"cpu": "8", "memory": "3Gi"}, {"cpu": "8", "memory": "3Gi"}),
]


@pytest.mark.parametrize(("case", "demand", "requests", "limits"), PLANNED, ids=[case for case, *_ in PLANNED])
def test_what_is_planned(case: str, demand: HostDemand, requests: dict[str, str], limits: dict[str, str]) -> None:
    planned = host_resources(demand, HostChoices())
    assert (planned.requests, planned.limits) == (requests, limits), case
    assert planned.added_capabilities == []
    assert set(planned.reasons) == {"cpu", "memory"}


def test_what_the_job_sets_is_taken() -> None:
    choices = HostChoices(cpu="96", memory="1000Gi")
    planned = host_resources(FULL_7B, choices)
    assert planned.requests == {"cpu": "96", "memory": "1000Gi", GPU_RESOURCE: "8"}
    assert planned.limits == {"memory": "1000Gi", GPU_RESOURCE: "8"}
    assert planned.reasons == {}
    assert host_resources(FULL_7B, replace(choices, limit_cpu=True)).limits["cpu"] == "96"


def test_resources_of_rdma_are_requested_whole_with_the_right_to_lock_memory() -> None:
    extended = {"vpc.amazonaws.com/efa": "32", "hugepages-2Mi": "5120Mi"}
    planned = host_resources(FULL_7B, HostChoices(extended=extended, lock_memory=True))
    for amounts in (planned.requests, planned.limits):
        assert {name: amounts[name] for name in extended} == extended
    assert planned.added_capabilities == [LOCK_MEMORY]


def test_the_reason_names_the_parts() -> None:
    assert host_resources(FULL_7B, HostChoices()).reasons["memory"] == (
        "33.0 GiB for 8 processes, 150.6 GiB for 2 snapshots of the training state, 100.4 GiB for loading the model,"
        " 1.0 GiB for pinned buffers, 16.0 GiB for shared memory, and 10% to spare; loading ends before the first"
        " snapshot"
    )


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


SIZES = st.integers(0, 1 << 45)
DEMANDS = st.builds(
    HostDemand,
    processes=st.integers(1, 16),
    gpus=st.integers(0, 16),
    snapshot_bytes=SIZES,
    snapshots=st.integers(1, 3),
    staging_bytes=SIZES,
    load_bytes=SIZES,
    offload_bytes=SIZES,
    shared_memory_bytes=SIZES,
)


@given(DEMANDS, st.sampled_from(["snapshot_bytes", "staging_bytes", "load_bytes", "offload_bytes"]))
def test_the_memory_holds_the_parts_and_never_falls_when_one_grows(demand: HostDemand, field: str) -> None:
    memory = host_memory_bytes(demand)
    assert memory >= demand.snapshots * demand.snapshot_bytes + demand.shared_memory_bytes + demand.offload_bytes
    assert memory >= demand.load_bytes
    assert host_memory_bytes(replace(demand, **{field: getattr(demand, field) + 1})) >= memory
