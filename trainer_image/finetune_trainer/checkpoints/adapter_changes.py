"""Computes what an adapter changes in the weights of its base model. `export.py` applies the changes when it merges an
adapter into the base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from finetune_trainer.model.adapters import adapted_weight


@dataclass(frozen=True)
class WeightDelta:
    """What an adapter changes in one weight of the base model. To a weight of shape (O, I) it adds scale * B @ A, with
    A of shape (r, I) and B of shape (O, r).

    The product is transposed for an embedding, and for a layer that stores its weight in the shape (I, O), such as
    GPT-2's Conv1D.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool = False
    magnitude: torch.Tensor | None = None
    """With DoRA, the norm that each row of the changed weight gets (each column if `transposed`), in the shape (O,).
    None without DoRA."""
    experts: int | None = None
    """Number of experts E where the weight holds the matrices of all experts, in the shape (E, O, I), or (E, I, O) if
    it is transposed. A then has the shape (E * r, I), and its row e * r + k belongs to expert e, for each k below r. B
    has the shape (O, r * E), and its column k * E + e belongs to expert e. None for other weights."""
    replaces: bool = False

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the new value of the weight in fp32. ``weight`` is the value in the base model."""
        changed = weight.float() + (self._product().mT if self.transposed else self._product())
        if self.magnitude is None:
            return changed
        rows = changed.T if self.transposed else changed
        scaled = rows * (self.magnitude.float() / torch.linalg.norm(rows, dim=1)).unsqueeze(1)
        return scaled.T if self.transposed else scaled

    def _product(self) -> torch.Tensor:
        a, b = self.a.float(), self.b.float()
        if self.experts is None:
            return b @ a * self.scale
        of_experts = a.reshape(self.experts, -1, a.shape[1])
        return torch.einsum("ore,eri->eoi", b.reshape(b.shape[0], -1, self.experts), of_experts) * self.scale


def adapter_changes(model: PeftModel, weights: Mapping[str, torch.Tensor]) -> dict[str, WeightDelta]:
    """Return what the adapters of ``model`` change in each adapted weight, by the name that the weight has as a
    parameter of the base model. ``weights`` has the values of the adapters' parameters, by their names in ``model``."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        embedding = "default" in module.lora_embedding_A
        is_parameter = isinstance(module, ParamWrapper)
        matrix = "lora_embedding_{}.default" if embedding else "lora_{}.default.weight"
        stacked = is_parameter and module._param_ndim == 3
        found[adapted_weight(name, module)] = WeightDelta(
            a=weights[f"{name}.{matrix.format('A')}"],
            b=weights[f"{name}.{matrix.format('B')}"],
            scale=module.scaling["default"],
            transposed=not module._did_swap_in_out_features
            if stacked
            else embedding or bool(getattr(module, "fan_in_fan_out", False)),
            magnitude=weights.get(f"{name}.lora_magnitude_vector.default.weight"),
            experts=module.num_experts if stacked else None,
        )
    return found
