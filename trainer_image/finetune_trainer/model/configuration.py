"""Loads `config.json` of a base model. The preflight check and `structure.py` call `load_configuration`.

The module does not import torch, because the preflight pod works without torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import first_line, library_boundary

COUNTS = {"num_hidden_layers": 2_000, "num_experts": 10_000, "num_local_experts": 10_000, "n_routed_experts": 10_000}
"""Fields of a configuration by which transformers repeats parts of a model, and their largest values. The largest
published models have 126 layers and 512 experts. A model with a billion of them would never be built."""


def load_configuration(folder: Path, field: str) -> Any:
    """Return the configuration of the model in ``folder``. ``field`` is the path in the spec that messages name.

    Raises UserError if transformers can't read the configuration, or if it describes a model that nobody can build.
    """
    # transformers raises whatever a wrong file makes its code raise.
    with library_boundary(lambda error: UserError(field, f"its config.json can't be used: {first_line(error)}")):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        counts = {name: getattr(text, name, None) for name in COUNTS}
    for name, count in counts.items():
        if isinstance(count, int | float) and not 0 <= count <= COUNTS[name]:
            raise UserError(field, f"its config.json can't be used: {name} must be between 0 and {COUNTS[name]}")
    return config


def model_context(config: Any) -> int | None:
    """Return the longest sequence in tokens that a model with the configuration ``config`` can read. None if the
    configuration names no limit."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None
