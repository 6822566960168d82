"""Makes the artifact of a fetched checkpoint: an adapter that peft loads, or a model that transformers loads.

It is made of the verified bytes of the checkpoint and not of what the process has in memory: what is published is
what can be resumed from. Rank 0 only, no collectives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from finetune_trainer.training.engine import MASTER
from finetune_trainer.training.model import DTYPES
from finetune_trainer.training.state import stored_tensors

ADAPTER_FILE = "adapter_model.safetensors"


def export(
    model: Any, tokenizer: PreTrainedTokenizerBase, checkpoint: Path, target: Path, *, precision: str
) -> list[Path]:
    """Write the artifact of ``checkpoint`` into ``target`` and return its files.

    Weights are rounded to the run's precision, which is what the engine computed with. ``model`` gives names and
    configuration, not weights.
    """
    target.mkdir(parents=True)
    dtype = DTYPES[precision]
    weights = {name: tensors[MASTER].to(dtype) for name, tensors in stored_tensors(checkpoint, (MASTER,))}
    if isinstance(model, PeftModel):
        _export_adapter(model, weights, target)
    else:
        _export_model(model, weights, target, dtype)
    tokenizer.save_pretrained(target)
    return sorted(path for path in target.iterdir() if path.is_file())


def _export_adapter(model: PeftModel, weights: dict[str, torch.Tensor], target: Path) -> None:
    adapter = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, target / ADAPTER_FILE, {"format": "pt"})
    config = model.peft_config["default"]
    config.inference_mode = True
    # peft keeps a set, whose order differs from process to process: the same run must give the same bytes.
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(target))


def _export_model(model: Any, weights: dict[str, torch.Tensor], target: Path, dtype: torch.dtype) -> None:
    save_torch_state_dict(weights, str(target), max_shard_size="5GB")
    config = model.config
    config.dtype = dtype
    config.use_cache = True
    config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.save_pretrained(target)
