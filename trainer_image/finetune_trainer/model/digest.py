"""The base model under a LoRA run, as a digest: a checkpoint holds none of its weights, so what it is resumed on must
be what it was trained on. Rank 0 computes and compares it at every start.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_core.contract import ContractModel
from finetune_core.errors import UserError
from finetune_trainer.storage.checkpoint_folders import TrainerState

CHUNK_BYTES = 4 << 20
PARALLEL_FILES = 4


def base_digest(folder: Path) -> str:
    """Return the sha256 over names and contents of the weights in a model folder, whatever their order on disk.

    Every byte is read; they were just fetched, or are about to be loaded, so they lie in the page cache.
    """
    files = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        digests = list(pool.map(_file_digest, files))
    return hashlib.sha256(
        "".join(f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True)).encode()
    ).hexdigest()


def _file_digest(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


class Ground(ContractModel):
    """What a LoRA run stands on and its checkpoints don't hold."""

    base_sha256: str | None = None
    """Digest of the base model's weights; None for a full run, whose checkpoints hold every weight."""
    rows_sha256: str | None = None
    """Digest of the base extended by the rows of added tokens, as they were drawn from the seed; None without."""

    @classmethod
    def of(cls, *, adapters: bool, base: Path, extended: Path) -> Ground:
        """Digest the folders of the base and of the extended base, which are the same where nothing is added."""
        if not adapters:
            return cls()
        return cls(base_sha256=base_digest(base), rows_sha256=base_digest(extended) if extended != base else None)

    def check(self, state: TrainerState, *, seed: int) -> None:
        """Raise UserError where the checkpoint of ``state`` was trained on something else, or from another seed."""
        if state.seed != seed:
            raise UserError(
                "training.seed", f"is {seed}, but the checkpoint of step {state.step} was trained with {state.seed}"
            )
        for mine, other, what in (
            (self.base_sha256, state.base_sha256, "the base model's weights"),
            (self.rows_sha256, state.rows_sha256, "the base model with the rows of the added tokens"),
        ):
            if mine is not None and other is not None and mine != other:
                raise UserError(
                    "model",
                    f"is not what the checkpoint of step {state.step} was trained on: the sha256 of {what} is"
                    f" {mine[:12]}…, not {other[:12]}…; name that revision again, or another storage.runId",
                )
