"""The rows that added tokens have in the embeddings of the base model.

`preparation.py` records where the rows lie, and `checkpoints/export.py` writes them beside an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from finetune_core.contract import ContractModel
from finetune_core.errors import UserError
from finetune_trainer.model.weight_files import WeightFiles

INPUT_ROWS, OUTPUT_ROWS = "input_embeddings", "output_embeddings"
"""Tensor names under which the rows are stored beside an adapter."""


class AddedRows(ContractModel):
    """Where the embedding rows of added tokens lie in the base model's weight files."""

    ids: list[int]
    """Token ids of the added tokens, which are the row numbers."""
    input_key: str
    """Tensor name of the input embedding, for example `model.embed_tokens.weight`."""
    output_key: str | None = None
    """Tensor name of the output head, for example `lm_head.weight`. None where both embeddings began with the same
    rows, which are then stored once."""


def read_added_rows(base: Path, rows: AddedRows, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the rows of the added tokens in ``dtype``, each tensor of shape (added tokens, hidden size)."""
    weights = WeightFiles.of(base)
    found = {INPUT_ROWS: weights.rows(rows.input_key, rows.ids).to(dtype)}
    if rows.output_key is not None:
        found[OUTPUT_ROWS] = weights.rows(rows.output_key, rows.ids).to(dtype)
    return found


def check_mergeable(names: Sequence[str], base: Path) -> None:
    """Raise UserError where one of the weights ``names`` is not in the files of the base model, so that its adapter
    can't be merged. Some model families use other names in files than in modules."""
    files = WeightFiles.of(base).files
    absent = next((name for name in names if name not in files), None)
    if absent is not None:
        raise UserError("storage.artifact", f"must be Adapter: the model's files have no tensor {absent} to merge into")
