"""Finds the object store of a job, and the access key for it. The commands that read the bucket call `store_of`."""

from __future__ import annotations

import os

from finetune_cli.apiserver.job_client import JobClient
from finetune_cli.bucket.object_store import ObjectStoreReader, access_key_from
from finetune_core.api.job import FineTuneJob
from finetune_core.contract.pod import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from finetune_core.errors import UserError


def store_of(job: FineTuneJob, jobs: JobClient, endpoint: str | None = None) -> ObjectStoreReader:
    """Return a reader of the job's object store. The access key is that of the environment variables or, where these
    hold no key, that of the Secret that the job names. ``endpoint``, where it is given, replaces the address of the
    store. Raises UserError where no access key is found, and where the CA certificates that the job names are
    missing."""
    storage = job.spec.storage
    keys = access_key_from(os.environ)
    if keys is None:
        if storage.credentials_secret_ref is None:
            raise UserError(
                "environment", f"must have {ACCESS_KEY_ID} and {SECRET_ACCESS_KEY}: the job names no Secret"
            )
        name = storage.credentials_secret_ref.name
        keys = access_key_from(jobs.secret(name))
        if keys is None:
            raise UserError(
                f"Secret {job.metadata.namespace}/{name}", f"must have the keys {ACCESS_KEY_ID} and {SECRET_ACCESS_KEY}"
            )
    reference = storage.ca_config_map_ref
    certificates = jobs.config_map(reference.name).get(reference.key) if reference else None
    if reference and not certificates:
        raise UserError(f"ConfigMap {job.metadata.namespace}/{reference.name}", f"must have the key {reference.key}")
    return ObjectStoreReader(storage, keys, endpoint, certificates)
