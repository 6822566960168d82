"""Checks that the object store supports the requests of a run: an object is created, read back, protected from a second
creation, and deleted. `preflight/entrypoint.py` calls `check_store`.
"""

from __future__ import annotations

import secrets

from finetune_core.errors import UserError
from finetune_core.layout import probe_key
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.storage.root import RunRoot


def check_store(root: RunRoot) -> None:
    """Create, read and delete a test object in the folder of the job's runs.

    Raises OutsideFailure if the store refuses a request or can't be reached. Raises UserError if the store ignores
    `If-None-Match`, because two attempts could then overwrite each other's objects.
    """
    key = probe_key(secrets.token_hex(8))
    first, second = b"written by the preflight check", b"must not replace what is there"
    root.create(key, first)
    try:
        if root.read(key) != first:
            raise OutsideFailure(f"storage.uri: {root.uri(key)} was written and can't be read back")
        if root.create(key, second) or root.read(key) != first:
            raise UserError(
                root.store.field,
                f"{root.store.endpoint} must honour If-None-Match (conditional writes), and it replaced an object"
                " in spite of it: two attempts could overwrite each other's checkpoints",
            )
    finally:
        root.delete([key])
