"""One rank that loads a model as the trainer does, and prints memory figures:
`python -m tests.trainer.loading MODEL_FOLDER ZERO_STAGE SCRATCH_FOLDER`.

The output is JSON with figures in bytes. `peak` is how far resident memory rose above its level before loading.
`anonymous` is the same without pages of mapped files, which the kernel can drop at any time. `held` is the size of the
parameters that the rank holds after loading.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path


def resident() -> tuple[int, int]:
    """Return two sizes in bytes: this process's resident memory, and its anonymous part (no mapped files)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(lines[name].split()[0]) for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def main() -> None:
    folder, stage = Path(sys.argv[1]), int(sys.argv[2])
    from finetune_trainer.ranks import process

    process.prepare_environment(Path(sys.argv[3]))
    import torch

    from finetune_core.contract import OptimizationConfig
    from finetune_trainer.engine.config import shard_new_models
    from finetune_trainer.model.load import load_base, trained_parameters
    from finetune_trainer.ranks.gang import Gang

    gang = Gang(device=torch.device("cpu"))
    optimization = OptimizationConfig(
        learning_rate=1, global_batch_size=2, micro_batch_size=1, schedule="Constant", warmup_steps=0, weight_decay=0,
        gradient_clipping=1, precision="bf16", gradient_checkpointing=False, seed=1, zero_stage=stage,
    )  # fmt: skip
    sharding = shard_new_models(optimization, gang.world_size)
    before, peak, done = resident(), [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            for index, value in enumerate(resident()):
                peak[index] = max(peak[index], value - before[index])

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_base(folder, torch.bfloat16, sharded=sharding is not None)
    done.set()
    watcher.join()
    parameters = trained_parameters(model).values()
    held = sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in parameters)
    print(json.dumps({"peak": peak[0], "anonymous": peak[1], "held": held}), flush=True)
    gang.final_barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
