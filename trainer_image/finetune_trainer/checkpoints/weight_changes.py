"""What a run changes in the weights of its base model. The trained values of a full run replace the weights. What an
adapter changes is computed in `adapter_changes.py`. `export.py` applies the changes when it writes a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from finetune_trainer.engine.engine import MASTER
from finetune_trainer.storage.checkpoint_folders import STATE_GLOB


class WeightChange(Protocol):
    """What a run changes in one parameter of the base model."""

    @property
    def replaces(self) -> bool:
        """Return whether the new value does not depend on the value in the base model."""

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the new value in fp32. ``weight`` is the value in the base model. If `replaces` is true, ``weight`` is
        not used, and may be a tensor without elements."""


@dataclass(frozen=True)
class TrainedValue:
    """The value of a parameter in a checkpoint, which replaces the value in the base model. The value is read from the
    file only in `applied_to`."""

    file: Path
    name: str
    replaces: bool = True

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the trained value in fp32."""
        with safe_open(self.file, framework="pt") as file:
            value: torch.Tensor = file.get_tensor(f"{self.name}/{MASTER}")
        return value


def trained_values(checkpoint: Path) -> dict[str, TrainedValue]:
    """Return the values of all trained parameters of the checkpoint in folder ``checkpoint`` by name."""
    found = {}
    for path in sorted(checkpoint.glob(STATE_GLOB)):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (no mapping)
                name, _, kind = key.rpartition("/")
                if kind == MASTER:
                    found[name] = TrainedValue(path, name)
    return found
