"""An exported model has the tensors and weight files of its base model, and the configuration except for a few fields
such as the data type. So every program that reads the base model reads the artifact too."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune_core.api.method import LoRASpec
from finetune_core.api.sources import HuggingFaceSource, ModelSpec, S3Source
from finetune_core.errors import UserError
from finetune_trainer.checkpoints.export import MERGED_FOLDER
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.model.adapters import add_adapters, choose_targets
from finetune_trainer.model.added_rows import find_added_rows, read_added_rows
from finetune_trainer.model.extended_base import extend_base
from finetune_trainer.model.given_adapter import BASE_DIGEST
from finetune_trainer.model.structure import read_structure
from finetune_trainer.model.tensor_names import TensorNames
from finetune_trainer.model.weight_files import WeightFiles
from finetune_trainer.sources.inputs import model_revision
from finetune_trainer.sources.model_files import HubFiles
from tests.trainer import tiny
from tests.trainer.exporting import change_values, export, load_whole, same_logits
from tests.trainer.families import FAMILIES, write_family
from tests.trainer.hub import COMMIT, TOKEN, running_hub

QUICK = ["deepseek-v3", "gemma-3-vision", "gpt-2", "gpt-neox", "llama-3-tied", "mixtral", "qwen3-moe"]
NOT_COMPARED = {"bailing-hybrid", "deepseek-v2", "zaya"}
"""Families whose logits are not compared. transformers can't compute logits of the first two tiny models, and
overwrites some values of the third model when it loads the model."""


def families(*, among: Collection[str] = tuple(FAMILIES), without: Collection[str] = ()) -> list[object]:
    """Return the families as parameters of a test. All but those of QUICK are marked long."""
    names = [name for name in among if name not in without]
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long]) for name in names]


def layout(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of the tensors in each weights file of a model's folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found[path.name] = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("family", families(without=["bert"]))
def test_a_full_model_has_the_tensors_of_the_base_models_files(family: str, tmp_path: Path) -> None:
    base = write_family(family, tmp_path / "base")
    model = load_whole(base)
    change_values(model)
    artifact = export(model, base, tmp_path)
    assert layout(artifact) == layout(base)
    before, after = load_file(base / "model.safetensors"), load_file(artifact / "model.safetensors")
    for name in FAMILIES[family].unused:
        assert torch.equal(before[name], after[name])
    loaded = load_whole(artifact)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    if family not in NOT_COMPARED:
        assert same_logits(loaded, model) == 0


@pytest.mark.parametrize("family", families(among=QUICK))
def test_a_merged_model_has_the_tensors_of_the_base_models_files(family: str, tmp_path: Path) -> None:
    base = write_family(family, tmp_path / "base")
    structure = read_structure(base)
    targets = choose_targets(structure, LoRASpec(), added_tokens=False)
    model = add_adapters(
        load_whole(base), LoRASpec(), targets=targets.modules, parameters=targets.parameters, seed=1, base_name="tiny"
    ).eval()
    change_values(model)
    artifact = export(model, base, tmp_path, kind="Both")
    assert layout(artifact / MERGED_FOLDER) == layout(base)
    assert same_logits(load_whole(artifact / MERGED_FOLDER), model) < 1e-4
    adapted = PeftModel.from_pretrained(load_whole(base), artifact, autocast_adapter_dtype=False).eval()
    assert same_logits(adapted, model) == 0


@pytest.mark.parametrize("family", families(without={"bert", "deepseek-v4", *NOT_COMPARED}))
@pytest.mark.parametrize("untie", [False, True])
def test_added_tokens_keep_the_names_of_the_base_models_tensors(family: str, untie: bool, tmp_path: Path) -> None:
    base = write_family(family, tmp_path / "base")
    extend_base(base, tmp_path / "extended", tokens=["<A>", "<B>"], untie=untie, seed=3)
    before, after = layout(base)["model.safetensors"], layout(tmp_path / "extended")["model.safetensors"]
    added = after.keys() - before.keys()
    assert before.keys() <= after.keys()
    assert len(added) == (1 if untie and read_structure(base).tied else 0)
    head = f"{read_structure(base).output_name}".rpartition(".")[2]
    assert all(name.endswith(f"{head}.weight") for name in added)
    loaded, vocabulary = load_whole(tmp_path / "extended"), len(load_tokenizer(base))
    for embedding in (loaded.get_input_embeddings(), loaded.get_output_embeddings()):
        assert embedding.weight.shape[0] == vocabulary + 2
    ids = torch.tensor([[4, 9, 33]])
    with torch.no_grad():
        wanted = load_whole(base)(input_ids=ids, use_cache=False).logits
        found = loaded(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found[..., : wanted.shape[-1]], wanted, rtol=0, atol=1e-5)


def test_tokens_are_not_added_to_a_model_with_other_values_for_each_token(tmp_path: Path) -> None:
    base = write_family("deepseek-v4", tmp_path / "base")
    with pytest.raises(
        UserError, match=r"^model\.addedTokens: must be empty: the model has .* for each of its tokens$"
    ):
        extend_base(base, tmp_path / "extended", tokens=["<A>"], untie=False, seed=3)


def test_rows_of_added_tokens_are_found_under_the_names_of_the_files(tmp_path: Path) -> None:
    base = write_family("gpt-neox", tmp_path / "base")
    extend_base(base, tmp_path / "extended", tokens=["<A>"], untie=False, seed=3)
    structure = read_structure(tmp_path / "extended")
    names = TensorNames(structure.model, WeightFiles.of(tmp_path / "extended").shapes)
    row = len(load_tokenizer(base))
    rows = find_added_rows(structure, names, [row], shared=False)
    assert (rows.input_key, rows.output_key) == ("gpt_neox.embed_in.weight", "embed_out.weight")
    found = read_added_rows(tmp_path / "extended", rows, torch.float32)
    loaded = load_whole(tmp_path / "extended")
    assert torch.equal(found["output_embeddings"][0], loaded.get_output_embeddings().weight[row])


def test_both_copies_of_a_tied_weight_get_the_trained_values(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", tied=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    model = load_whole(base)
    change_values(model)
    after = load_file(export(model, base, tmp_path) / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], model.get_input_embeddings().weight)
    assert torch.equal(after["model.embed_tokens.weight"], model.get_input_embeddings().weight)


def test_experts_that_lie_in_several_files_are_written_into_these_files(tmp_path: Path) -> None:
    base = write_family("mixtral", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    halves = [dict(list(tensors.items())[number::2]) for number in range(2)]
    (base / "model.safetensors").unlink()
    names = [f"model-0000{number + 1}-of-00002.safetensors" for number in range(2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, base / name, {"format": "pt"})
    index = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    model = load_whole(base)
    change_values(model)
    artifact = export(model, base, tmp_path)
    assert layout(artifact) == layout(base)
    assert same_logits(load_whole(artifact), model) == 0


def test_files_beside_the_model_are_not_in_the_artifact(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    model = load_whole(base)
    for name in ("adapter_config.json", "pytorch_model.bin", "README.md"):
        (base / name).write_text("{}")
    for name in ("adapter_model.safetensors", "consolidated.safetensors"):
        save_file({"model.norm.weight": torch.ones(64)}, base / name)
    artifact = export(model, base, tmp_path)
    assert layout(artifact).keys() == {"model.safetensors"}
    extend_base(base, tmp_path / "extended", tokens=["<A>"], untie=False, seed=1)
    for folder in (artifact, tmp_path / "extended"):
        wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
        found = {path.name for path in folder.iterdir()}
        assert wanted <= found <= wanted | {"tokenizer_config.json", "special_tokens_map.json"}


def test_numbers_that_are_no_floats_are_copied_as_they_are(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["h.0.attn.bias"] = torch.tensor([True, False])
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    model = load_whole(base)
    after = load_file(export(model, base, tmp_path, precision="bf16") / "model.safetensors")
    assert after["h.0.attn.bias"].dtype == torch.bool
    assert after["model.norm.weight"].dtype == torch.bfloat16


def test_a_model_whose_conversion_can_not_be_reverted_is_refused_by_name(tmp_path: Path) -> None:
    base = write_family("mixtral", tmp_path / "base")
    shapes = WeightFiles.of(base).shapes
    structure = read_structure(base)
    lost = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    names = TensorNames(structure.model, {name: shape for name, shape in shapes.items() if name != lost})
    names.check_writable(["model.layers.1.mlp.experts.down_proj"])
    with pytest.raises(
        UserError, match=r"^model: its files must have the tensor model\.layers\.0\.block_sparse_moe\.experts\.3"
    ):
        names.check_writable(name for name, _ in structure.model.named_parameters())
    without = TensorNames(structure.model, {"lm_head.weight": shapes["lm_head.weight"]})
    with pytest.raises(UserError, match=r"^model: its files have no tensor for model\.norm\.weight"):
        without.check_writable(["model.norm.weight"])


def test_config_json_is_that_of_the_base_model_but_for_the_data_type(tmp_path: Path) -> None:
    base = write_family("gemma-3-vision", tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"torch_dtype": "float16", "of_its_publisher": [1]}
    config.pop("dtype", None)
    config["text_config"] |= {"dtype": "float16", "use_cache": False}
    (base / "config.json").write_text(json.dumps(config))
    model = load_whole(base)
    artifact = export(model, base, tmp_path, precision="bf16")
    written = json.loads((artifact / "config.json").read_text())
    assert written["torch_dtype"] == written["text_config"]["dtype"] == "bfloat16"
    assert written["text_config"]["use_cache"] is True
    config["torch_dtype"] = config["text_config"]["dtype"] = "bfloat16"
    config["text_config"]["use_cache"] = True
    assert written == config


def test_an_adapter_names_revision_and_digest_of_its_base_model(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    model = add_adapters(load_whole(base), LoRASpec(), targets=["q_proj"], seed=1, base_name="tiny")
    artifact = export(model, base, tmp_path, base_name="team/model", revision="0123abc", base_sha256="d1" * 32)
    config = json.loads((artifact / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("team/model", "0123abc")
    assert config["auto_mapping"][BASE_DIGEST] == "d1" * 32


def test_peft_loads_the_configuration_of_an_adapter_without_a_warning(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    model = add_adapters(load_whole(base), LoRASpec(), targets=["q_proj"], seed=1, base_name="tiny")
    artifact = export(model, base, tmp_path, base_sha256="d1" * 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PeftConfig.from_pretrained(str(artifact)).task_type == "CAUSAL_LM"


def test_the_revision_of_a_model_from_the_hub_is_the_commit_that_was_downloaded(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = HuggingFaceSource(repo="team/tiny", revision="main")
    model = ModelSpec(hugging_face=source)
    assert model_revision(model, tmp_path) == "main", "nothing was downloaded yet"
    with running_hub({"team/tiny": tiny_model}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        HubFiles(source, TOKEN).fetch(["config.json"], tmp_path)
    assert model_revision(model, tmp_path) == COMMIT
    assert model_revision(ModelSpec(s3=S3Source(uri="s3://bucket/model")), tmp_path) is None
