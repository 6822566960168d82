"""Where the trainer finds and leaves files, and its time budgets: read from the command line by the launcher,
handed to the workers as JSON."""

from __future__ import annotations

from pathlib import Path

from finetune_core import contract
from finetune_core.contract import ContractModel


class Paths(ContractModel):
    """Files and folders outside the program; the defaults are those of the pod."""

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
"""Budget of the first look at the store: a pod that can't reach it says so within a minute."""
HUB_SECONDS = 20.0
"""How long one request to the hub may take."""
STORE_BUDGET_SECONDS = 300.0
"""How long a store may fail before the run ends with 75."""
BACKGROUND_BUDGET_SECONDS = 900.0
"""How long the store may fail in the background, while training goes on, before the run ends with 75."""
STOP_COMMIT_SECONDS = 60.0
"""How long a run that was told to stop waits for the COMMIT of its last step: within the pod's grace period of 90 s."""
PEER_WAIT_SECONDS = 300.0
"""How long the first rank's name and the other ranks may take to appear: images are pulled at different speeds."""
FROZEN_SECONDS = 60.0
"""How much longer than a step may take a worker may give no sign of life, before the launcher ends it."""
PEERS_LEAVE_SECONDS = 30.0
"""How long workers may take to notice that another one ended, before they are killed."""
ALL_LEAVE_SECONDS = 120.0
"""How long workers may take to follow one that ended well (the others may still be writing)."""
