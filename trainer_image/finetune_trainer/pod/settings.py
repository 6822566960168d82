"""Paths of the files that the trainer reads and writes, and its time budgets. `__main__.py` fills `Paths` from the
command line, and the launcher passes the paths to the workers in the worker plan.
"""

from __future__ import annotations

from pathlib import Path

from finetune_core import contract
from finetune_core.contract import ContractModel


class Paths(ContractModel):
    """Files and folders outside the program. The defaults are the mount paths of a pod that the operator creates."""

    run_file: Path = Path(contract.RUN_FILE)
    ca_file: Path = Path(contract.CA_FILE)
    credentials: Path = Path(contract.CREDENTIALS_FOLDER)
    storage_ca_file: Path = Path(contract.STORAGE_CA_FILE)
    hub_token_file: Path = Path(contract.HUB_TOKEN_FILE)
    hub_data_tokens: Path = Path(contract.HUB_DATA_TOKENS_FOLDER)
    report_token_file: Path = Path(contract.TOKEN_FILE)
    termination_log: Path = Path(contract.TERMINATION_LOG)
    scratch: Path = Path(contract.SCRATCH_FOLDER)
    volumes: Path = Path(contract.VOLUMES_FOLDER)


STORE_CHECK_SECONDS = 20.0
"""How long the first requests to the object store may fail, so that a pod that can't reach the store reports the error
within a minute."""
HUB_SECONDS = 20.0
"""Timeout of one request to the Hugging Face Hub."""
STORE_BUDGET_SECONDS = 300.0
"""How long requests to the object store may fail before the run ends with exit code 75."""
BACKGROUND_BUDGET_SECONDS = 900.0
"""How long background uploads may fail, while training continues, before the run ends with exit code 75."""
STOP_COMMIT_SECONDS = 60.0
"""How long a run that received SIGTERM waits for the COMMIT of its last checkpoint. The value is shorter than the pod's
termination grace period of 90 s."""
PEER_WAIT_SECONDS = 300.0
"""How long to wait for the DNS name of rank 0 and for the other ranks, because nodes pull the image at different
speeds."""
FROZEN_SECONDS = 60.0
"""Time in addition to `stability.stall_timeout_seconds` that a worker may go without a heartbeat before the launcher
kills it."""
PEERS_LEAVE_SECONDS = 30.0
"""How long the other workers of a pod may take to exit after one worker failed, before the launcher kills them."""
ALL_LEAVE_SECONDS = 120.0
"""How long the other workers of a pod may take to exit after one worker succeeded, because they may still be writing
files."""
