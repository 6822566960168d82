"""The embedding rows of the tokens that a job adds to the base model.

`preparation.py` records where the rows lie, and `checkpoints/export.py` writes the rows into the folder of an adapter.
"""

from __future__ import annotations

from pathlib import Path

import torch

from finetune_core.contract import ContractModel
from finetune_core.errors import UserError
from finetune_trainer.model.structure import ModelStructure
from finetune_trainer.model.tensor_names import TensorNames
from finetune_trainer.model.weight_files import WeightFiles

INPUT_ROWS, OUTPUT_ROWS = "input_embeddings", "output_embeddings"
"""Tensor names of the rows in `new_embeddings.safetensors`, a file in the folder of an adapter."""


class AddedRows(ContractModel):
    """Where the embedding rows of added tokens lie in the weight files of the extended base model."""

    ids: list[int]
    """Token ids of the added tokens, which are also their row numbers."""
    input_key: str
    """Tensor name of the input embedding, for example `model.embed_tokens.weight`."""
    output_key: str | None = None
    """Tensor name of the output head, for example `lm_head.weight`. None where the output head began with the same rows
    as the input embedding, because then the rows of the input embedding are enough."""


def find_added_rows(structure: ModelStructure, names: TensorNames, ids: list[int], *, shared: bool) -> AddedRows:
    """Return where the rows ``ids`` lie in the weight files of an extended base model. ``names`` describes the tensors
    in these files, and ``structure`` is the structure of the base model. ``shared`` says that both embeddings begin
    with the same rows. Raises UserError where the files lack the input embedding."""
    keys = []
    for module in (structure.input_name, structure.output_name):
        parameter = f"{module}.weight"
        copies = names.copies(parameter) if module is not None else {}
        keys.append(copies.get(parameter) or next(iter(copies.values()), None))
    input_key, output_key = keys
    if input_key is None:
        raise UserError("model.addedTokens", "must be empty: the model's files have no tensor for the input embedding")
    return AddedRows(ids=ids, input_key=input_key, output_key=None if shared else output_key)


def read_added_rows(base: Path, rows: AddedRows, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Read the rows of the added tokens from the extended base model in folder ``base``, and return them in ``dtype``.
    The rows of the input embedding have the key INPUT_ROWS. Where ``rows`` names a tensor of the output head, its rows
    have the key OUTPUT_ROWS. Each tensor has the shape (added tokens, hidden size)."""
    weights = WeightFiles.of(base)
    found = {INPUT_ROWS: weights.rows(rows.input_key, rows.ids).to(dtype)}
    if rows.output_key is not None:
        found[OUTPUT_ROWS] = weights.rows(rows.output_key, rows.ids).to(dtype)
    return found
