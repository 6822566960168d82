"""Which adapters a job can start from (`model.adapter`). Every other adapter is refused in a sentence that names the
field, and the tensor or the setting at fault. The preflight check and the trainer say the same, except where the fault
lies in the values of a tensor: only the trainer checks these.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune_core.api.method import LoRASpec
from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_trainer.model.adapters import add_adapters, choose_targets
from finetune_trainer.model.base_check import JobBase, check_base
from finetune_trainer.model.digest import BaseDigests
from finetune_trainer.model.given_adapter import GivenAdapter, adapter_of, with_settings_of
from finetune_trainer.model.load import load_base
from finetune_trainer.model.structure import read_structure
from finetune_trainer.preflight.model_check import check_adapter, check_for_job, check_model
from finetune_trainer.preparation import base_model_folder, load_model, prepare_node, with_adapter_settings
from finetune_trainer.sources.adapter_files import adapter_files
from finetune_trainer.sources.model_files import model_files
from finetune_trainer.storage.root import object_store
from tests.trainer import tiny
from tests.trainer.exporting import change_values, export, load_whole, same_logits
from tests.trainer.families import write_family
from tests.trainer.given_adapters import CONFIG, WEIGHTS, with_config, with_tensors, write_adapter
from tests.trainer.plain_loop import DENSE
from tests.trainer.test_base_checks import Job, job, model_folder

Q_OF_1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
SENTENCE = re.compile(r"(model\.adapter|lora)(\.\w+)*: [^\x00-\x1f\x7f]+")


def adapter_job(tmp_path: Path, *, use: str = "Continue", untied: bool = False, **changes: Any) -> Job:
    """Return a job that starts from the adapter in the folder `adapter` of its volume. Its base model is the tiny
    Llama, which is written unless the folder of the model exists."""
    base = model_folder(tmp_path)
    if not base.is_dir():
        tiny.write_model(base, tied=not untied)
    source = {"volume": {"claimName": "claim", "path": "adapter"}, "use": use}
    return job(tmp_path, model={"volume": {"claimName": "claim", "path": "model"}, "adapter": source}, **changes)


def adapter_folder(tmp_path: Path, **config: Any) -> Path:
    """Write an adapter of the model of `adapter_job`, and return its folder."""
    return write_adapter(model_folder(tmp_path), tmp_path / "volumes" / "claim" / "adapter", **config)


def checked(tried: Job) -> tuple[str, list[str]]:
    """Return the finding of the preflight check, and its notices."""
    store, folder = object_store(tried.config, tried.paths), tried.folder / "checked"
    folder.mkdir()
    try:
        files = model_files(tried.config.model, tried.paths, store)
        check_model(files, folder / "small", folder / "headers", tried.config.model.added_tokens)
        found = adapter_files(tried.config, tried.paths, store)
        assert found is not None
        check_adapter(found, folder / "adapter")
        return "", check_for_job(folder / "headers", tried.config, folder / "adapter")
    except UserError as error:
        return str(error), []


def trained(tried: Job) -> tuple[str, Any]:
    """Fetch, prepare and load like the launcher and a worker. Return the sentence with which they end, or an empty
    text, and the model."""
    try:
        plan = with_adapter_settings(tried.plan())
        prepare_node(plan, graded=())
        return "", load_model(plan)
    except UserError as error:
        return str(error), None


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[Q_OF_1]


def add_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_OF_1.replace("layers.1", "layers.9")] = tensors[Q_OF_1].clone()


def add_unnamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_OF_1] = torch.zeros(4, 96)


def quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_OF_1] = torch.zeros(4, 64, dtype=torch.int8)


def add_whole(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.ones(64, 64)

    return change


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def make_too_large(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_OF_1] = tensors[Q_OF_1].double()
    tensors[Q_OF_1][0, 0] = 1e300


def make_huge(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_OF_1].fill_(3e38)
    tensors[Q_OF_1.replace("lora_A", "lora_B")].fill_(1)


def point_to(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n")

    return write


def make_infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_OF_1][0, 0] = float("inf")


def pickle_it(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def cut_off(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def with_text(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / CONFIG).write_text(text)

    return write


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "prompt tuning": (with_config(peft_type="PROMPT_TUNING"), "peft_type"),
    "IA3": (with_config(peft_type="IA3"), '"IA3"'),
    "LoHa": (with_config(peft_type="LOHA"), '"LOHA"'),
    "no type": (with_config(peft_type=None), "null"),
    "classifier": (with_config(task_type="SEQ_CLS"), "SEQ_CLS"),
    "trained bias": (with_config(bias="all"), "bias"),
    "bias of B": (with_config(lora_bias=True), "lora_bias"),
    "doubled layers": (with_config(layer_replication=[[0, 2]]), "layer_replication"),
    "token rows": (with_config(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "PiSSA": (with_config(init_lora_weights="pissa"), "pissa"),
    "rank 0": (with_config(r=0), "r must be"),
    "huge rank": (with_config(r=4096), "4096"),
    "rank is text": (with_config(r="8"), '"8"'),
    "half alpha": (with_config(lora_alpha=7.5), "7.5"),
    "modules are a number": (with_config(target_modules=7), "target_modules"),
    "other rank": (with_config(r=8), "another rank"),
    "unknown module": (with_config(target_modules=[*DENSE, "fancy_proj"]), "fancy_proj"),
    "excluded modules are a number": (with_config(exclude_modules=7), "exclude_modules"),
    "whole modules are a text": (with_config(modules_to_save="lm_head"), "modules_to_save"),
    "parameters are a text": (with_config(target_parameters="a.b"), "target_parameters"),
    "layers are a text": (with_config(layers_to_transform="1"), "layers_to_transform"),
    "layers are a pattern": (with_config(layers_to_transform=[1], layers_pattern=["(a+)+"]), "layers_pattern"),
    "rank of a module is text": (with_config(rank_pattern={"q_proj": "4"}), "rank_pattern"),
    "rank of a module is 0": (with_config(rank_pattern={"q_proj": 0}), "rank_pattern"),
    "ranks are a list": (with_config(rank_pattern=["q_proj"]), "rank_pattern"),
    "alpha of a module is no number": (with_config(alpha_pattern={"q_proj": float("nan")}), "alpha_pattern"),
    "alpha of a module is infinite": (with_config(alpha_pattern={"q_proj": float("inf")}), "alpha_pattern"),
    "alpha of a module is true": (with_config(alpha_pattern={"q_proj": True}), "alpha_pattern"),
    "very many ranks": (with_config(rank_pattern={f"m{number}": 4 for number in range(1025)}), "rank_pattern"),
    "DoRA is a text": (with_config(use_dora="no"), "use_dora"),
    "rank-stabilized is a text": (with_config(use_rslora="false"), "use_rslora"),
    "pattern looks ahead": (with_config(target_modules=r".*(?=\.)\.q_proj"), "target_modules"),
    "pattern is broken": (with_config(target_modules="((("), "target_modules"),
    "pattern fits nothing": (with_config(target_modules=r"vision\..*"), "fits no module"),
    "pattern of ranks is broken": (with_config(rank_pattern={"(": 4}), "rank_pattern"),
    "missing whole weight": (with_config(modules_to_save=["norm"]), "base_model.model.model.norm.weight"),
    "whole weight that peft does not load": (
        with_tensors(add_whole("base_model.model.model.layers.1.self_attn.q_proj.weight")),
        "self_attn.q_proj.weight",
    ),
    "whole weight without the prefix": (with_tensors(add_whole("model.norm.weight")), "begins with base_model.model."),
    "names without the prefix": (with_tensors(rename("base_model.model.", "")), "begins with base_model.model."),
    "names of one adapter of several": (with_tensors(rename(".weight", ".default.weight")), "lora_A.default.weight"),
    "doubled prefix": (with_tensors(rename("base_model.", "base_model.model.base_model.")), "base_model.model.base_"),
    "hostile name": (with_tensors(rename("q_proj", "q\nproj\x1b[31m")), "q proj [31m"),
    "pointer of a configuration": (point_to(CONFIG), "pointer of Git LFS"),
    "pointer of weights": (point_to(WEIGHTS), "pointer of Git LFS"),
    "no object": (with_text("[1]"), CONFIG),
    "no JSON": (with_text("{"), CONFIG),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "pickle": (pickle_it, "adapter_model.bin"),
    "cut off": (cut_off, WEIGHTS),
    "missing tensor": (with_tensors(drop), Q_OF_1),
    "more layers": (with_tensors(add_layer), Q_OF_1.replace("layers.1", "layers.9")),
    "unnamed tensor": (with_tensors(add_unnamed), "lm_head.lora_A"),
    "wider": (with_tensors(widen), Q_OF_1),
    "quantised": (with_tensors(quantise), Q_OF_1),
    "not finite": (with_tensors(make_infinite), Q_OF_1),
    "not finite in fp32": (with_tensors(make_too_large), Q_OF_1),
}
"""Ways in which an adapter is broken, each with a text that the sentence about it must contain."""
ONLY_IN_THE_BYTES = {"not finite", "not finite in fp32"}
"""Names in `BROKEN` of the faults that only the values of the tensors show. Only the trainer checks these values."""


@pytest.mark.parametrize("use", ["Continue", "Merge"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_before_a_gpu_is_held_in_a_sentence_that_names_what_is_wrong(
    name: str, use: str, tmp_path: Path
) -> None:
    tried = adapter_job(tmp_path, use=use, lora={})
    breaks, told = BROKEN[name]
    breaks(adapter_folder(tmp_path))
    finding, _ = checked(tried)
    refused, _ = trained(tried)
    if name in ONLY_IN_THE_BYTES:
        assert finding == ""
        finding = refused
    for sentence in (finding, refused):
        assert SENTENCE.fullmatch(sentence), sentence
        assert told in sentence


@pytest.mark.parametrize(
    ("lora", "field", "told"),
    [
        ({"rank": 8}, "lora.rank", "absent or 4"),
        ({"alpha": 16}, "lora.alpha", "absent or 8"),
        ({"rsLoRA": True}, "lora.rsLoRA", "absent or false"),
        ({"doRA": True}, "lora.doRA", "absent or false"),
        ({"targetModules": ["q_proj"]}, "lora.targetModules", "leaves out"),
        ({"targetModules": ["all-linear", "embed_tokens"]}, "lora.targetModules", "names model.embed_tokens.weight"),
    ],
)
def test_settings_that_differ_from_those_of_the_continued_adapter_are_refused(
    lora: dict[str, Any], field: str, told: str, tmp_path: Path
) -> None:
    tried = adapter_job(tmp_path, lora=lora)
    adapter_folder(tmp_path)
    for sentence in (checked(tried)[0], trained(tried)[0]):
        assert sentence.startswith(f"{field}: must be absent or"), sentence
        assert told in sentence


def test_settings_that_a_job_leaves_out_are_those_of_the_adapter_that_it_continues(tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, lora={"dropout": "0.5"})
    adapter_folder(tmp_path, r=6, lora_alpha=24, use_rslora=True, use_dora=True, target_modules=["q_proj", "lm_head"])
    assert checked(tried)[0] == ""
    sentence, model = trained(tried)
    assert sentence == ""
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.use_dora) == (6, 24, True, True)
    assert (config.lora_dropout, set(config.target_modules)) == (0.5, {"q_proj", "lm_head"})


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8, "targetModules": ["all-linear"]}, {"rsLoRA": False}])
def test_settings_that_agree_with_the_adapter_may_be_set(lora: dict[str, Any], tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, lora=lora)
    adapter_folder(tmp_path)
    assert checked(tried)[0] == trained(tried)[0] == ""


def test_a_continued_adapter_with_several_ranks_keeps_them(tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, lora={})
    folder = adapter_folder(tmp_path, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32})
    assert checked(tried)[0] == ""
    _, model = trained(tried)
    plain = PeftModel.from_pretrained(load_whole(model_folder(tmp_path)), folder)
    assert same_logits(model.eval(), plain.eval()) < 1e-6
    kept = {name: value for name, value in plain.state_dict().items() if "lora_" in name}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())


def test_a_merged_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, use="Merge", lora={})
    with_tensors(make_huge)(adapter_folder(tmp_path))
    sentence = trained(tried)[0]
    assert SENTENCE.fullmatch(sentence)
    assert "layers.1.self_attn.q_proj.weight of the merged model would hold numbers that are not finite" in sentence


def test_a_module_that_is_held_as_a_whole_is_not_adapted_too(tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, use="Merge", untied=True, method="Full")
    folder = adapter_folder(tmp_path, modules_to_save=["lm_head"], target_modules=["q_proj", "lm_head"])
    assert checked(tried)[0] == ""
    _, model = trained(tried)
    plain = PeftModel.from_pretrained(load_whole(model_folder(tmp_path)), folder).merge_and_unload()
    assert same_logits(model.eval(), plain.eval()) < 1e-6


@pytest.mark.parametrize("use", ["Continue", "Merge"])
def test_one_adapter_for_two_embeddings_that_share_their_weights_is_refused(use: str, tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, use=use, lora={})
    adapter_folder(tmp_path, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    for sentence in (checked(tried)[0], trained(tried)[0]):
        assert sentence.startswith("model.adapter: "), sentence
        assert "ensure_weight_tying" in sentence


def test_an_adapter_of_another_base_model_by_name_is_used_with_a_notice(tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, lora={})
    adapter_folder(tmp_path)
    finding, notices = checked(tried)
    assert finding == ""
    (notice,) = (text for text in notices if text.startswith("model.adapter"))
    assert "s3://models/tiny" in notice
    assert "claim/model" in notice


def test_other_weights_of_the_base_model_than_the_adapter_records_are_a_notice() -> None:
    mine, merged, other = "a" * 64, "b" * 64, "c" * 64
    digests = BaseDigests(base_sha256=mine, rows_sha256=merged)
    assert [digests.other_base_notice(sha256) for sha256 in (None, mine, merged)] == [[], [], []]
    (notice,) = digests.other_base_notice(other)
    assert notice.startswith("model.adapter: the adapter was trained on other weights of the base model")
    assert BaseDigests().other_base_notice(other) == [], "a full training records no digest of its base model"


def test_an_adapter_with_whole_weights_can_be_merged_and_not_continued(tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, untied=True, lora={})
    folder = adapter_folder(tmp_path, modules_to_save=["lm_head"], target_modules=["q_proj"])
    for sentence in (checked(tried)[0], trained(tried)[0]):
        assert sentence.startswith("model.adapter.use: must be Merge: the adapter holds the whole tensor"), sentence
    shutil.rmtree(tried.folder)
    merging = adapter_job(tmp_path, use="Merge", untied=True, method="Full")
    assert checked(merging)[0] == ""
    sentence, model = trained(merging)
    assert sentence == ""
    plain = PeftModel.from_pretrained(load_whole(model_folder(tmp_path)), folder).merge_and_unload()
    assert same_logits(model.eval(), plain.eval()) < 1e-6


def test_an_adapter_of_a_shared_embedding_is_not_merged(tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, use="Merge", lora={})
    adapter_folder(tmp_path, target_modules=["embed_tokens", "q_proj"])
    for sentence in (checked(tried)[0], trained(tried)[0]):
        assert sentence.startswith("model.adapter: can't be merged: it changes model.embed_tokens.weight"), sentence


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"target_modules": "all-linear"}],
    ids=str,
)
@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_a_merged_base_is_what_peft_merges(method: str, config: dict[str, Any], tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, use="Merge", method=method)
    folder = adapter_folder(tmp_path, **config)
    assert checked(tried)[0] == ""
    sentence, model = trained(tried)
    assert sentence == ""
    plain = PeftModel.from_pretrained(load_whole(model_folder(tmp_path)), folder).merge_and_unload()
    assert same_logits(model.eval(), plain.eval()) < 1e-6


@pytest.mark.parametrize("family", ["gpt-2", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("use", ["Continue", "Merge"])
def test_what_a_job_has_exported_can_be_continued_and_merged_in_every_kind_of_family(
    family: str, use: str, tmp_path: Path
) -> None:
    base = write_family(family, model_folder(tmp_path))
    lora = LoRASpec(rank=2, alpha=4)
    targets = choose_targets(read_structure(base), lora, added_tokens=False)
    model = add_adapters(
        load_base(base, torch.float32),
        lora,
        targets=targets.modules,
        parameters=targets.parameters,
        seed=1,
        base_name="tiny",
    )
    change_values(model)
    exported = export(model, base, tmp_path / "exported")
    adapter = tmp_path / "volumes" / "claim" / "adapter"
    adapter.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(exported / name, adapter / name)
    tried = adapter_job(tmp_path, use=use, lora={})
    assert checked(tried)[0] == ""
    sentence, again = trained(tried)
    assert sentence == ""
    assert same_logits(again.eval(), PeftModel.from_pretrained(load_whole(base), adapter).eval()) < 1e-5
    assert same_logits(again, load_whole(base)) > 1e-3


def test_a_merged_base_in_bf16_is_rounded_once(tmp_path: Path) -> None:
    tried = adapter_job(tmp_path, use="Merge", lora={}, optimization__precision="bf16")
    folder = adapter_folder(tmp_path)
    plan = with_adapter_settings(tried.plan())
    prepare_node(plan, graded=())
    merged = AutoModelForCausalLM.from_pretrained(base_model_folder(plan), dtype=torch.bfloat16).state_dict()
    exact = PeftModel.from_pretrained(load_whole(model_folder(tmp_path)), folder).merge_and_unload().state_dict()
    for name, value in merged.items():
        assert torch.equal(value, exact[name].to(torch.bfloat16)), name


def write_adapter_of_added_tokens(tried: Job, tmp_path: Path) -> Path:
    """Write an adapter of the embeddings of the extended base model of ``tried``, as peft saves it: with a copy of the
    embeddings."""
    plan = tried.plan()
    prepare_node(plan.model_copy(update={"inputs": plan.inputs.model_copy(update={"adapter": None})}), graded=())
    folder = tmp_path / "volumes" / "claim" / "adapter"
    write_adapter(base_model_folder(plan), folder, target_modules=["embed_tokens", "lm_head", "q_proj"])
    shutil.rmtree(tried.folder)
    tried.folder.mkdir()
    return folder


def test_a_continued_adapter_of_added_tokens_fits_the_extended_base(tmp_path: Path) -> None:
    write_adapter(tiny.write_model(model_folder(tmp_path)), tmp_path / "volumes" / "claim" / "adapter")
    tried = adapter_job(tmp_path, lora={}, model__addedTokens=["<A>", "<B>"])
    write_adapter_of_added_tokens(tried, tmp_path)
    assert checked(tried)[0] == ""
    assert trained(tried)[0] == ""


def test_a_continued_adapter_of_other_added_rows_is_refused(tmp_path: Path) -> None:
    write_adapter(tiny.write_model(model_folder(tmp_path)), tmp_path / "volumes" / "claim" / "adapter")
    tried = adapter_job(tmp_path, lora={}, model__addedTokens=["<A>", "<B>"])
    write_adapter_of_added_tokens(tried, tmp_path)
    other = adapter_job(tmp_path, lora={}, model__addedTokens=["<A>", "<B>"], optimization__seed=7)
    sentence, _ = trained(other)
    assert sentence.startswith("model.adapter.use: must be Merge, or the base model another one"), sentence
    assert "embed_tokens" in sentence or "lm_head" in sentence


def test_the_digest_of_an_adapter_changes_with_either_file(tmp_path: Path) -> None:
    tiny.write_model(model_folder(tmp_path))
    folder = adapter_folder(tmp_path)
    first = GivenAdapter.read(folder).sha256
    with_config(lora_alpha=9)(folder)
    second = GivenAdapter.read(folder).sha256
    with_tensors(lambda tensors: tensors[Q_OF_1].mul_(2))(folder)
    assert len({first, second, GivenAdapter.read(folder).sha256}) == 3


def test_a_job_without_an_adapter_keeps_its_settings(tmp_path: Path) -> None:
    tiny.write_model(model_folder(tmp_path))
    config: RunConfig = job(tmp_path).config
    assert with_settings_of(config, adapter_of(None)) is config
    assert not any("adapter" in notice for notice in check_base(JobBase(model_folder(tmp_path), config)))
