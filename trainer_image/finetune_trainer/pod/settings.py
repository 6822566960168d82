"""The paths of the files that the trainer reads and writes, and time limits. `__main__.py` fills `Paths` from the
command line, and the launcher passes the paths to the workers in the worker plan.
"""

from __future__ import annotations

from pathlib import Path

from finetune_core import contract
from finetune_core.contract import ContractModel


class Paths(ContractModel):
    """Files and folders that the operator mounts, and those that the trainer writes. The defaults fit the operator's
    pods."""

    run_file: Path = Path(contract.RUN_FILE)
    ca_file: Path = Path(contract.CA_FILE)
    nonce_file: Path = Path(contract.NONCE_FILE)
    credentials: Path = Path(contract.CREDENTIALS_FOLDER)
    storage_ca_file: Path = Path(contract.STORAGE_CA_FILE)
    hub_token_file: Path = Path(contract.HUB_TOKEN_FILE)
    hub_data_tokens: Path = Path(contract.HUB_DATA_TOKENS_FOLDER)
    report_token_file: Path = Path(contract.TOKEN_FILE)
    termination_log: Path = Path(contract.TERMINATION_LOG)
    scratch: Path = Path(contract.SCRATCH_FOLDER)
    volumes: Path = Path(contract.VOLUMES_FOLDER)
    model_cache: Path = Path(contract.MODEL_CACHE_FOLDER)
    model_volume: Path = Path(contract.MODEL_VOLUME_FOLDER)


STORE_CHECK_SECONDS = 20.0
"""How long a failing request to the object store is repeated, in seconds, in the preflight pod and at the start of a
training pod. The time is short, so that a pod that can't reach the store reports the error within a minute.
"""
HUB_SECONDS = 20.0
"""Time-out in seconds for the connection to the Hugging Face Hub, and for each wait for the next bytes, while a byte
range of a file is read."""
STORE_BUDGET_SECONDS = 300.0
"""How long a failing request to the object store is repeated, in seconds, before the run ends with exit code 75."""
BACKGROUND_BUDGET_SECONDS = 900.0
"""How long a failing request of a background upload is repeated, in seconds, before the run ends with exit code 75.
Training continues meanwhile.
"""
STOP_COMMIT_SECONDS = 60.0
"""How long a run that received SIGTERM waits for the COMMIT of its last checkpoint, in seconds. The value is shorter
than the pod's termination grace period of 90 s.
"""
PEER_WAIT_SECONDS = 300.0
"""How long a pod waits for the DNS name of rank 0, and then for the other ranks, in seconds. The time is long, because
nodes may need minutes to pull the image.
"""
FROZEN_SECONDS = 60.0
"""The launcher kills a worker whose last heartbeat is older than `stability.stallTimeoutSeconds` plus this many
seconds.
"""
PEERS_LEAVE_SECONDS = 30.0
"""After a worker failed, the other workers of the pod have this many seconds to exit before the launcher kills them."""
ALL_LEAVE_SECONDS = 120.0
"""After a worker succeeded or stopped because of SIGTERM, the other workers of the pod have this many seconds to exit
before the launcher kills them. The time is long, because these other workers may still be writing files."""
