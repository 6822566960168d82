"""Writes adapters as plain peft saves them, for tests of jobs that start from an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.trainer.exporting import load_whole
from tests.trainer.plain_loop import DENSE

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


def write_adapter(base: Path, folder: Path, *, seed: int = 3, **config: Any) -> Path:
    """Write an adapter of the model in ``base`` with random values to ``folder``, and return the folder. ``config`` are
    fields of peft's LoraConfig."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": DENSE, "task_type": "CAUSAL_LM", **config}
    tuned = get_peft_model(load_whole(base), LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    tuned.peft_config["default"].base_model_name_or_path = "s3://models/tiny"
    tuned.save_pretrained(str(folder))
    return folder


def with_config(**changes: Any) -> Callable[[Path], None]:
    """Return a function that changes fields of `adapter_config.json` in a folder. The value None makes a field null."""

    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def with_tensors(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    """Return a function that lets ``change`` change the tensors of the adapter in a folder."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return rewrite
