"""What a run changes in the weights of its base model: a full run replaces them, an adapter adds to them.

`export.py` applies the changes when it writes a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from finetune_trainer.engine.engine import MASTER
from finetune_trainer.storage.checkpoint_folders import STATE_GLOB

PEFT_PREFIX = "base_model.model."
"""Prefix that peft puts before the names of all modules of the base model."""


class WeightChange(Protocol):
    """What a run changes in one parameter of the base model."""

    @property
    def replaces(self) -> bool:
        """Return whether the new value does not depend on the value in the base model."""

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the new value in fp32. ``weight`` is the value in the base model, or an empty tensor of any shape
        where the change replaces it."""


@dataclass(frozen=True)
class TrainedValue:
    """The value of a parameter in a checkpoint, which replaces the value in the base model. It is read when it is
    used."""

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


@dataclass(frozen=True)
class WeightDelta:
    """What an adapter adds to one weight (O, I) of the base model: scale * B @ A, with A (r, I) and B (O, r).

    The product is transposed for an embedding, and for a layer that stores its weight as (I, O), such as GPT-2's
    Conv1D.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool
    replaces: bool = False

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ``weight`` plus the delta, in fp32."""
        delta = self.b.float() @ self.a.float() * self.scale
        return weight.float() + (delta.T if self.transposed else delta)


def adapter_changes(model: PeftModel, weights: Mapping[str, torch.Tensor]) -> dict[str, WeightDelta]:
    """Return what the adapters of ``model`` change in each adapted weight, by the weight's parameter name in the base
    model. ``weights`` holds the adapters' values by parameter name of ``model``."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        embedding = "default" in module.lora_embedding_A
        a, b = (
            ("lora_embedding_A.default", "lora_embedding_B.default")
            if embedding
            else (
                "lora_A.default.weight",
                "lora_B.default.weight",
            )
        )
        found[f"{name.removeprefix(PEFT_PREFIX)}.weight"] = WeightDelta(
            weights[f"{name}.{a}"],
            weights[f"{name}.{b}"],
            module.scaling["default"],
            embedding or bool(getattr(module, "fan_in_fan_out", False)),
        )
    return found
