"""Facts about driver, torch and GPUs decide whether a rank starts. Refusals name both versions, and say what to do."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.api.training import Precision
from finetune_core.contract import WorldConfig
from finetune_core.errors import UserError
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.ranks.device_conditions import (
    DeviceFacts,
    Gpu,
    device_to_bind,
    driver_version,
    has_kernels,
    read_device_facts,
    start_refusal,
    version_text,
)

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
"""The architectures of torch 2.13 with CUDA 13.0."""


def gpus(count: int, name: str = "NVIDIA H200", capability: tuple[int, int] = (9, 0)) -> tuple[Gpu, ...]:
    return tuple(Gpu(name, capability, f"GPU-{index}") for index in range(count))


WORLD = WorldConfig(nodes=2, processes_per_node=8, device="GPU")
FACTS = DeviceFacts(driver_version=13000, torch_cuda="13.0", architectures=ARCHITECTURES, gpus=gpus(8))
REFUSALS: list[tuple[str, dict[str, Any], bool, list[str]]] = [
    ("too old", {"driver_version": 12080}, True, ["CUDA 13.0", "CUDA 12.8", "R580", "podTemplate.nodeSelector"]),
    ("much too old", {"driver_version": 11040}, True, ["CUDA 13.0", "CUDA 11.4"]),
    ("too old for a future CUDA", {"torch_cuda": "14.2"}, True, ["CUDA 14.2", "CUDA 13.0"]),
    ("no driver", {"driver_version": None, "gpus": ()}, False, ["device plugin", "runtime class"]),
    ("a driver that sees no GPU", {"gpus": ()}, False, ["needs 8", "sees 0"]),
    ("a GPU that fell off the bus", {"gpus": gpus(7)}, False, ["needs 8", "sees 7"]),
    (
        "a fabric that is not ready",
        {"gpus": (), "problem": "Error 802: system not yet initialized"},
        False,
        ["needs 8", "sees 0", "Error 802: system not yet initialized"],
    ),
    ("one GPU shown twice", {"gpus": (*gpus(7), gpus(1)[0])}, False, ["more than once"]),
    ("torch for CPUs", {"torch_cuda": None}, True, ["podTemplate.image", "CPUs"]),
    ("V100", {"gpus": gpus(8, "Tesla V100", (7, 0))}, True, ["resources.gpuProduct", "sm_75", "V100", "7.0"]),
    (
        "bf16 on a T4",
        {"gpus": gpus(8, "Tesla T4", (7, 5))},
        True,
        ["training.precision: must be fp32 on Tesla T4 (compute capability 7.5)", "8.0", "resources.gpuProduct"],
    ),
    (
        "one old GPU among new ones",
        {"gpus": (*gpus(7), Gpu("Tesla T4", (7, 5), "GPU-7"))},
        True,
        ["training.precision", "Tesla T4", "7.5"],
    ),
    (
        "an old GPU and one that torch has no kernels for",
        {"gpus": (Gpu("Tesla T4", (7, 5), "GPU-7"), *gpus(7, "Tesla V100", (7, 0)))},
        True,
        ["resources.gpuProduct", "V100"],
    ),
    (
        "a driver that is too old and so shows no GPU",
        {"driver_version": 12080, "gpus": (), "problem": "The NVIDIA driver on your system is too old"},
        True,
        ["CUDA 13.0", "CUDA 12.8"],
    ),
]


@pytest.mark.parametrize(("case", "changes", "final", "parts"), REFUSALS, ids=[case for case, *_ in REFUSALS])
def test_a_refusal_says_what_to_do(case: str, changes: dict[str, Any], final: bool, parts: list[str]) -> None:
    refusal = start_refusal(replace(FACTS, **changes), WORLD, precision="bf16")
    assert refusal is not None, case
    assert refusal.final is final
    with pytest.raises(UserError if final else OutsideFailure) as raised:
        refusal.raise_it()
    assert [part for part in parts if part not in str(raised.value)] == []


@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ({}, "bf16"),
        ({"driver_version": 13020}, "bf16"),
        ({"driver_version": 14000}, "bf16"),
        ({"driver_version": 13000, "torch_cuda": "13.2"}, "bf16"),
        ({"gpus": gpus(8, "Tesla T4", (7, 5))}, "fp32"),
        ({"gpus": gpus(8, "NVIDIA L40S", (8, 9))}, "bf16"),
        ({"gpus": gpus(9)}, "bf16"),
        ({"gpus": (*gpus(8), Gpu("Tesla T4", (7, 5), "GPU-8"))}, "bf16"),
        ({"gpus": (*gpus(8), Gpu("Tesla V100", (7, 0), "GPU-8"))}, "bf16"),
        ({"gpus": (*gpus(8), gpus(1)[0])}, "bf16"),
        ({"gpus": (*gpus(4), *(Gpu("NVIDIA A100", (8, 0), f"GPU-A{index}") for index in range(4)))}, "bf16"),
    ],
)
def test_a_rank_starts_where_nothing_is_wrong(changes: dict[str, Any], precision: Precision) -> None:
    """GPUs that no process of the pod computes on may be of any kind."""
    assert start_refusal(replace(FACTS, **changes), WORLD, precision=precision) is None


def test_a_job_on_cpus_needs_nothing() -> None:
    facts = DeviceFacts(driver_version=None, torch_cuda=None, architectures=(), gpus=())
    assert start_refusal(facts, WORLD.model_copy(update={"device": "CPU"}), precision="bf16") is None


ANY_GPUS = st.lists(st.builds(Gpu, st.text(), st.tuples(st.integers(1, 15), st.integers(0, 9)), st.text()), max_size=9)


@given(
    st.none() | st.integers(1, 99_999),
    st.none() | st.from_regex(r"[1-9][0-9]?\.[0-9]", fullmatch=True),
    st.lists(st.text() | st.sampled_from(ARCHITECTURES)),
    ANY_GPUS,
    st.sampled_from(["bf16", "fp32"]),
)
def test_any_facts_give_a_sentence_or_none(
    driver: int | None, torch_cuda: str | None, architectures: list[str], found: list[Gpu], precision: Precision
) -> None:
    refusal = start_refusal(DeviceFacts(driver, torch_cuda, architectures, found), WORLD, precision=precision)
    if refusal is None:
        assert driver is not None
        assert len(found) >= 8
    else:
        assert refusal.subject
        assert refusal.problem


@given(ANY_GPUS, ANY_GPUS, st.integers(1, 9), st.sampled_from(["bf16", "fp32"]))
def test_only_the_gpus_that_are_computed_on_matter(
    found: list[Gpu], more: list[Gpu], needed: int, precision: Precision
) -> None:
    world = WORLD.model_copy(update={"processes_per_node": needed})
    used = [replace(gpu, uuid=str(number)) for number, gpu in enumerate(found)]
    alone, together = (
        start_refusal(replace(FACTS, gpus=gpus), world, precision=precision) for gpus in (used, [*used, *more])
    )
    if len(used) >= needed:
        assert together == alone
    else:
        assert alone is not None
        assert not alone.final, "a node that shows too few GPUs may be repaired"


@given(st.text(min_size=1), st.sampled_from([(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]))
def test_bf16_is_refused_on_each_older_gpu_and_on_no_newer_one(name: str, capability: tuple[int, int]) -> None:
    facts = replace(FACTS, gpus=gpus(8, name, capability))
    assert start_refusal(facts, WORLD, precision="fp32") is None
    refusal = start_refusal(facts, WORLD, precision="bf16")
    assert (refusal is not None) == (capability < (8, 0))
    if refusal is not None:
        assert refusal.final
        assert (refusal.subject, refusal.problem.partition(", because")[0]) == (
            "training.precision",
            f"must be fp32 on {name} (compute capability {capability[0]}.{capability[1]})",
        )


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 9), ["sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_86"], False),
        ((9, 0), ["compute_86"], True),
        ((12, 1), ["sm_120"], True),
        ((10, 3), ["sm_100a"], False),
        ((9, 0), ["sm_90a"], True),
        ((7, 0), list(ARCHITECTURES), False),
        ((9, 0), ["gfx942", ""], False),
    ],
)
def test_code_runs_on_its_own_and_on_compatible_gpus(
    capability: tuple[int, int], architectures: list[str], expected: bool
) -> None:
    assert has_kernels(capability, architectures) is expected


@pytest.mark.parametrize(("version", "text"), [(12080, "12.8"), (13000, "13.0"), (11040, "11.4"), (12120, "12.12")])
def test_a_version_is_written_as_people_write_it(version: int, text: str) -> None:
    assert version_text(version) == text


def test_only_several_ranks_on_gpus_are_bound_to_their_device() -> None:
    gpu, cpu = torch.device("cuda", 3), torch.device("cpu")
    assert device_to_bind(gpu, 2) == gpu
    assert device_to_bind(gpu, 1) is None
    assert device_to_bind(cpu, 2) is None


def test_the_facts_of_this_machine_are_read() -> None:
    facts = read_device_facts()
    assert facts.torch_cuda == torch.version.cuda
    assert set(facts.architectures) == set(torch.cuda.get_arch_list())
    assert len(facts.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert bool(facts.problem) == (not facts.gpus)


def test_a_gpu_that_breaks_while_it_is_looked_at_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken GPU is no part of this machine, so the functions of torch that would meet it are replaced."""

    def properties(index: int) -> Any:
        if index == 1:
            raise RuntimeError(
                "CUDA error: uncorrectable ECC error encountered\nSearch for `cudaErrorECCUncorrectable'"
            )
        return SimpleNamespace(name="NVIDIA H200", major=9, minor=0, uuid="GPU-0")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    facts = read_device_facts()
    assert facts.gpus == (Gpu("NVIDIA H200", (9, 0), "GPU-0"),)
    refusal = start_refusal(replace(facts, driver_version=13000), WORLD, precision="bf16")
    assert refusal is not None
    assert not refusal.final
    assert refusal.problem == (
        "this pod needs 8 of them and sees 1 (CUDA says: CUDA error: uncorrectable ECC error encountered): look at the"
        " GPUs and the device plugin of the node"
    )


@pytest.mark.skipif(shutil.which("cc") is None, reason="the library of a driver is compiled")
@pytest.mark.parametrize(("version", "status", "expected"), [(12080, 0, 12080), (0, 0, None), (13000, 999, None)])
def test_the_driver_is_asked_for_its_version(version: int, status: int, expected: int | None, tmp_path: Path) -> None:
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text(f"int cuDriverGetVersion(int *version) {{ *version = {version}; return {status}; }}")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    assert driver_version(str(library)) == expected


def test_without_a_driver_there_is_no_version(tmp_path: Path) -> None:
    assert driver_version(str(tmp_path / "libcuda.so.1")) is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="the library of a driver is compiled")
def test_a_library_without_the_function_is_no_driver(tmp_path: Path) -> None:
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text("int anotherFunction(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    assert driver_version(str(library)) is None
