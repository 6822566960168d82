"""The process in which torch runs: environment variables that must be set before torch is imported, and the device of
the rank.

`worker.py` calls both functions at its start.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_core.api.training import Precision
from finetune_core.contract import WorldConfig
from finetune_trainer.ranks.device_conditions import read_device_facts, start_refusal

if TYPE_CHECKING:
    import torch


def prepare_environment(scratch: Path) -> None:
    """Set environment variables and log levels so that DeepSpeed and transformers download nothing and log little. Call
    this function before anything imports torch.

    All caches go below ``scratch``, because the container's root may be read-only and HOME may be empty.
    """
    os.environ["DS_BUILD_OPS"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HOME"] = str(scratch)
    # torch needs a temporary folder as soon as it is imported, and a read-only root has none.
    os.environ.setdefault("TMPDIR", str(scratch))
    # Python's `getpass.getuser` needs a name, and the image's user has none in /etc/passwd.
    os.environ.setdefault("USER", "finetune")
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "HF_HOME"):
        os.environ.setdefault(variable, str(scratch / variable.lower()))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("finetune_trainer").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)


def select_device(world: WorldConfig, *, precision: Precision) -> torch.device:
    """Return the device of this rank. ``precision`` is `training.precision`. Raises UserError or OutsideFailure where
    this rank can't compute on the GPUs that it sees, as `device_conditions.py` says.

    A missing GPU is never replaced by the CPU, because the run would then be many times slower without a visible
    reason.
    """
    import torch

    if world.device == "CPU":
        return torch.device("cpu")
    if refusal := start_refusal(read_device_facts(), world, precision=precision):
        refusal.raise_it()
    chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(chosen)
    return chosen
