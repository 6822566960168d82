"""The process around torch: variables to set before the first import, the device, what lack of memory looks like."""

from __future__ import annotations

import logging
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_core.contract import Phase, RunConfig, WorldConfig
from finetune_trainer.pod import cgroup
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.pod.outcomes import Standing

if TYPE_CHECKING:
    import torch


def prepare(scratch: Path) -> None:
    """Keep DeepSpeed and transformers quiet and from compiling; call before anything imports torch.

    Caches go to ``scratch``, because the root may be read-only and HOME empty.
    """
    os.environ["DS_BUILD_OPS"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HOME"] = str(scratch)
    # torch looks for a temporary folder as it is imported, and a read-only root has none.
    os.environ.setdefault("TMPDIR", str(scratch))
    # The image's user has no name in /etc/passwd, which Python's getpass asks for.
    os.environ.setdefault("USER", "finetune")
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "HF_HOME"):
        os.environ.setdefault(variable, str(scratch / variable.lower()))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("finetune_trainer").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)


def device(world: WorldConfig) -> torch.device:
    """Return this process's device; raises OutsideFailure where the pod sees fewer GPUs than it has processes.

    It never falls back to the CPU: a run on the wrong device would be a hundred times slower without a word.
    """
    import torch

    if world.device == "CPU":
        return torch.device("cpu")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible < world.processes_per_node:
        raise OutsideFailure(
            f"resources.device is GPU and this pod needs {world.processes_per_node}, but the NVIDIA driver shows"
            f" {visible}: look at the driver, the device plugin and the container toolkit of the node"
        )
    chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(chosen)
    return chosen


def is_host_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch's CPU allocator got no memory: it has no class of its own for that."""
    return "can't allocate memory" in str(error)


def memory_sentence(error: BaseException, standing: Standing, config: RunConfig) -> str:
    """Return the sentence for lack of memory: in which phase, how much was asked for, and what to change."""
    text = str(error)
    asked = re.search(r"(?:tried to allocate|Unable to allocate) ([0-9.]+ ?(?:[KMGT]i?B|bytes)?)", text, re.IGNORECASE)
    amount = f": {_readable(asked[1])} more were asked for" if asked else ""
    capacity = re.search(r"total capacity of ([0-9.]+ [KMGT]iB)", text)
    limit = cgroup.memory_limit()
    if capacity:
        amount += f" on a GPU of {capacity[1]}"
    elif limit is not None and config.world.device == "CPU":
        amount += f" in a pod of {limit / 2**30:.2f} GiB"
    return f"out of memory {standing.where()}{amount}: {_memory_remedy(standing, config)}"


def _readable(amount: str) -> str:
    """Return an amount of memory as people read it: torch's CPU allocator speaks in bytes."""
    number = amount.removesuffix("bytes").strip()
    return f"{int(number) / 2**20:,.0f} MiB" if number.isdigit() else amount


def _memory_remedy(standing: Standing, config: RunConfig) -> str:
    """Return what to change, by what the process was doing."""
    optimization, pod = config.optimization, "resources.memory" if config.world.device == "CPU" else "a larger GPU"
    if standing.phase == Phase.GENERATING.value:
        size = config.evaluation.generation.batch_size
        return f"lower evaluation.generation.batchSize (it is {size}) or evaluation.generation.maxNewTokens"
    if standing.phase in (Phase.LOADING.value, Phase.EXPORTING.value):
        more = "more processes with deepspeed.zeroStage 3" if optimization.zero_stage < 3 else "more processes"
        return f"the model itself does not fit, take {pod} or {more}"
    smaller = f"lower training.microBatchSize (it is {optimization.micro_batch_size})"
    if optimization.micro_batch_size == 1:
        smaller = f"lower dataset.maxLength (it is {config.dataset.max_length})"
    checkpointing = "" if optimization.gradient_checkpointing else ", set training.gradientCheckpointing"
    return f"{smaller}{checkpointing}, or take {pod}"
