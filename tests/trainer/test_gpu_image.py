"""The image for clusters with GPUs has what NCCL and DeepSpeed load, and no compiler. All pages name the driver that
the CUDA version of the locked torch needs.

No test builds the image. The tests compare the text of the Dockerfile with the installed DeepSpeed, whose code the
build changes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from deepspeed.ops.op_builder import builder
from deepspeed.ops.op_builder.cpu.cpu_adam import CPUAdamBuilder

from finetune_trainer.ranks.device_conditions import DRIVER_BRANCHES
from tests.cluster.images import copied_sources
from tests.core.test_docs import ROOT

DOCKERFILE = ROOT / "trainer_image" / "gpu.Dockerfile"
TRAINER = ROOT / "trainer_image" / "Dockerfile"
LOCK = (ROOT / "locks" / "trainer.txt").read_text(encoding="utf-8")
PAGES = (
    "README.md",
    "docs/install.md",
    "docs/gpus.md",
    "docs/gpu-check.md",
    "charts/finetune-operator/README.md",
    "charts/finetune-operator/templates/NOTES.txt",
)


def locked(package: str) -> str:
    """Return the locked version of ``package``."""
    found = re.search(rf"^{re.escape(package)}==([0-9.]+)", LOCK, re.MULTILINE)
    assert found is not None, package
    return found[1]


def cuda_version() -> str:
    """Return the version of CUDA of the locked torch, for example `13.0`. torch requires the package cuda-toolkit of
    exactly this version."""
    return ".".join(locked("cuda-toolkit").split(".")[:2])


def stages() -> list[str]:
    """Return the text of each stage of the Dockerfile, without comments and with joined lines."""
    text = "\n".join(line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return re.split(r"^FROM ", text.replace("\\\n", " "), flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("page", PAGES)
def test_every_page_names_the_driver_of_the_locked_torch(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    needed = DRIVER_BRANCHES[int(cuda_version().partition(".")[0])]
    assert set(re.findall(r"\bR\d{3}\b", text)) == {needed}
    assert set(re.findall(r"CUDA (\d+\.\d+)", text)) <= {cuda_version()}
    assert set(re.findall(r"CUDA (\d+)\b(?!\.)", text)) <= {cuda_version().partition(".")[0]}
    assert set(re.findall(r"\btorch (\d+\.\d+)", text)) <= {".".join(locked("torch").split(".")[:2])}


def test_both_stages_begin_with_the_image_of_the_trainer() -> None:
    assert [stage.split()[0] for stage in stages()] == ["${TRAINER}", "${TRAINER}"]


def test_the_final_stage_has_the_libraries_of_nccl_and_no_compiler() -> None:
    compiled, final = stages()
    installed = re.search(r"--no-install-recommends ([^&]+)", final)
    assert installed is not None
    assert set(installed[1].split()) == {"libibverbs1", "ibverbs-providers", "libgomp1"}
    assert "g++" in compiled
    assert re.search(r"! command -v g\+\+ gcc cc", final)


def test_the_final_image_runs_as_the_user_of_the_trainers_image() -> None:
    wanted = re.findall(r"^USER .*", TRAINER.read_text(encoding="utf-8"), re.MULTILINE)[-1]
    assert re.findall(r"^USER .*", stages()[-1], re.MULTILINE)[-1] == wanted


def test_only_cpu_adam_is_compiled_and_it_is_recorded_for_gpus() -> None:
    """DeepSpeed uses a compiled operation only where the recorded name of the accelerator is that of the process."""
    compiled, final = stages()
    assert "DS_BUILD_OPS=0" in compiled
    assert re.findall(r"DS_BUILD_(\w+)=1", compiled) == ["CPU_ADAM"]
    assert CPUAdamBuilder.BUILD_VAR == "DS_BUILD_CPU_ADAM"
    assert "DS_ACCELERATOR=cuda" in compiled
    assert "DS_ACCELERATOR=cuda" in final
    assert "accelerator_name == get_accelerator()._name" in inspect.getsource(builder.OpBuilder.load)


def test_the_processor_of_the_machine_that_builds_is_replaced() -> None:
    """The expressions of the Dockerfile replace what DeepSpeed's builder returns on x86."""
    compiled = stages()[0]
    expressions = re.findall(r's/([^/"]+)/([^/"]+)/"', compiled)
    values = dict(re.findall(r"^ARG (\w+)=(\S+)", compiled, re.MULTILINE))
    assert values == {"CPU_ARCH": "x86-64-v3", "CPU_VECTORS": "AVX256"}
    text = inspect.getsource(builder.OpBuilder.cpu_arch) + inspect.getsource(builder.OpBuilder.simd_width)
    for pattern, new in expressions:
        replaced = re.sub(pattern, re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], new), text)
        assert replaced != text
        text = replaced
    assert set(re.findall(r"-march=[\w-]+", text)) == {"-march=x86-64-v3", "-march=rv64gc"}
    assert set(re.findall(r"-D__\w+__", text)) == {"-D__AVX256__"}


def test_the_copied_paths_exist() -> None:
    assert copied_sources(DOCKERFILE.read_text(encoding="utf-8")) == ["locks/trainer.txt"]
    assert Path(ROOT / "locks" / "trainer.txt").is_file()


def test_the_compiled_packages_are_copied_into_the_folder_of_the_images_python() -> None:
    (place, target) = re.findall(r"COPY --from=compiled (\S+) (\S+)", stages()[-1])[0]
    assert place == target
    # The folder of the packages depends on the version of Python, which BASE of the trainer's image decides.
    version = re.search(r"ARG BASE=python:(\d+\.\d+)", TRAINER.read_text(encoding="utf-8"))
    assert version is not None
    assert f"/python{version[1]}/" in place
