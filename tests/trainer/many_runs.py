"""One rank that trains several plans one after the other in one process: `python -m tests.trainer.many_runs FILE`.

Loading torch takes longer than training the tiny model; a table of runs pays for it once. A plan may be told to stop
after a step, as by SIGTERM, and each leaves the rows that it consumed in `rows-<rank>.jsonl`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from finetune_trainer.errors import StopAgreed, Stopped
from finetune_trainer.outcomes import Standing
from finetune_trainer.plan import WorkerPlan
from finetune_trainer.training import environment


def watch_steps() -> dict[str, Any]:
    """Let the loop's steps obey and record what stands in the returned dictionary."""
    from finetune_trainer.training.batches import Batches
    from finetune_trainer.training.loop import Training

    orders: dict[str, Any] = {"stop_after": None, "rows": None}
    one_step, share_of = Training._one_step, Batches.step

    def obey(self: Training, step: int) -> Any:
        if orders["stop_after"] is not None and step > orders["stop_after"]:
            raise StopAgreed
        return one_step(self, step)

    def record(self: Batches, step: int, optimization: Any) -> Any:
        share = share_of(self, step, optimization)
        own = [row for micro in share.own for sequence in micro for row in sequence]
        with orders["rows"].open("a") as file:
            print(json.dumps({"step": step, "own": own}), file=file)
        return share

    Training._one_step, Batches.step = obey, record  # type: ignore[method-assign]
    return orders


def main() -> None:
    entries = json.loads(Path(sys.argv[1]).read_text())
    plans = [WorkerPlan.model_validate(entry["plan"]) for entry in entries]
    environment.prepare(plans[0].paths.scratch)
    from finetune_trainer.training.gang import Gang
    from finetune_trainer.training.progress import Progress
    from finetune_trainer.training.train import train

    gang, orders = Gang(device=environment.device(plans[0].config.world)), watch_steps()
    for plan, entry in zip(plans, entries, strict=True):
        plan.folder.mkdir(parents=True, exist_ok=True)
        progress = Progress(pod_uid="pod", ranks=gang.world_size, reporter=None) if gang.is_first else None
        orders |= {"stop_after": entry["stop_after"], "rows": plan.folder / f"rows-{gang.rank}.jsonl"}
        try:
            train(plan, gang, progress, Standing())
        except Stopped:
            if entry["stop_after"] is None:
                raise
    gang.farewell()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
