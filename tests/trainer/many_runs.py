"""One rank that trains several runs one after another in one process: `python -m tests.trainer.many_runs FILE`.

FILE holds one plan per run. Importing torch takes longer than training the tiny model, so many runs share one import.
The results are written to `results-<rank>.json` in the scratch folder. A run may have a scripted fault (see
`faults.py`). The numbers of the rows that this rank consumed in a run are written to `rows-<rank>.jsonl` in the run's
folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import Diverged, OutsideFailure, Stopped
from finetune_trainer.pod.outcomes import WorkerStatus
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.ranks import process


def main() -> None:
    runs = json.loads(Path(sys.argv[1]).read_text())
    plans = [WorkerPlan.model_validate(run["plan"]) for run in runs]
    results = []
    process.prepare_environment(plans[0].paths.scratch)
    from finetune_trainer.ranks.gang import Gang
    from finetune_trainer.reporting.progress import Progress
    from finetune_trainer.train import train
    from tests.trainer.faults import recorded, scripted

    gang = Gang(device=process.select_device(plans[0].config.world, precision=plans[0].config.optimization.precision))
    for run, plan in zip(runs, plans, strict=True):
        plan.folder.mkdir(parents=True, exist_ok=True)
        progress = Progress(pod_uid="pod", ranks=gang.world_size, reporter=None) if gang.is_first else None
        with scripted(run["fault"]), recorded(plan.folder / f"rows-{gang.rank}.jsonl"):
            try:
                results.append(json.loads(train(plan, gang, progress, WorkerStatus()).to_json()))
            except Diverged as error:
                results.append({"outcome": "Diverged", "message": str(error)})
            except Stopped as error:
                results.append({"outcome": "Stopped", "message": str(error)})
            except UserError as error:
                results.append({"outcome": "BadInput", "message": str(error)})
            except OutsideFailure as error:
                results.append({"outcome": "OutsideFailure", "message": str(error)})
    (plans[0].paths.scratch / f"results-{gang.rank}.json").write_text(json.dumps(results))
    gang.final_barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
