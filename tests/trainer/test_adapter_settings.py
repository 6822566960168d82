"""The settings in `adapter_config.json` of an adapter that a job starts from: each setting is taken as peft takes it,
or refused in a sentence. No regular expression in the file can hold the trainer up."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from finetune_core.errors import UserError
from finetune_trainer.model.adapter_fit import fit_adapter
from finetune_trainer.model.adapter_patterns import with_plain_names
from finetune_trainer.model.given_adapter import DESCRIPTIVE, KINDS, NEUTRAL, GivenAdapter
from finetune_trainer.model.structure import ModelStructure, read_structure
from tests.trainer import tiny
from tests.trainer.exporting import load_whole, same_logits
from tests.trainer.given_adapters import CONFIG, with_config, write_adapter
from tests.trainer.test_base_checks import model_folder
from tests.trainer.test_given_adapters import SENTENCE, adapter_folder, adapter_job, checked, trained

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    4,
    4.0,
    2.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "q_proj",
    "(",
    "\ud800\n\x1b[31m",
    [],
    ["q_proj"],
    [1],
    [[0, 1]],
    [None],
    {},
    {"q_proj": 4},
    {"q_proj": "4"},
    {"(": 4},
    {"q_proj": {"q_proj": []}},
)
"""A value of each kind that JSON has, and numbers that only Python reads."""
FIELDS = sorted(field.name for field in dataclasses.fields(LoraConfig))


@pytest.fixture(scope="module")
def tiny_structure(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelStructure, Path]:
    """The tiny Llama, and the folder of an adapter of it."""
    folder = tmp_path_factory.mktemp("fields")
    tiny.write_model(folder / "model")
    return read_structure(folder / "model"), write_adapter(folder / "model", folder / "adapter")


@pytest.mark.parametrize("field", FIELDS)
def test_any_value_of_any_field_of_peft_is_taken_or_refused_in_a_sentence(
    field: str, tiny_structure: tuple[ModelStructure, Path], tmp_path: Path
) -> None:
    structure, adapter = tiny_structure
    shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((adapter / CONFIG).read_text())
    for value in VALUES:
        (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config | {field: value}))
        sentence, scales = "model.adapter: taken", []
        try:
            fitted = fit_adapter(structure, GivenAdapter.read(tmp_path / "adapter"), rows=structure.rows)
            scales = [module.scaling["default"] for module in fitted.model.modules() if isinstance(module, LoraLayer)]
        except UserError as error:
            sentence = str(error)
        assert SENTENCE.fullmatch(sentence), (value, sentence)
        assert " object " not in sentence, (value, sentence)
        assert all(math.isfinite(scale) for scale in scales), value


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"(?:.*?(?:attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.\d{1,}\.mlp\.down)"},
        {"target_modules": r".*_proj", "exclude_modules": r".*layers\.0\..*"},
        {"rank_pattern": {r"layers\.1\..*": 2, "q_proj": 3}, "alpha_pattern": {r".*(up|down)_proj": 5.5}},
        {"rank_pattern": {r"layers\.1\..*": 2, "q_proj": 3}, "use_rslora": True},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    ids=str,
)
@pytest.mark.parametrize("use", ["Continue", "Merge"])
def test_patterns_of_an_adapter_select_what_they_select_in_peft(
    use: str, config: dict[str, Any], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"lora": {}} if use == "Continue" else {"method": "Full"}
    tried = adapter_job(tmp_path, use=use, **changes)
    folder = adapter_folder(tmp_path, **config)
    assert checked(tried)[0] == ""
    _, model = trained(tried)
    plain = PeftModel.from_pretrained(load_whole(model_folder(tmp_path)), folder)
    assert same_logits(model.eval(), plain.eval()) < 1e-6


def test_of_several_keys_that_fit_a_module_the_first_counts_also_after_an_export(tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, lora={})
    with_config(alpha_pattern={"q_proj": 3, "1.self_attn.q_proj": 5})(adapter_folder(tmp_path))
    _, model = trained(tried)
    scales = {name: module.scaling["default"] for name, module in model.named_modules() if name.endswith("q_proj")}
    assert set(scales.values()) == {3 / 4}
    exported = dict(sorted(model.peft_config["default"].alpha_pattern.items()))
    names = [name for name, _ in read_structure(model_folder(tmp_path)).model.named_modules()]
    assert {key.rpartition(".")[2] for key in exported} == {"q_proj"}, "no other module has a key"
    again = with_plain_names({"alpha_pattern": exported}, names, names)["alpha_pattern"]
    assert sorted(again.items()) == sorted(exported.items())
    assert set(exported.values()) == {3}


SLOW = r"(([\w.])+)+!"
"""A regular expression for which Python's `re` takes years on the name of a module."""


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": rf"{SLOW}|.*_proj"},
        {"exclude_modules": SLOW},
        {"rank_pattern": {SLOW: 2}},
        {"alpha_pattern": {SLOW: 2}},
    ],
    ids=lambda config: next(iter(config)),
)
def test_a_pattern_that_would_run_for_ever_ends(config: dict[str, Any], tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, lora={})
    with_config(**config)(adapter_folder(tmp_path))
    assert checked(tried)[0] == trained(tried)[0] == ""


def test_whole_numbers_may_be_written_with_a_point(tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, lora={})
    with_config(r=4.0, lora_alpha=8.0, rank_pattern={"q_proj": 4.0})(adapter_folder(tmp_path))
    assert checked(tried)[0] == trained(tried)[0] == ""


def test_settings_that_the_trainer_does_not_know_are_a_notice(tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, lora={})
    with_config(unsloth_fixed=True, use_tomorrow="yes\n", nothing=None)(adapter_folder(tmp_path))
    finding, notices = checked(tried)
    assert finding == ""
    (notice,) = (text for text in notices if "not known" in text)
    assert notice.endswith(": unsloth_fixed, use_tomorrow")


def test_the_trainer_judges_every_field_of_pefts_configuration() -> None:
    """A field that a new version of peft adds must get a place in one of the tables."""
    assert set(FIELDS) <= {*NEUTRAL, *KINDS, *DESCRIPTIVE}
