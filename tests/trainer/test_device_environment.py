"""Settings by device: what is set for GPUs and not for CPUs, what the user set wins, and torch and NCCL know the
names."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from finetune_core.api.resources import Device
from finetune_core.contract import Identity, RunConfig
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import Paths
from finetune_trainer.processes import worker_environments
from finetune_trainer.ranks.device_environment import device_environment
from finetune_trainer.ranks.gate import Rendezvous
from tests.trainer.pods import run_config

SCRATCH = Path("/scratch")
ALLOCATOR = {"PYTORCH_ALLOC_CONF"}
NCCL = {
    "NCCL_DEBUG",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS",
}
ALL = ALLOCATOR | NCCL


@pytest.mark.parametrize(
    ("device", "ranks", "names", "overlap"),
    [
        ("CPU", 1, set(), False),
        ("CPU", 8, set(), False),
        ("GPU", 1, ALLOCATOR, False),
        ("GPU", 8, ALLOCATOR | NCCL, True),
    ],
)
def test_each_device_gets_its_settings(device: Device, ranks: int, names: set[str], overlap: bool) -> None:
    settings = device_environment(device, ranks=ranks, scratch=SCRATCH, given={"PATH": "/bin"})
    assert set(settings.environment) == names
    assert settings.overlap_communication is overlap
    assert all(setting.reason.endswith(".") for setting in settings.variables.values())


def test_the_values() -> None:
    environment = device_environment("GPU", ranks=2, scratch=SCRATCH, given={}).environment
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert environment["NCCL_DEBUG"] == "WARN"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"].startswith("/scratch/")


@pytest.mark.parametrize(
    ("given", "left_alone"),
    [
        ("NCCL_DEBUG", "NCCL_DEBUG"),
        ("PYTORCH_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
        ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"),
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"),
    ],
)
def test_what_the_user_set_is_left_alone(given: str, left_alone: str) -> None:
    settings = device_environment("GPU", ranks=2, scratch=SCRATCH, given={given: ""})
    assert set(settings.environment) == (ALLOCATOR | NCCL) - {left_alone}


def test_torch_and_nccl_know_the_names() -> None:
    """A variable that an upgrade has renamed would be ignored without a word."""
    folders = {name: find_spec(name) for name in ("torch", "nvidia")}
    roots = {
        name: Path(next(iter(spec.submodule_search_locations)))
        for name, spec in folders.items()
        if spec is not None and spec.submodule_search_locations is not None
    }
    libraries = {
        roots["torch"] / "lib/libc10_cuda.so": {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"},
        roots["nvidia"] / "nccl/lib/libnccl.so.2": {"NCCL_DEBUG"},
        roots["torch"] / "lib/libtorch_cuda.so": {
            "TORCH_NCCL_DUMP_ON_TIMEOUT",
            "TORCH_NCCL_RETHROW_CUDA_ERRORS",
            "TORCH_NCCL_TRACE_BUFFER_SIZE",
            "TORCH_FR_BUFFER_SIZE",
        },
        roots["torch"] / "lib/libtorch_cpu.so": {"TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"},
    }
    settings = device_environment("GPU", ranks=2, scratch=SCRATCH, given={}).variables
    used = set(settings) | {name for setting in settings.values() for name in setting.also}
    assert used == {name for names in libraries.values() for name in names}
    for library, names in libraries.items():
        assert names == names_in(library, names)


def names_in(path: Path, names: set[str]) -> set[str]:
    """Return which of ``names`` the file contains. The file is read in pieces, because it has up to 500 MB."""
    found: set[str] = set()
    tail = b""
    with path.open("rb") as file:
        while piece := file.read(32 << 20):
            window = tail + piece
            found |= {name for name in names - found if name.encode() in window}
            tail = window[-100:]
    return found


class Nowhere:
    endpoint = "http://127.0.0.1:1"


@pytest.mark.parametrize(("device", "nodes", "names"), [("CPU", 2, set()), ("GPU", 1, ALLOCATOR), ("GPU", 2, ALL)])
def test_each_worker_of_a_pod_gets_the_settings_of_its_device(device: Device, nodes: int, names: set[str]) -> None:
    """What the user has set in `podTemplate.env` is left alone."""
    config = run_config(Nowhere(), "variables", world__device=device, world__nodes=nodes)  # type: ignore[arg-type]
    plan = WorkerPlan(
        paths=Paths(scratch=SCRATCH),
        identity=Identity(namespace="default", name="t", uid="u", attempt=1, pod_name="p", pod_uid="p", node_rank=0),
        config=RunConfig.model_validate(config),
        inputs=Inputs(model=SCRATCH, train=SCRATCH),
        folder=SCRATCH,
    )
    rendezvous = Rendezvous(address="127.0.0.1", port=1234)
    environments: list[dict[str, str]] = [{}, {"NCCL_DEBUG": "INFO", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}]
    for given in environments:
        workers = worker_environments(given, plan, rendezvous=rendezvous, threads=1)
        assert len(workers) == config["world"]["processesPerNode"]
        for environment in workers:
            wanted = names - ALLOCATOR if given else names
            assert {name for name in ALL if name in environment} == wanted | (set(given) & ALL)
            assert environment.items() >= given.items()
