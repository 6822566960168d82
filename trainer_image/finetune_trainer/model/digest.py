"""The sha256 of the base model that a LoRA run trains on.

The checkpoint of a LoRA run holds no weight of the base model, so a run must resume on the same base model that the
checkpoint was trained on. `train.py` computes the digests on rank 0 at every start and compares them with those in the
checkpoint.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_core.contract import ContractModel
from finetune_core.errors import UserError
from finetune_trainer.model.weight_files import WeightFiles
from finetune_trainer.storage.checkpoint_folders import TrainerState

PARALLEL_FILES = 4


def base_digest(folder: Path) -> str:
    """Return the sha256 over the names and contents of the weight files of the model in ``folder``, in the order of
    their names.

    Every byte is read. Files that were just downloaded are mostly in the page cache. For other files, the reads fill
    the page cache before the model is loaded.
    """
    files = [folder / name for name in WeightFiles.of(folder).names]
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        digests = list(pool.map(_file_digest, files))
    return hashlib.sha256(
        "".join(f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True)).encode()
    ).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class BaseDigests(ContractModel):
    """Digests of the base model that a LoRA run trains on. A checkpoint stores the digests instead of the base model's
    weights."""

    base_sha256: str | None = None
    """sha256 of the base model's weights. None for a full run, whose checkpoints hold every weight."""
    rows_sha256: str | None = None
    """sha256 of the extended base model, a copy with rows for added tokens, with an untied output head or with a merged
    adapter. None where the base model was not extended, and for a full run."""

    @classmethod
    def of(cls, *, adapters: bool, base: Path, extended: Path) -> BaseDigests:
        """Compute the digests of the base model in ``base`` and of the extended base model in ``extended``. Both are
        the same folder where the base model was not extended. Without ``adapters`` no digest is computed."""
        if not adapters:
            return cls()
        return cls(base_sha256=base_digest(base), rows_sha256=base_digest(extended) if extended != base else None)

    def other_base_notice(self, adapter_base_sha256: str | None) -> list[str]:
        """Return a notice where the adapter that the run starts from says that it was trained on other weights than
        those of this base model. ``adapter_base_sha256`` is the sha256 that the adapter names; None where it names
        none."""
        mine = self.rows_sha256 or self.base_sha256
        if adapter_base_sha256 is None or mine is None or adapter_base_sha256 in (self.base_sha256, self.rows_sha256):
            return []
        return [
            "model.adapter: the adapter was trained on other weights of the base model (their sha256 is"
            f" {adapter_base_sha256[:12]}…, and here {mine[:12]}…)"
        ]

    def check(self, state: TrainerState, *, seed: int) -> None:
        """Raise UserError where a checkpoint was trained on another base model or with another seed. ``state`` is the
        training state that the checkpoint stores."""
        if state.seed != seed:
            raise UserError(
                "training.seed", f"is {seed}, but the checkpoint of step {state.step} was trained with {state.seed}"
            )
        for mine, other, what in (
            (self.base_sha256, state.base_sha256, "the base model's weights"),
            (
                self.rows_sha256,
                state.rows_sha256,
                "the base model with the rows of the added tokens or a merged adapter",
            ),
        ):
            if mine is not None and other is not None and mine != other:
                raise UserError(
                    "model",
                    f"is not what the checkpoint of step {state.step} was trained on: the sha256 of {what} is"
                    f" {mine[:12]}…, not {other[:12]}…; name that revision again, or another storage.runId",
                )
