"""One rank of `test_fragment_snapshots.py`: `python -m tests.trainer.snapshots MODEL FOLDER STAGE PRECISION OFFLOAD`.

The rank trains a few steps, takes the snapshot of every step in both ways, and writes the files of both into FOLDER,
below `whole` and `fragments`. Before the first step it takes a snapshot of an optimizer without a state, and then one
of the state that the optimizer begins with. The output is JSON: how many collectives each way needs, and the memory
that it allocates.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STEPS = 4
PIECE_BYTES = 16 * 1024


def main() -> None:
    model_folder, folder, stage, precision = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    offload = sys.argv[5] == "offload"
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from finetune_core.contract import OptimizationConfig
    from finetune_trainer.data.batches import collate
    from finetune_trainer.data.examples import Example
    from finetune_trainer.engine.config import shard_new_models
    from finetune_trainer.engine.engine import Engine
    from finetune_trainer.engine.fragment_snapshot import FragmentSnapshots
    from finetune_trainer.engine.state import take_snapshot, write_snapshot
    from finetune_trainer.model.load import load_base
    from finetune_trainer.ranks.gang import Gang

    class Counted(TorchDispatchMode):  # type: ignore[misc]
        """Counts the collectives of torch, and the bytes of new tensors in the memory of the host."""

        def __init__(self) -> None:
            super().__init__()
            self.collectives: Counter[str] = Counter()
            self.largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                self.collectives[func._schema.name] += 1
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.zeros_like, torch.ops.aten._to_copy):
                self.largest = max(self.largest, result.nbytes)
            return result

    gang = Gang(device=torch.device("cpu"))
    optimization = OptimizationConfig(
        learning_rate=1e-2, global_batch_size=2, micro_batch_size=1, schedule="Constant", warmup_steps=0,
        weight_decay=0.1, gradient_clipping=1, precision=precision, gradient_checkpointing=False, seed=1,
        zero_stage=stage, offload_optimizer=offload,
    )  # fmt: skip
    sharding = shard_new_models(optimization, gang.world_size)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    engine = Engine(load_base(model_folder, dtype, sharded=sharding is not None), optimization, gang.device)
    batch = collate([[(Example(tuple(range(3 + gang.rank, 13 + gang.rank)), [(0, 10)]), 1)]], pad=0, packed=False)

    def write(name: str, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        target = folder / name / str(step)
        target.mkdir(parents=True, exist_ok=True)
        write_snapshot(tensors, target, rank=gang.rank, world_size=gang.world_size)

    with Counted() as first:
        snapshots = FragmentSnapshots(engine, rank=gang.rank, world_size=gang.world_size, piece_bytes=PIECE_BYTES)
    held = snapshots.take()
    write("fragments", 0, held.tensors)
    held.buffer.release()
    engine.prepare_state(0)
    write("whole", 0, take_snapshot(engine, rank=gang.rank, world_size=gang.world_size))
    told: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        engine.backward(engine.loss(batch) * gang.world_size, last=True)
        engine.gradient_norm()
        engine.step(1e-2)
        with Counted() as whole:
            wanted = take_snapshot(engine, rank=gang.rank, world_size=gang.world_size)
        with Counted() as counted:
            held = snapshots.take()
        write("whole", step, wanted)
        write("fragments", step, held.tensors)
        held.buffer.release()
        told.append(
            {
                "whole": sum(whole.collectives.values()),
                "first": sum(first.collectives.values()),
                "fragments": sum(counted.collectives.values()),
                "rounds": snapshots.rounds,
                "largest": counted.largest,
                "stored": sum(tensor.nbytes for tensor in wanted.values()),
                "allocated": snapshots.allocated_bytes,
                "parameters": len(engine.parameter_shapes),
            }
        )
    print(json.dumps(told), flush=True)
    del sharding
    gang.final_barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
