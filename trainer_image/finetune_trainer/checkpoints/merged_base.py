"""Writes a copy of a base model into which an adapter is merged, so that the rest of the trainer sees one ordinary
model folder. `preparation.py` calls `write_merged_base` before any model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_core.errors import UserError
from finetune_trainer.checkpoints.adapter_changes import adapter_changes
from finetune_trainer.checkpoints.export import save_weights
from finetune_trainer.checkpoints.weight_changes import WeightChange
from finetune_trainer.model.adapter_fit import FittedAdapter
from finetune_trainer.model.extended_base import copy_text_files
from finetune_trainer.model.given_adapter import FIELD
from finetune_trainer.model.structure import ModelStructure
from finetune_trainer.model.tensor_names import TensorNames
from finetune_trainer.model.weight_files import WeightFiles


@dataclass(frozen=True)
class ReplacedWeight:
    """A whole weight that the adapter holds in place of a weight of the base model. It is read when it is used."""

    fitted: FittedAdapter
    stored: str
    replaces: bool = True

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the new value in fp32."""
        return self.fitted.tensor(self.stored).float()


def write_merged_base(
    source: Path, target: Path, structure: ModelStructure, fitted: FittedAdapter, dtype: torch.dtype
) -> None:
    """Merge the adapter ``fitted`` into the model in the folder ``source``, and write the merged model into the new
    folder ``target``. ``structure`` is the structure of the model. Sums are computed in fp32 and rounded once to
    ``dtype``.

    Raises UserError where a number of the adapter or of a changed weight is not finite.
    """
    target.mkdir(parents=True)
    weights = WeightFiles.of(source)
    names = TensorNames(structure.model, weights.shapes)
    deltas = adapter_changes(fitted.model, {name: fitted.weight(name) for name in fitted.places})
    # An adapter may hold a whole weight beside matrices for it. The matrices then belong to the whole weight.
    changes: dict[str, WeightChange] = dict(deltas)
    for parameter, stored in fitted.replaced.items():
        whole = ReplacedWeight(fitted, stored)
        changes[parameter] = whole if parameter not in deltas else _Both(whole, deltas[parameter])
    checked = {parameter: _Finite(parameter, change, dtype) for parameter, change in changes.items()}
    save_weights(weights, names, checked, target, dtype)
    copy_text_files(source, target)


@dataclass(frozen=True)
class _Both:
    """A whole weight, and matrices that change it."""

    first: WeightChange
    second: WeightChange
    replaces: bool = True

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the new value in fp32."""
        return self.second.applied_to(self.first.applied_to(weight))


@dataclass(frozen=True)
class _Finite:
    """A change of a weight whose result must be finite in the data type of the merged model."""

    parameter: str
    change: WeightChange
    dtype: torch.dtype

    @property
    def replaces(self) -> bool:
        """Return whether the new value does not depend on the value in the base model."""
        return self.change.replaces

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the new value in fp32. Raises UserError where a number in it is not finite."""
        changed = self.change.applied_to(weight)
        if not torch.isfinite(changed.to(self.dtype)).all():
            raise UserError(
                FIELD, f"can't be merged: {self.parameter} of the merged model would hold numbers that are not finite"
            )
        return changed
