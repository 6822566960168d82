"""Environment variables and file paths that a training pod gets from the operator, in addition to the run file.

The operator's `objects/` sets the variables and mounts the files and folders, and the trainer uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, ValidationError

from finetune_core.api.status import ATTEMPT_LIMIT
from finetune_core.contract.contract_model import ContractModel
from finetune_core.errors import UserError

RUN_FOLDER = "/etc/finetune"
RUN_FILE = f"{RUN_FOLDER}/run.json"
CA_FILE = f"{RUN_FOLDER}/ca.crt"
"""Path of the CA certificates with which the trainer verifies the certificate of the operator's report server. The file
is a key of the attempt's ConfigMap."""
NONCE_FILE = f"{RUN_FOLDER}/nonce"
"""Path of a random text (nonce) that differs in every attempt. The file is a key of the attempt's ConfigMap. The pods
of an attempt with several nodes prove to each other that they know the nonce. The nonce is not a field of the run file,
because a trainer image of an older version refuses a run file with a field that it does not know."""
ACCESS_KEY_ID = "AWS_ACCESS_KEY_ID"
SECRET_ACCESS_KEY = "AWS_SECRET_ACCESS_KEY"  # noqa: S105  (the name of a variable)
SESSION_TOKEN = "AWS_SESSION_TOKEN"  # noqa: S105  (the name of a variable)
"""Each of the three names above is a key of the job's credentials Secret, the name of a mounted file, and an
environment variable of the AWS SDKs."""
CREDENTIALS_FOLDER = "/var/run/secrets/finetune.dev/storage"
"""Folder with the files AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and optionally AWS_SESSION_TOKEN from the job's
Secret."""
WEB_IDENTITY_FILE = "/var/run/secrets/finetune.dev/identity/token"
"""Path of the projected service-account token of `storage.identity`. The kubelet renews the token."""
WEB_IDENTITY_FILE_VARIABLE = "AWS_WEB_IDENTITY_TOKEN_FILE"
STS_ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL_STS"
ROLE_ARN_VARIABLE = "AWS_ROLE_ARN"
"""The three names above are environment variables of the AWS SDKs: for the path of the service-account token, for the
address of the security token service, and for the role."""
STORAGE_CA_FILE = "/etc/finetune-storage/ca.crt"
"""Path of the object store's CA certificates, from `storage.caConfigMapRef`. Where the file does not exist, the CA
certificates in the image are used."""
HUB_DATA_TOKENS_FOLDER = "/var/run/secrets/finetune.dev/hub-data"
"""Folder with the Hugging Face tokens for gated data sets and for a gated adapter. Each file is named after the field
of the spec that needs the token, for example `dataset.train` or `model.adapter`."""
HUB_TOKEN_FILE = "/var/run/secrets/finetune.dev/hub/token"  # noqa: S105  (a path)
"""Path of the Hugging Face token for a gated base model."""
TOKEN_FILE = "/var/run/secrets/finetune.dev/report/token"  # noqa: S105  (a path)
"""Path of the projected service-account token that authenticates a pod's reports. The kubelet renews the token."""
TERMINATION_LOG = "/dev/termination-log"
"""File whose content the kubelet copies into the pod's status when the container ends."""
SCRATCH_FOLDER = "/scratch"
"""Path at which a writable volume of the pod's own is mounted. This folder is the pod's HOME. The folder contains
downloaded files, and the files of checkpoints until they are uploaded."""
VOLUMES_FOLDER = "/var/run/finetune/volumes"
"""Folder below which PersistentVolumeClaims with the model, the adapter or data files are mounted read-only, each at
`<this folder>/<name of the claim>`."""
MODEL_CACHE_FOLDER = "/var/run/finetune/model-cache"
"""Path at which the claim of `storage.cache.claimName` is mounted. Where the folder does not exist, the job does not
set this field."""
MODEL_VOLUME_FOLDER = "/var/run/finetune/model"
"""Path at which the volume of `storage.cache.ephemeral` is mounted. Where the folder does not exist, the files of the
model are put into the scratch folder."""


class Identity(ContractModel):
    """The job and the attempt that a pod belongs to, read from environment variables."""

    namespace: str
    name: str
    uid: str
    attempt: Annotated[int, Field(ge=1, le=ATTEMPT_LIMIT)]
    pod_name: str
    pod_uid: str
    node_rank: Annotated[int, Field(ge=0)]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Identity:
        """Return the identity in ``environment``, the environment variables of the process. Raises UserError with the
        name of the variable where a variable is missing, or where the attempt is no whole number from 1 to
        ATTEMPT_LIMIT or the rank no whole number from 0 on."""
        values: dict[str, str] = {}
        for field, variable in IDENTITY_VARIABLES.items():
            value = environment.get(variable)
            if not value:
                raise UserError(f"environment variable {variable}", "must be set (the operator sets it in every pod)")
            values[field] = value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            wrong = {part for problem in error.errors() for part in problem["loc"]}
            field, wanted = (
                ("attempt", f"a whole number from 1 to {ATTEMPT_LIMIT}")
                if "attempt" in wrong
                else ("node_rank", "a whole number")
            )
            raise UserError(f"environment variable {IDENTITY_VARIABLES[field]}", f"must be {wanted}") from error


IDENTITY_VARIABLES: Mapping[str, str] = {
    "namespace": "FTJ_NAMESPACE",
    "name": "FTJ_NAME",
    "uid": "FTJ_UID",
    "attempt": "FTJ_ATTEMPT",
    "pod_name": "FTJ_POD_NAME",
    "pod_uid": "FTJ_POD_UID",
    "node_rank": "PET_NODE_RANK",
}
"""For each field of `Identity`, the name of the environment variable that holds its value."""
MASTER_ADDR_VARIABLE = "PET_MASTER_ADDR"
MASTER_PORT_VARIABLE = "PET_MASTER_PORT"
CPU_REQUEST_VARIABLE = "FTJ_CPU_REQUEST"
"""Environment variable with the CPU request of the training container, in thousandths of a CPU, for example `8000`. The
kubelet sets the value, so it is right also where a webhook has changed the request. Where no operator has made the pod,
the variable does not exist."""
MASTER_PORT = 23456
"""TCP port of the pod of rank 0 for the rendezvous of torch.distributed. With several nodes the launcher of this pod
listens there, and forwards the connections of the other pods to rank 0. With one node rank 0 itself listens there."""
