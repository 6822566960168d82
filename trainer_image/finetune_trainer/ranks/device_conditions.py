"""Decides from facts about driver, torch and GPUs whether a rank can start, and says what to change where it can't.

`read_device_facts` reads the facts, and `start_refusal` is a pure function of them. `process.py` calls both before a
rank joins the other ranks, once torch is imported.

A refusal is final where the job admits nodes that can't compute it: because of the image, the driver or the kind of a
GPU. The job chooses its nodes with `resources.gpuProduct` and `podTemplate.nodeSelector`. A refusal because of one of
them is final also where other nodes of the cluster would do. Otherwise the scheduler would decide at each attempt
whether the job can start, and an attempt with two nodes would need luck twice.

A refusal is retried where a node is not what it is said to be: it shows no driver, fewer GPUs than the pod was given,
or one GPU twice. Another node, or this one after a repair, may do the same work.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from finetune_core.api.training import Precision
from finetune_core.contract import WorldConfig
from finetune_core.errors import UserError
from finetune_trainer.pod.errors import OutsideFailure, first_line

if TYPE_CHECKING:
    import torch

BFLOAT16_CAPABILITY = (8, 0)
"""The oldest compute capability with arithmetic in bf16: Ampere. CUDA C++ Programming Guide, table "Feature support per
compute capability"."""
DRIVER_BRANCHES: Mapping[int, str] = {11: "R450", 12: "R525", 13: "R580"}
"""The oldest branch of the NVIDIA driver that supports each major version of CUDA. CUDA Toolkit release notes, table
"CUDA Toolkit and minimum required driver version for CUDA minor version compatibility"."""
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")
_DRIVER_LIBRARY = "libcuda.so.1"


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process sees."""

    name: str
    """For example `NVIDIA H200`."""
    capability: tuple[int, int]
    """Compute capability: (9, 0) for Hopper."""
    uuid: str
    """Differs between all GPUs, and between all MIG instances."""

    @property
    def description(self) -> str:
        """Name and compute capability as part of a sentence: `NVIDIA H200 (compute capability 9.0)`."""
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


@dataclass(frozen=True)
class DeviceFacts:
    """What a rank knows about its GPUs before it joins the other ranks."""

    driver_version: int | None
    """The newest version of CUDA that the node's driver supports, as CUDA writes it: 12080 for CUDA 12.8. None where
    the pod has no driver."""
    torch_cuda: str | None
    """The version of CUDA that torch was built with: `13.0`. None where torch was built for the CPU alone."""
    architectures: Sequence[str]
    """The architectures that torch has kernels for: `sm_90`, or `compute_90` for code that the driver compiles."""
    gpus: Sequence[Gpu]
    """The GPUs that this process sees, in the order of their numbers."""
    problem: str = ""
    """What CUDA says, on one line, where it can't show the GPUs: `system not yet initialized`. Empty where it can."""


@dataclass(frozen=True)
class StartRefusal:
    """Why a rank can't start."""

    subject: str
    """The field or the part of the node at fault."""
    problem: str
    """What is wrong with the subject, and what to change."""
    final: bool
    """Whether the job has to be changed before an attempt can succeed. See the docstring of this module."""

    def raise_it(self) -> NoReturn:
        """Raise UserError, which ends the job, where the refusal is final. Otherwise raise OutsideFailure, after which
        the operator tries again."""
        if self.final:
            raise UserError(self.subject, self.problem)
        raise OutsideFailure(f"{self.subject}: {self.problem}")


def start_refusal(facts: DeviceFacts, world: WorldConfig, *, precision: Precision) -> StartRefusal | None:
    """Return why this pod's ranks can't compute on the GPUs of ``facts``, None where they can or where the job computes
    on CPUs. ``precision`` is `training.precision`.

    The ranks of a pod use the first `processes_per_node` GPUs that they see. What other GPUs the pod sees does not
    matter.
    """
    if world.device == "CPU":
        return None
    if facts.torch_cuda is None:
        problem = "must have torch with CUDA where resources.device is GPU: its torch was built for CPUs alone"
        return StartRefusal("podTemplate.image", problem, final=True)
    if facts.driver_version is None:
        problem = "the pod has none: look at the device plugin, the container toolkit and the runtime class of the node"
        return StartRefusal("NVIDIA driver", problem, final=False)
    used = facts.gpus[: world.processes_per_node]
    return (
        _driver_refusal(facts.driver_version, facts.torch_cuda)
        or _number_refusal(used, world.processes_per_node, facts.problem)
        or _generation_refusal(used, facts.architectures, precision)
    )


def _driver_refusal(driver_version: int, torch_cuda: str) -> StartRefusal | None:
    """Refuse a driver that is older than the major version of torch's CUDA. Within a major version an older driver
    works (CUDA minor version compatibility), and so do newer drivers."""
    major = int(torch_cuda.partition(".")[0])
    if driver_version // 1000 >= major:
        return None
    branch = f" (driver {DRIVER_BRANCHES[major]} or newer)" if major in DRIVER_BRANCHES else ""
    return StartRefusal(
        "NVIDIA driver",
        f"must support CUDA {major}{branch}, because the trainer image has torch with CUDA {torch_cuda}: the driver of"
        f" this node supports CUDA {version_text(driver_version)}. Update the driver, keep the job off such nodes with"
        " podTemplate.nodeSelector, or use an image whose torch has an older CUDA",
        final=True,
    )


def _number_refusal(used: Sequence[Gpu], needed: int, told: str) -> StartRefusal | None:
    if len(used) < needed:
        cause = f" (CUDA says: {told})" if told else ""
        problem = (
            f"this pod needs {needed} of them and sees {len(used)}{cause}: look at the GPUs and the device plugin of"
            " the node"
        )
        return StartRefusal("GPUs", problem, final=False)
    if len({gpu.uuid for gpu in used}) < len(used):
        problem = "each process needs a GPU of its own, and this pod got one GPU more than once: NCCL can't share a GPU"
        return StartRefusal("GPUs", problem, final=False)
    return None


def _generation_refusal(used: Sequence[Gpu], architectures: Sequence[str], precision: Precision) -> StartRefusal | None:
    for gpu in used:
        if not has_kernels(gpu.capability, architectures):
            known = " ".join(architectures)
            problem = f"must name GPUs that torch has kernels for ({known}): this node has {gpu.description}"
            return StartRefusal("resources.gpuProduct", problem, final=True)
    for gpu in used:
        if precision == "bf16" and gpu.capability < BFLOAT16_CAPABILITY:
            return StartRefusal(
                "training.precision",
                f"must be fp32 on {gpu.description}, because bf16 needs compute capability"
                f" {BFLOAT16_CAPABILITY[0]}.{BFLOAT16_CAPABILITY[1]} (Ampere) or newer, and there is no fp16; or name"
                " newer GPUs in resources.gpuProduct",
                final=True,
            )
    return None


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether code for ``architectures`` runs on a GPU with the compute ``capability``.

    Machine code (`sm_80`) runs on GPUs of the same major version and of the same or a higher minor version. Code that
    the driver compiles (`compute_80`) runs on all newer GPUs too. Code for an architecture with a letter (`sm_90a`)
    runs on this architecture alone. CUDA C++ Programming Guide, "Binary compatibility" and "PTX compatibility".
    """
    for text in architectures:
        found = _ARCHITECTURE.fullmatch(text)
        if found is None:
            continue
        kind, built, specific = found[1], (int(found[2]), int(found[3])), bool(found[4])
        if capability == built:
            return True
        if not specific and capability > built and (kind == "compute" or capability[0] == built[0]):
            return True
    return False


def version_text(version: int) -> str:
    """Return a version of CUDA as people write it: `12.8` for 12080."""
    return f"{version // 1000}.{version % 1000 // 10}"


def device_to_bind(device: torch.device, world_size: int) -> torch.device | None:
    """Return the device that `init_process_group` binds the process group to, None for no binding.

    With several ranks the binding makes NCCL connect at once, so that a wrong set-up is found before the model is
    loaded. With one rank nothing is to connect, and the binding made NCCL fail on some machines with one GPU
    (DeepSpeed's pull request 8269).
    """
    return device if device.type == "cuda" and world_size > 1 else None


def read_device_facts() -> DeviceFacts:
    """Return the facts about driver, torch and GPUs of this process. An error of CUDA, such as that of a GPU that fell
    off the bus, is one of the facts."""
    import torch

    gpus: list[Gpu] = []
    problem = ""
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()
            for index in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(index)
                gpus.append(Gpu(properties.name, (properties.major, properties.minor), str(properties.uuid)))
        except RuntimeError as error:
            problem = first_line(error)
    return DeviceFacts(driver_version(), torch.version.cuda, tuple(torch.cuda.get_arch_list()), tuple(gpus), problem)


def driver_version(library: str = _DRIVER_LIBRARY) -> int | None:
    """Return the newest version of CUDA that the driver supports, for example 12080, None without a driver. The driver
    answers this before CUDA is initialised, and torch has no function for it."""
    try:
        ask = ctypes.CDLL(library).cuDriverGetVersion
    except (OSError, AttributeError):
        # There is no such library, or it is not that of a driver.
        return None
    version = ctypes.c_int(0)
    if ask(ctypes.byref(version)) != 0 or version.value <= 0:
        return None
    return version.value
