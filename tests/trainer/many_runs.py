"""One rank that trains several plans one after the other in one process: `python -m tests.trainer.many_runs FILE`.

Loading torch takes longer than training the tiny model; a table of runs pays for it once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from finetune_trainer.outcomes import Standing
from finetune_trainer.plan import WorkerPlan
from finetune_trainer.training import environment


def main() -> None:
    plans = [WorkerPlan.model_validate(plan) for plan in json.loads(Path(sys.argv[1]).read_text())]
    environment.prepare(plans[0].paths.scratch)
    from finetune_trainer.training.gang import Gang
    from finetune_trainer.training.progress import Progress
    from finetune_trainer.training.train import train

    gang = Gang(device=environment.device(plans[0].config.world))
    for plan in plans:
        plan.folder.mkdir(parents=True, exist_ok=True)
        progress = Progress(pod_uid="pod", ranks=gang.world_size, reporter=None) if gang.is_first else None
        train(plan, gang, progress, Standing())
    gang.farewell()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
