"""Rows of added tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from finetune_core.contract import ContractModel
from finetune_core.errors import UserError
from finetune_trainer.model.weight_files import Weights

INPUT_ROWS, OUTPUT_ROWS = "input_embeddings", "output_embeddings"


class NewRows(ContractModel):
    """Where the rows of added tokens lie in the base."""

    ids: list[int]
    input_key: str
    output_key: str | None = None
    """None where both embeddings began with the same rows: they are stored once."""


def new_rows(base: Path, rows: NewRows, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the added tokens' rows (tokens, hidden) as the run computed with them."""
    weights = Weights.of(base)
    found = {INPUT_ROWS: weights.rows(rows.input_key, rows.ids).to(dtype)}
    if rows.output_key is not None:
        found[OUTPUT_ROWS] = weights.rows(rows.output_key, rows.ids).to(dtype)
    return found


def check_mergeable(names: Sequence[str], base: Path) -> None:
    """Raise UserError where an adapter's weight can't be merged into the base's files: they call it otherwise."""
    files = Weights.of(base).files
    absent = next((name for name in names if name not in files), None)
    if absent is not None:
        raise UserError("storage.artifact", f"must be Adapter: the model's files have no tensor {absent} to merge into")
