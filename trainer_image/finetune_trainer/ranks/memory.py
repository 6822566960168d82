"""Lack of memory: recognises the error of torch's CPU allocator, and makes the sentence that says which field of the
job to change.

`worker.py` calls these functions when an error ends the training.
"""

from __future__ import annotations

import re

from finetune_core.contract import Phase, RunConfig
from finetune_trainer.pod import cgroup
from finetune_trainer.pod.outcomes import WorkerStatus


def is_host_out_of_memory(error: RuntimeError) -> bool:
    """Return whether ``error`` says that torch's CPU allocator got no memory. torch raises a plain RuntimeError in this
    case."""
    return "can't allocate memory" in str(error)


def out_of_memory_message(error: BaseException, status: WorkerStatus, config: RunConfig) -> str:
    """Return the sentence for lack of memory: the phase and step, how much memory was requested, and which field to
    change.

    ``error`` is what torch or NumPy raised; its message usually holds the requested amount.
    """
    text = str(error)
    asked = re.search(r"(?:tried to allocate|Unable to allocate) ([0-9.]+ ?(?:[KMGT]i?B|bytes)?)", text, re.IGNORECASE)
    amount = f": {_readable(asked[1])} more were asked for" if asked else ""
    capacity = re.search(r"total capacity of ([0-9.]+ [KMGT]iB)", text)
    limit = cgroup.memory_limit()
    if capacity:
        amount += f" on a GPU of {capacity[1]}"
    elif limit is not None and config.world.device == "CPU":
        amount += f" in a pod of {limit / 2**30:.2f} GiB"
    return f"out of memory {status.where()}{amount}: {_advice(status, config)}"


def _readable(amount: str) -> str:
    """Return ``amount`` for a message. A number of bytes, as torch's CPU allocator writes it, becomes MiB, for example
    `1,024 MiB`. Any other text is returned as it is."""
    number = amount.removesuffix("bytes").strip()
    return f"{int(number) / 2**20:,.0f} MiB" if number.isdigit() else amount


def _advice(status: WorkerStatus, config: RunConfig) -> str:
    """Return which fields of the job to change. The advice depends on the phase in which memory ran out."""
    optimization, pod = config.optimization, "resources.memory" if config.world.device == "CPU" else "a larger GPU"
    if status.phase == Phase.GENERATING.value:
        size = config.evaluation.generation.batch_size
        return f"lower evaluation.generation.batchSize (it is {size}) or evaluation.generation.maxNewTokens"
    if status.phase in (Phase.LOADING.value, Phase.EXPORTING.value):
        more = "more processes" if optimization.zero_stage == 3 else "more processes with deepspeed.zeroStage 3"
        return f"the model itself does not fit, take {pod} or {more}"
    smaller = f"lower training.microBatchSize (it is {optimization.micro_batch_size})"
    if optimization.micro_batch_size == 1:
        smaller = f"lower dataset.maxLength (it is {config.dataset.max_length})"
    checkpointing = "" if optimization.gradient_checkpointing else ", set training.gradientCheckpointing"
    return f"{smaller}{checkpointing}, or take {pod}"
