"""One of two ranks on the same device: `python -m tests.gpu.rank_process [--dry]`. `failures.py` starts both ranks.

Both ranks try to join. If they can, rank 1 leaves without a word, and rank 0 trains on. Rank 0 prints what a worker of
the trainer would report about the failure, as a JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from finetune_trainer.pod.outcomes import outcome_of
from finetune_trainer.ranks.process import prepare_environment


def main() -> NoReturn:
    """Run the rank. The process ends inside this function."""
    prepare_environment(Path(tempfile.mkdtemp()))
    import torch

    from finetune_trainer.pod.outcomes import WorkerStatus
    from finetune_trainer.ranks.gang import Gang
    from finetune_trainer.worker import _classified_errors
    from tests.gpu.settings import SHORT, run_config, worker_plan

    is_dry = "--dry" in sys.argv
    device = torch.device("cpu") if is_dry else torch.device("cuda", 0)
    try:
        with _classified_errors(worker_plan(run_config(SHORT, dry=is_dry)), WorkerStatus()):
            gang = Gang(device=device)
            gang.check_stop()
            if not gang.is_first:
                os._exit(9)
            while True:
                gang.check_stop()
    except Exception as error:  # noqa: BLE001  (as in `worker.py`, every error becomes an outcome)
        outcome = outcome_of(error)
        found = {
            "outcome": outcome.result.outcome.value,
            "exit_code": outcome.result.exit_code,
            "caused_by_peer": outcome.caused_by_peer,
            "message": outcome.result.message,
        }
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
