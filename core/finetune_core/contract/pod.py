"""What the operator tells a pod besides the run file: who it is, by environment, and where its files lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from finetune_core.api.status import ATTEMPT_LIMIT
from finetune_core.contract.contract_model import ContractModel
from finetune_core.errors import UserError

RUN_FOLDER = "/etc/finetune"
RUN_FILE = f"{RUN_FOLDER}/run.json"
CA_FILE = f"{RUN_FOLDER}/ca.crt"
"""CA bundle of the operator's report server: a key of the attempt's ConfigMap."""
CREDENTIALS_FOLDER = "/var/run/secrets/finetune.dev/storage"
"""Files AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and optionally AWS_SESSION_TOKEN, from the job's Secret."""
STORAGE_CA_FILE = "/etc/finetune-storage/ca.crt"
"""Certificates that sign the store's, from `storage.caConfigMapRef`; absent: those of the image."""
HUB_DATA_TOKENS_FOLDER = "/var/run/secrets/finetune.dev/hub-data"
"""Tokens for gated data sets, each in a file with the field path of its source, such as `dataset.train`."""
HUB_TOKEN_FILE = "/var/run/secrets/finetune.dev/hub/token"  # noqa: S105  (a path)
TOKEN_FILE = "/var/run/secrets/finetune.dev/report/token"  # noqa: S105  (a path)
"""Projected service-account token for reports; the kubelet renews it."""
TERMINATION_LOG = "/dev/termination-log"
SCRATCH_FOLDER = "/scratch"
"""Writable emptyDir of the pod: HOME, downloads, snapshots."""
VOLUMES_FOLDER = "/var/run/finetune/volumes"
"""A claim `name` that model or data come from is mounted read-only at `<folder>/<name>`."""


class Identity(ContractModel):
    """Which attempt of which job a pod belongs to; from the environment."""

    namespace: str
    name: str
    uid: str
    attempt: Annotated[int, Field(ge=1, le=ATTEMPT_LIMIT)]
    pod_name: str
    pod_uid: str
    node_rank: Annotated[int, Field(ge=0)]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Identity:
        """Read the identity; raises UserError that names a missing or malformed variable."""
        values: dict[str, str] = {}
        for field, variable in IDENTITY_VARIABLES.items():
            value = environment.get(variable)
            if not value:
                raise UserError(f"environment variable {variable}", "must be set (the operator sets it in every pod)")
            values[field] = value
        for number in ("attempt", "node_rank"):
            if not values[number].isdigit():
                raise UserError(f"environment variable {IDENTITY_VARIABLES[number]}", "must be a whole number")
        return cls.model_validate(values)


IDENTITY_VARIABLES: Mapping[str, str] = {
    "namespace": "FTJ_NAMESPACE",
    "name": "FTJ_NAME",
    "uid": "FTJ_UID",
    "attempt": "FTJ_ATTEMPT",
    "pod_name": "FTJ_POD_NAME",
    "pod_uid": "FTJ_POD_UID",
    "node_rank": "PET_NODE_RANK",
}
MASTER_ADDR_VARIABLE = "PET_MASTER_ADDR"
MASTER_PORT_VARIABLE = "PET_MASTER_PORT"
MASTER_PORT = 23456
