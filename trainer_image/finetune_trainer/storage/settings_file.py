"""Writes `settings/<run>.json` in the bucket: the run file with which a run began. `train.py` writes it.

`finetune compare` reads the settings, so that runs can be compared when their jobs are gone from the cluster. The run
file has all settings and no secrets. The trainer itself never reads the object.
"""

from __future__ import annotations

from finetune_core.contract import RunConfig
from finetune_core.layout import settings_key
from finetune_trainer.storage.root import RunRoot


def write_settings(root: RunRoot, run: int, config: RunConfig) -> None:
    """Write ``config`` as the settings of ``run``."""
    root.write(settings_key(run), config.to_json().encode())
