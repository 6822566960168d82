"""A field of `config.json` that changes how a model answers, or what it returns beside the logits, does not change what
the trainer computes, or is refused by its name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from finetune_core.errors import UserError
from finetune_trainer.checkpoints.export import save_model_configuration
from finetune_trainer.data.batches import collate
from finetune_trainer.data.examples import Example
from finetune_trainer.loss.objective import Objective
from finetune_trainer.model.configuration import load_configuration
from finetune_trainer.model.load import load_base
from tests.trainer.exporting import options_of
from tests.trainer.families import write_family

HARMLESS: dict[str, Any] = {
    "return_dict": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_router_logits": True,
    "gradient_checkpointing": True,
    "chunk_size_feed_forward": 2,
    "torchscript": True,
    "pruned_heads": {"0": [1]},
    "problem_type": "regression",
    "is_decoder": True,
    "add_cross_attention": False,
    "use_cache": True,
    "tie_last_hidden_states": False,
    "loss_type": "ForSequenceClassification",
}
"""Fields with values that are not the default, with which the trainer computes the same loss."""
REFUSED: dict[str, Any] = {
    "is_decoder": False,
    "is_causal": False,
    "is_encoder_decoder": True,
    "use_bidirectional_attention": True,
    "use_return_dict": False,
}
"""Fields with values that the trainer refuses."""
FAMILIES = ("llama-2", "mixtral", "gpt-2")


def configured(family: str, folder: Path, **fields: Any) -> Path:
    write_family(family, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | fields))
    return folder


def loss(folder: Path) -> tuple[float, bool]:
    """Return the trainer's loss of two examples, and whether the model computes activations a second time."""
    model = load_base(folder, torch.float32)
    keyed = [[(Example((4, 9, 17, 25, 33, 41, 1), [(3, 7)]), 0)], [(Example((5, 12, 19, 26, 1), [(2, 5)]), 1)]]
    found = Objective(model).loss(model.train(), collate(keyed, pad=1, packed=False))
    found.backward()
    return float(found.detach()), model.is_gradient_checkpointing


@cache
def plain_loss(family: str) -> float:
    with TemporaryDirectory() as folder:
        return loss(configured(family, Path(folder)))[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", HARMLESS)
def test_a_field_of_the_configuration_does_not_change_the_loss(name: str, family: str, tmp_path: Path) -> None:
    assert loss(configured(family, tmp_path, **{name: HARMLESS[name]})) == (plain_loss(family), False)


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_makes_another_kind_of_model_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    configured("llama-2", tmp_path, **{name: REFUSED[name]})
    with pytest.raises(UserError, match=rf"config\.json.*({name}|encoder)"):
        load_configuration(tmp_path, "model")


def test_an_artifact_keeps_the_fields_as_the_base_model_has_them(tmp_path: Path) -> None:
    configured("llama-2", tmp_path, **HARMLESS)
    (tmp_path / "artifact").mkdir()
    save_model_configuration(tmp_path / "artifact", options_of(tmp_path))
    found = json.loads((tmp_path / "artifact" / "config.json").read_bytes())
    assert {name: found[name] for name in HARMLESS} == HARMLESS
