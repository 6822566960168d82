"""Checks the object store as the run will use it: an object is written, read back, refused a second time, deleted."""

from __future__ import annotations

import secrets

from finetune_core.errors import UserError
from finetune_core.layout import probe_key
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.storage.root import RunRoot


def check_store(root: RunRoot) -> None:
    """Go through an object's life below the run's root.

    Raises OutsideFailure where the store refuses or can't be reached, UserError where it ignores `If-None-Match`:
    run numbers and artifacts are fenced with it, so that two attempts would overwrite each other.
    """
    key = probe_key(secrets.token_hex(8))
    first, second = b"written by the preflight check", b"must not replace what is there"
    root.create(key, first)
    try:
        if root.read(key) != first:
            raise OutsideFailure(f"storage.uri: {root.uri(key)} was written and can't be read back")
        if root.create(key, second) or root.read(key) != first:
            raise UserError(
                "storage.endpoint",
                f"{root.store.endpoint} must honour If-None-Match (conditional writes), and it replaced an object"
                " in spite of it: two attempts could overwrite each other's checkpoints",
            )
    finally:
        root.delete([key])
