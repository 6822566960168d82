"""Writes artifacts of tiny models that were not trained, but whose values a test has changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from finetune_core.api.storage import Export
from finetune_trainer.checkpoints.export import ExportOptions, export_artifact
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.model.load import trained_parameters
from finetune_trainer.model.structure import read_structure
from finetune_trainer.model.tensor_names import TensorNames
from finetune_trainer.model.weight_files import WeightFiles


def load_whole(folder: Path) -> Any:
    """Load the model in ``folder`` with plain transformers, in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def change_values(model: torch.nn.Module, seed: int = 5) -> None:
    """Change all trained parameters of ``model`` a little, as a training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def options_of(base: Path, *, kind: Export = "Adapter", **changes: Any) -> ExportOptions:
    """Return the options for the export of a model whose base model is in ``base``. ``changes`` replaces fields of the
    options."""
    if "names" not in changes:
        changes["names"] = TensorNames(read_structure(base).model, WeightFiles.of(base).shapes)
    given: dict[str, Any] = {
        "kind": kind, "precision": "fp32", "base": base, "base_name": "tiny", "added_rows": None, "stop_ids": [1],
    }  # fmt: skip
    return ExportOptions(**(given | changes))


def export(model: torch.nn.Module, base: Path, folder: Path, *, kind: Export = "Adapter", **changes: Any) -> Path:
    """Export ``model``, whose base model is in ``base``, below ``folder``. Return the artifact's folder."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    values: Mapping[str, torch.Tensor] = {
        f"{name}/master": parameter.detach().float() for name, parameter in trained_parameters(model).items()
    }
    save_file(dict(values), checkpoint / "state-00000-of-00001.safetensors")
    export_artifact(
        model, load_tokenizer(base), checkpoint, folder / "artifact", options_of(base, kind=kind, **changes)
    )
    return folder / "artifact"


def same_logits(first: Any, second: Any) -> float:
    """Return the largest difference between the logits of two models for the same tokens."""
    ids = torch.tensor([[4, 9, 33, 12, 7, 21]])
    with torch.no_grad():
        return float((first(input_ids=ids).logits - second(input_ids=ids).logits).abs().max())
