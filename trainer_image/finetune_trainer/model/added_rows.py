"""The embedding rows of the tokens that a job adds to the base model.

`preparation.py` records where the rows lie, and `checkpoints/export.py` writes the rows into the folder of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from finetune_core.contract import ContractModel
from finetune_core.errors import UserError
from finetune_trainer.model.weight_files import WeightFiles

INPUT_ROWS, OUTPUT_ROWS = "input_embeddings", "output_embeddings"
"""Tensor names of the rows in `new_embeddings.safetensors`, a file in the folder of an adapter."""


class AddedRows(ContractModel):
    """Where the embedding rows of added tokens lie in the base model's weight files."""

    ids: list[int]
    """Token ids of the added tokens, which are also their row numbers."""
    input_key: str
    """Tensor name of the input embedding, for example `model.embed_tokens.weight`."""
    output_key: str | None = None
    """Tensor name of the output head, for example `lm_head.weight`. None where the output head began with the same rows
    as the input embedding, because then the rows of the input embedding are enough."""


def read_added_rows(base: Path, rows: AddedRows, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Read the rows of the added tokens from the model in folder ``base``, and return them in ``dtype``. The input
    embedding's rows have the name INPUT_ROWS, and the output head's rows, where ``rows`` names their tensor,
    OUTPUT_ROWS. Each tensor has the shape (added tokens, hidden size)."""
    weights = WeightFiles.of(base)
    found = {INPUT_ROWS: weights.rows(rows.input_key, rows.ids).to(dtype)}
    if rows.output_key is not None:
        found[OUTPUT_ROWS] = weights.rows(rows.output_key, rows.ids).to(dtype)
    return found


def check_mergeable(names: Sequence[str], base: Path) -> None:
    """Raise UserError where the files of the base model lack one of the weights ``names``. The adapter of such a weight
    can't be merged. This happens with model families that name their weights differently in files and in modules."""
    files = WeightFiles.of(base).files
    absent = next((name for name in names if name not in files), None)
    if absent is not None:
        raise UserError("storage.artifact", f"must be Adapter: the model's files have no tensor {absent} to merge into")
