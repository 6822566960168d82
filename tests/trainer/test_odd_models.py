"""Models whose files are unusual, as those from hubs, buckets and older tools may be. They are loaded as plain
transformers loads them, and can be trained and exported. Only a link that leads out of the volume is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from finetune_core.errors import UserError
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.model.extended_base import extend_base
from finetune_trainer.model.load import load_base
from tests.trainer.exporting import change_values, export, load_whole, same_logits
from tests.trainer.families import write_family
from tests.trainer.test_base_checks import (
    INDEX,
    SINGLE,
    change_tensors,
    configure,
    edit,
    job,
    model_folder,
)

NEW_SETTINGS = {"eos_token_id": 1, "no_repeat_ngram_size": 1, "stop_strings": ["w1"], "return_dict_in_generate": True}


def in_shards(folder: Path, *, metadata: object = None) -> dict[str, str]:
    """Write the weights in ``folder`` as two files with an index, and return the file name of each tensor. The index
    has the given ``metadata``, or none."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    places: dict[str, str] = {}
    for number in range(2):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::2]}
        save_file(part, folder / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    index: dict[str, Any] = {"weight_map": places} | ({"metadata": metadata} if metadata is not None else {})
    (folder / INDEX).write_text(json.dumps(index))
    return places


def with_prefix(prefix: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(folder / SINGLE).items()}
        save_file(tensors, folder / SINGLE, {"format": "pt"})

    return damage


def in_type(dtype: torch.dtype) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        save_file({name: tensor.to(dtype) for name, tensor in load_file(folder / SINGLE).items()}, folder / SINGLE)

    return damage


ODD: dict[str, Callable[[Path], object]] = {
    "an index without metadata": in_shards,
    "an index with a wrong total size": lambda folder: in_shards(folder, metadata={"total_size": "many"}),
    "a prefix of the inner part in front of all names": with_prefix("model."),
    "double precision": in_type(torch.float64),
    "half precision, and a header without a format": in_type(torch.float16),
    "a kernel for attention that is not installed": configure(_attn_implementation="flash_attention_2"),
    "a kernel from the hub": configure(attn_implementation="kernels-community/vllm-flash-attn3"),
    "an unknown kernel for experts": configure(experts_implementation="of-tomorrow"),
    "frequencies of rotary embeddings": lambda folder: change_tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    ),
    "settings for generating that need arguments": lambda folder: (folder / "generation_config.json").write_text(
        json.dumps(NEW_SETTINGS)
    ),
    "an empty list of chat templates": lambda folder: edit(folder / "tokenizer_config.json", chat_template=[]),
    "a named chat template": lambda folder: edit(
        folder / "tokenizer_config.json", chat_template={"default": "{{ messages[0].content }}"}
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_unusual_model_is_trained_and_exported_like_any_other(kind: str, tmp_path: Path) -> None:
    folder = write_family("llama-2", model_folder(tmp_path))
    wanted = load_whole(folder)
    ODD[kind](folder)
    for changes in ({"storage__artifact": "Both"}, {"method": "Full"}):
        assert job(tmp_path, **changes).checked() == ""
        told, model = job(tmp_path, **changes).trained()
        assert told == ""
        assert same_logits(model.eval(), wanted) < (1e-2 if "half" in kind else 1e-5)
    change_values(model)
    artifact = export(model, folder, tmp_path)
    assert same_logits(load_whole(artifact), model) < 1e-5
    load_tokenizer(artifact)


def test_no_setting_for_generating_of_the_base_model_counts_in_an_evaluation(tmp_path: Path) -> None:
    """transformers takes from the model each setting that a call leaves open."""
    folder = write_family("llama-2", tmp_path)
    (folder / "generation_config.json").unlink(missing_ok=True)
    call = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=1)
    ids = torch.tensor([[4, 9, 33]])
    wanted = load_base(folder, torch.float32).eval().generate(ids, generation_config=call)
    assert len(set(wanted[0].tolist())) < wanted.shape[1], "without a repeated token, the settings would do nothing"
    (folder / "generation_config.json").write_text(json.dumps(NEW_SETTINGS))
    assert torch.equal(load_base(folder, torch.float32).eval().generate(ids, generation_config=call), wanted)
    edit(folder / "config.json", no_repeat_ngram_size=1)
    (folder / "generation_config.json").unlink()
    assert torch.equal(load_base(folder, torch.float32).eval().generate(ids, generation_config=call), wanted)


def test_an_artifact_names_no_kernel(tmp_path: Path) -> None:
    folder = write_family("gemma-3-vision", tmp_path / "base")
    model = load_whole(folder)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(
        folder / "config.json",
        _attn_implementation="flash_attention_2",
        text_config=text | {"attn_implementation": "flash_attention_3"},
    )
    artifact = export(model, folder, tmp_path)
    assert "attn_implementation" not in (artifact / "config.json").read_text()
    extend_base(folder, tmp_path / "extended", tokens=["<A>"], untie=False, seed=3)
    assert "attn_implementation" not in (tmp_path / "extended" / "config.json").read_text()
    assert same_logits(load_whole(artifact), model) == 0


@pytest.mark.parametrize("untie", [False, True])
def test_two_copies_of_a_tied_weight_that_differ_are_extended_as_they_are(untie: bool, tmp_path: Path) -> None:
    """transformers does not tie two weights that differ, whatever config.json says."""
    base = write_family("llama-3-tied", tmp_path / "base")
    head = torch.randn(load_file(base / SINGLE)["model.embed_tokens.weight"].shape)
    change_tensors(base, lambda tensors: tensors.update({"lm_head.weight": head}))
    extend_base(base, tmp_path / "extended", tokens=["<A>"], untie=untie, seed=3)
    ids = torch.tensor([[4, 9, 33]])
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "extended")(input_ids=ids).logits
    torch.testing.assert_close(found[..., : wanted.shape[-1]], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [SINGLE, "config.json", "chat_template.jinja"])
def test_a_file_of_a_model_that_is_a_link_out_of_the_volume_is_refused(name: str, tmp_path: Path) -> None:
    folder = write_family("llama-2", model_folder(tmp_path))
    outside = tmp_path / "secret"
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{{ messages }}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    sentence = f"model.volume.path: {name} must not be a link that leads out of the volume"
    assert job(tmp_path).checked() == sentence
    with pytest.raises(UserError, match=re.escape(sentence)):
        job(tmp_path).plan()


def test_a_model_of_links_within_the_volume_is_read(tmp_path: Path) -> None:
    folder = write_family("llama-2", model_folder(tmp_path))
    (folder.parent / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder.parent / "blobs" / f"{number}")
        path.symlink_to(f"../blobs/{number}")
    assert job(tmp_path).checked() == ""
    assert job(tmp_path).trained()[0] == ""
