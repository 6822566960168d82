"""The trainer can prepare and load every model that the preflight check accepts, and no other. The models are those of
all families, and models that are broken in many ways. A refusal of the preflight check is a sentence that names the
field.

The preflight check reads only the headers of the weight files. The trainer gets the same folder through the launcher's
own functions.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from minio import Minio
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

from finetune_core.contract import Identity, RunConfig
from finetune_core.errors import UserError
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.model.base_check import JobBase, check_base
from finetune_trainer.model.digest import base_digest
from finetune_trainer.model.load import load_base
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.pod.settings import Paths
from finetune_trainer.preflight.model_check import check_for_job, check_model
from finetune_trainer.preflight.row_check import check_rows
from finetune_trainer.preparation import load_model, prepare_node
from finetune_trainer.sources.identities import input_identities
from finetune_trainer.sources.inputs import fetch_inputs
from finetune_trainer.sources.model_files import model_files
from finetune_trainer.storage.root import object_store, open_root
from tests.trainer import tiny
from tests.trainer.families import FAMILIES, write_family
from tests.trainer.objectstore import ObjectStore, write_credentials
from tests.trainer.pods import run_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SENTENCE = re.compile(r"(model|lora|dataset|storage|training|deepspeed)(\.\w+)*: [^\n]+")
NOWHERE = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Job:
    """A job whose model and data lie on volumes, so that no store is asked for anything."""

    paths: Paths
    config: RunConfig
    folder: Path
    """An empty folder for what the checks and the trainer write."""

    def checked(self) -> str:
        """Return the finding of the preflight check of model and rows, or an empty text."""
        try:
            store, dataset = object_store(self.config, self.paths), self.config.dataset
            files = model_files(self.config.model, self.paths, store)
            headers = self.folder / "headers"
            facts = check_model(files, self.folder / "small", headers, self.config.model.added_tokens)
            holes = [path for path in headers.glob("*.safetensors") if not path.is_symlink()]
            assert holes
            check_for_job(headers, self.config)
            check_rows(dataset, dataset.train, "dataset.train", self.paths, store, self.folder / "rows", facts)
        except UserError as error:
            return str(error)
        return ""

    def trained(self) -> tuple[str, Any]:
        """Fetch, prepare and load the model like the launcher and a worker. Return an empty text and the model, or the
        sentence of the refusal and None."""
        try:
            plan = self.plan()
            prepare_node(plan, graded=())
            return "", load_model(plan)
        except UserError as error:
            return str(error), None

    def plan(self) -> WorkerPlan:
        inputs_folder = self.folder / "inputs"
        inputs_folder.mkdir()
        inputs = fetch_inputs(self.config, self.paths, open_root(self.config, self.paths), inputs_folder)
        identity = Identity(namespace="n", name="n", uid="u", attempt=1, pod_name="p", pod_uid="p", node_rank=0)
        return WorkerPlan(
            paths=self.paths, identity=identity, config=self.config, inputs=inputs, folder=self.folder / "attempt"
        )


def job(tmp_path: Path, **changes: Any) -> Job:
    """Return a job whose model is in the folder `model` of a volume below ``tmp_path``. ``changes`` are those of
    `run_config`."""
    write_credentials(tmp_path / "credentials", "key", "secret")
    rows = tmp_path / "volumes" / "claim" / "train.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    tiny.write_jsonl(rows, tiny.rows(4, seed=1))
    store = ObjectStore(NOWHERE, tmp_path / "credentials", Minio("127.0.0.1:9"))
    source = {"volume": {"claimName": "claim", "path": "model"}}
    data = {"volume": {"claimName": "claim", "path": "train.jsonl"}}
    given = {"dataset__train": data, "dataset__validation": None, "model": source} | changes
    config = RunConfig.model_validate(run_config(store, "base", **given))
    paths = Paths(credentials=tmp_path / "credentials", volumes=tmp_path / "volumes", scratch=tmp_path / "scratch")
    folder = tmp_path / "written"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return Job(paths, config, folder)


def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "volumes" / "claim" / "model"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"storage__artifact": "Both"},
    "added tokens": {"model__addedTokens": ["<A>", "<B>"], "storage__artifact": "Both"},
    "Full": {"method": "Full"},
    "packing": {"dataset__packing": True, "optimization__gradientCheckpointing": True},
}
QUICK = ("llama-2", "gpt-2", "mixtral", "qwen2", "gemma-2", "gpt-oss", "gemma-3-vision", "bert")
"""The families that `make unit` and `make test` try. `make test-long` tries all other families."""


def quick(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in names]


def changed(value: Any) -> Any:
    """Return another value of the type of ``value``."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value + 1
    return f"{value}x" if isinstance(value, str) else 3 if value is None else type(value)()


@pytest.mark.parametrize("family", ["llama-2", "gemma-4", "gpt-oss"])
def test_a_field_with_another_value_for_one_layer_is_loaded_or_refused_by_a_sentence(
    family: str, tmp_path: Path
) -> None:
    """transformers lets most fields of a configuration differ from layer to layer. Whoever reads such a field for the
    whole model gets an exception."""
    folder = model_folder(tmp_path)
    write_family(family, folder)
    path = folder / "config.json"
    document = json.loads(path.read_text())
    text = document.get("text_config") or document
    fields = dict(text)
    outcomes = set()
    for name in sorted({*fields, "is_causal", "is_decoder", "is_encoder_decoder", "quantization_config"}):
        text["per_layer_config"] = {"0": {name: changed(fields.get(name))}}
        path.write_text(json.dumps(document))
        found = job(tmp_path).checked()
        told, model = job(tmp_path).trained() if found == "" else (found, None)
        assert (found == "") == (model is not None), (name, found, told)
        assert found == "" or SENTENCE.fullmatch(found), (name, found)
        outcomes.add(found == "")
    assert outcomes == {True, False}


@pytest.mark.parametrize("family", quick(FAMILIES))
def test_what_the_preflight_check_passes_the_trainer_can_load_and_nothing_else(family: str, tmp_path: Path) -> None:
    write_family(family, model_folder(tmp_path))
    for method, changes in METHODS.items():
        found = job(tmp_path, **_with_source(changes)).checked()
        told, model = job(tmp_path, **_with_source(changes)).trained()
        assert (found == "") == (told == "" and model is not None), (method, found, told)
        assert found == "" or SENTENCE.fullmatch(found), (method, found)


def _with_source(changes: dict[str, Any]) -> dict[str, Any]:
    source = {"volume": {"claimName": "claim", "path": "model"}}
    return {"model": source} | changes


def edit(path: Path, **fields: Any) -> int:
    return path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def replace_tensor(name: str, shape: tuple[int, ...]) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))


def rename_tensor(name: str, other: str) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({other: tensors.pop(name)}))


def lose_tensor(name: str) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.pop(name))


def configure(**fields: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder / "config.json", **fields)


def in_eight_bits(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))


def packed_in_integers(folder: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name.replace(".weight", ".qweight")] = tensors.pop(name).to(torch.int32)

    change_tensors(folder, pack)


def in_integers(name: str) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))


def only_sentencepiece(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / name).write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
        edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")

    return damage


def words_without_a_class(folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def newer_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["type"] = "NewKind"
    (folder / "tokenizer.json").write_text(json.dumps(content))


def stop_at_a_new_token(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", additional_special_tokens=["<turn>"])
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 64]}')


def tensor_in_two_files(folder: Path) -> None:
    tensors, files = load_file(folder / SINGLE), [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (folder / SINGLE).unlink()
    save_file(tensors, folder / files[0], {"format": "pt"})
    save_file({"lm_head.weight": torch.zeros(64, 32), "other": torch.ones(1)}, folder / files[1], {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, files[0]) | {"other": files[1]}}))


def index_of(name: str) -> Callable[[Path], object]:
    """Return a function that gives a model an index which puts every tensor into the file ``name``. The function
    removes the weight file, and writes its tensors to ``name`` unless ``name`` is config.json."""

    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        tensors = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        if name != "config.json":
            save_file(tensors, folder / name, {"format": "pt"})
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))

    return damage


def prefixed(prefix: str) -> Callable[[Path], object]:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return lambda folder: change_tensors(folder, rename)


def pointer(name: str) -> Callable[[Path], object]:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    return lambda folder: (folder / name).write_text(text)


def web_page(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("<!DOCTYPE html>")


CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "Llama"}, "its model_type 'Llama' is none that transformers"),
    ({"model_type": None}, "its model_type None is none that transformers"),
    ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "its model_type 'own' is none that transformers"),
    ({"dtype": "float8_e4m3fn"}, "dtype must be float32, float16 or bfloat16, and is 'float8_e4m3fn'"),
    ({"dtype": None, "torch_dtype": "int8"}, "torch_dtype must be float32, float16 or bfloat16, and is 'int8'"),
    ({"quantization_config": {}}, "quantization_config must be left out for weights that are not quantised"),
    ({"quantization_config": "awq"}, "quantization_config must be left out for weights that are not quantised"),
    ({"vocab_size": "64"}, "Validation error for field 'vocab_size': TypeError: Field 'vocab_size' expected int"),
]
"""Fields of a configuration that are wrong, and the sentence about each."""


@dataclass(frozen=True)
class Broken:
    """A model that the test's job can't train, because the model is damaged or does not suit the job, and the finding
    about it."""

    damage: Callable[[Path], Any]
    sentence: str
    """A text that the finding must contain."""
    family: str = "llama-2"
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the run file that the test replaces."""


BROKEN: dict[str, Broken] = {
    "an end token beyond the rows": Broken(
        lambda folder: edit(folder / "tokenizer_config.json", eos_token="</s>"),
        "model: its tokenizer does not fit its weights: the end token '</s>' has the id 64, and the embedding has only",
    ),
    "a stop token beyond the rows": Broken(
        stop_at_a_new_token,
        "model: its tokenizer does not fit its weights: the stop token '<turn>' has the id 64",
    ),
    "rows beyond the configuration": Broken(
        replace_tensor("model.embed_tokens.weight", (65, 32)),
        "model: its config.json does not fit its weights: model.embed_tokens.weight has the shape [65, 32] in its"
        " files, and must have [64, 32]",
    ),
    "another width": Broken(
        configure(intermediate_size=64), "model: its config.json does not fit its weights: model.layers.0.mlp."
    ),
    "fewer layers in the files": Broken(
        configure(num_hidden_layers=3), "model: its files are incomplete: they lack 9 weights, such as model.layers.2."
    ),
    "a lost tensor": Broken(
        lose_tensor("model.layers.1.mlp.up_proj.weight"),
        "model: its files are incomplete: they lack 1 weights, such as model.layers.1.mlp.up_proj.weight",
    ),
    "a lost expert": Broken(
        lose_tensor("model.layers.0.block_sparse_moe.experts.2.w1.weight"),
        "model: its files are incomplete: they lack model.layers.0.block_sparse_moe.experts.2.w1.weight",
        family="mixtral",
    ),
    "an expert of another size": Broken(
        replace_tensor("model.layers.0.block_sparse_moe.experts.2.w1.weight", (7, 32)),
        "model: its weights do not fit together: model.layers.0.block_sparse_moe.experts.2.w1.weight has the shape",
        family="mixtral",
    ),
    "weights of another family": Broken(
        configure(model_type="qwen2", architectures=["Qwen2ForCausalLM"]), "model: its files are incomplete: they lack"
    ),
    "a stale index beside the weights": Broken(
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        "model.volume.path: there is no model-00001-of-00002.safetensors, which model.safetensors.index.json names:"
        " remove the index if model.safetensors holds the whole model, or else model.safetensors",
    ),
    "an adapter alone": Broken(
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "model.volume.path: there is an adapter (adapter_config.json), and it must be a base model",
    ),
    "eight bits without a word": Broken(
        in_eight_bits, "model: its weights are quantised: model.layers.0.mlp.up_proj.weight is stored as F8_E4M3"
    ),
    "packed in integers without a word": Broken(
        packed_in_integers, "model: its weights are quantised: model.layers.0.mlp.down_proj.qweight is stored as I32"
    ),
    "a weight in integers beside a table in integers": Broken(
        in_integers("layers.1.attn.wo_b.weight"),
        "model: its weights are quantised: layers.1.attn.wo_b.weight is stored as I32",
        family="deepseek-v4",
    ),
    "a name that is lost in shards": Broken(
        rename_tensor("norm.weight", "model.norm.weight"),
        "deepspeed.zeroStage: must be below 3 for this model: its files name a tensor model.norm.weight, which",
        family="deepseek-v4",
        changes={"optimization__zeroStage": 3},
    ),
    **{
        f"quantised with {method}": Broken(
            configure(quantization_config={"quant_method": method, "bits": 4}),
            f"model.volume.path: its weights are quantised (quantization_config in config.json: {method}), and must be"
            " floating-point numbers of 16 or 32 bits; name the model from which it was made",
        )
        for method in ("awq", "gptq", "bitsandbytes", "fp8", "mxfp4", "compressed-tensors", "of-tomorrow")
    },
    "quantised without a method": Broken(
        configure(quantization_config={"load_in_4bit": True}),
        "model.volume.path: its weights are quantised (quantization_config in config.json), and must be",
    ),
    "a target that is no module": Broken(
        lambda folder: None,
        "lora.targetModules: must name modules of the model, and 'query' is none; it has",
        changes={"lora": {"rank": 4, "alpha": 8, "targetModules": ["query"]}},
    ),
    "sentencepiece alone": Broken(
        only_sentencepiece("tokenizer.model"),
        "model: its tokenizer can't be used: beside tokenizer.model there must be a tokenizer.json with the same"
        " tokenizer",
    ),
    "a vocabulary of sentencepiece with another name": Broken(
        only_sentencepiece("spiece.model"), "model: its tokenizer can't be used: beside spiece.model there must be"
    ),
    "a vocabulary of tiktoken": Broken(
        only_sentencepiece("tiktoken.model"), "model: its tokenizer can't be used: beside tiktoken.model there must be"
    ),
    "words without a class": Broken(
        words_without_a_class, "model: its tokenizer can't be loaded: there is no tokenizer.json, and transformers"
    ),
    "a tokenizer of a newer library": Broken(
        newer_tokenizer,
        "model: its tokenizer can't be loaded: tokenizer.json has a part that this version of the tokenizers library"
        " does not know (data did not match",
    ),
    "an encoder": Broken(lambda folder: None, "reads a text in both directions (is_decoder is false)", family="bert"),
    "an encoder with a decoder": Broken(
        configure(model_type="bart", is_encoder_decoder=True),
        "model.volume.path: config.json describes a 'bart' with an encoder",
    ),
    "a tensor in two files": Broken(
        tensor_in_two_files,
        "model: its files do not fit together: model-00002-of-00002.safetensors has the tensor lm_head.weight, which"
        " model.safetensors.index.json puts into model-00001-of-00002.safetensors",
    ),
    **{
        f"an index of {name}": Broken(
            index_of(name),
            "model.volume.path: model.safetensors.index.json must name *.safetensors files in the same folder, and"
            f" names {name}",
        )
        for name in ("config.json", "generation_config.json", "chat_template.jinja", "other/model.safetensors", "a.bin")
    },
    **{
        f"the prefix {prefix}": Broken(
            prefixed(prefix),
            f"model: its files have other names than a model with its config.json: {prefix}lm_head.weight in place of"
            " lm_head.weight",
        )
        for prefix in ("_orig_mod.", "module.", "base_model.model.")
    },
    **{
        f"a pointer of Git LFS as {name}": Broken(pointer(name), f"{name} is a pointer of Git LFS, not the file")
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", SINGLE, INDEX)
    },
    **{
        f"a web page as {name}": Broken(web_page(name), f"{name} must be a JSON object in UTF-8")
        for name in ("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json")
    },
    **{
        f"the configuration {fields}": Broken(
            configure(**fields), f"model.volume.path: its config.json can't be used: {sentence}"
        )
        for fields, sentence in CONFIGURATIONS
    },
    "a tokenizer with code of its own": Broken(
        lambda folder: edit(
            folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.Own"]}
        ),
        "model: its tokenizer can't be used: transformers has no OwnTokenizer, which its tokenizer_config.json names",
    ),
    "a chat template in another encoding": Broken(
        lambda folder: (folder / "chat_template.jinja").write_bytes("é".encode("utf-16")),
        "model: its chat_template.jinja must be a text in UTF-8",
    ),
    "a tokenizer of Mistral's own library": Broken(
        only_sentencepiece("tekken.json"), "model: its tokenizer can't be used: beside tekken.json there must be"
    ),
    "settings for generating with which no kind of artifact is saved": Broken(
        lambda folder: (folder / "generation_config.json").write_text('{"max_new_tokens": -1}'),
        "model: its generation_config.json can't be used: `max_new_tokens` must be greater than 0",
        changes={"storage__artifact": "Both"},
    ),
    "a model for pictures and text": Broken(
        configure(model_type="llava"),
        "model.volume.path: config.json names model_type 'llava', which is no causal language model",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_is_refused_by_the_preflight_check_and_by_the_trainer(kind: str, tmp_path: Path) -> None:
    broken = BROKEN[kind]
    folder = write_family(broken.family, model_folder(tmp_path))
    broken.damage(folder)
    found = job(tmp_path, **broken.changes).checked()
    assert broken.sentence in found
    assert SENTENCE.fullmatch(found)
    told, _ = job(tmp_path, **broken.changes).trained()
    assert SENTENCE.fullmatch(told)


def test_a_table_that_the_model_has_in_integers_is_no_quantised_weight(tmp_path: Path) -> None:
    """The table has another name in the files than in the model that transformers builds."""
    folder = write_family("deepseek-v4", model_folder(tmp_path))
    integers = [name for name, tensor in load_file(folder / SINGLE).items() if not tensor.is_floating_point()]
    assert [name.rpartition(".")[2] for name in integers] == ["tid2eid"] * len(integers) != []
    assert job(tmp_path).checked() == ""


def beside(folder: Path) -> None:
    """Put an adapter, another checkpoint and its index beside the model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned.save_pretrained(folder)
    tensors = {f"layers.{name}": tensor for name, tensor in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / "consolidated.safetensors", {"format": "pt"})
    (folder / "consolidated.safetensors.index.json").write_text('{"weight_map": {}}')


def test_what_lies_beside_the_model_is_left_out(tmp_path: Path) -> None:
    folder = write_family("llama-2", model_folder(tmp_path))
    alone = job(tmp_path)
    wanted, digest = (
        input_identities(alone.config, alone.paths, object_store(alone.config, alone.paths), folder),
        (base_digest(folder)),
    )
    logits = load_base(folder, torch.float32)(torch.tensor([[2, 5, 3]])).logits
    beside(folder)

    tried = job(tmp_path)
    files = model_files(tried.config.model, tried.paths, object_store(tried.config, tried.paths))
    facts = check_model(files, tried.folder / "small", tried.folder / "headers", ())
    assert list(facts.notices) == [
        "model.volume.path: adapter_config.json, adapter_model.safetensors, consolidated.safetensors beside the model"
        " will not be used: the model is in model.safetensors"
    ]
    plan = tried.plan()
    names = {path.name for path in plan.inputs.model.iterdir()}
    assert {name for name in names if name.endswith(".safetensors")} == {SINGLE}
    assert not [name for name in names if name.startswith(("adapter_", "consolidated"))]
    assert input_identities(tried.config, tried.paths, object_store(tried.config, tried.paths), folder) == wanted
    assert base_digest(folder) == digest
    loaded = load_base(folder, torch.float32)
    assert torch.equal(loaded(torch.tensor([[2, 5, 3]])).logits, logits)
    assert not [name for name, _ in loaded.named_parameters() if "lora" in name]


def test_weights_that_the_model_does_not_use_are_a_notice(tmp_path: Path) -> None:
    """If config.json names fewer layers than the weight files hold, it describes another model than the published
    one."""
    folder = write_family("llama-2", model_folder(tmp_path))
    tried = job(tmp_path)
    base = JobBase(folder, tried.config)
    assert check_base(base) == []
    edit(folder / "config.json", num_hidden_layers=1)
    sentence = "model: its files have 7 weights that a model with its config.json does not use, such as model.layers.1."
    (notice,) = check_base(JobBase(folder, tried.config))
    assert notice.startswith(sentence)


def test_a_whole_checkpoint_in_several_files_beside_a_single_one_is_left_out(tmp_path: Path) -> None:
    folder = write_family("llama-2", model_folder(tmp_path))
    tensors = load_file(folder / SINGLE)
    save_file(tensors, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    tried = job(tmp_path)
    assert tried.checked() == ""
    names = {path.name for path in job(tmp_path).plan().inputs.model.iterdir()}
    assert names & {SINGLE, INDEX, "model-00001-of-00001.safetensors"} == {SINGLE}


def test_a_vocabulary_with_merges_is_read_like_the_tokenizer_of_the_same_model(tmp_path: Path) -> None:
    folder = write_family("gpt-2", model_folder(tmp_path))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    whole = GPT2Tokenizer(
        vocab={"<|endoftext|>": 0, "a": 1, "Ġ": 2, "b": 3, "Ġb": 4, "ab": 5}, merges=[("Ġ", "b"), ("a", "b")]
    )
    whole.save_pretrained(tmp_path / "whole")
    whole.backend_tokenizer.model.save(str(folder))
    text = "ab b a b"
    tokenizer = load_tokenizer(folder)
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(tmp_path / "whole")(text)["input_ids"]
    assert tokenizer(text)["input_ids"] == [5, 4, 2, 1, 4]  # "ab", " b", " ", "a", " b"
    assert tokenizer.eos_token_id == 0


def test_a_row_with_a_token_beyond_the_rows_of_the_embedding_is_named(tmp_path: Path) -> None:
    folder = write_family("llama-2", model_folder(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained(folder)
    rows = tmp_path / "volumes" / "claim" / "train.jsonl"
    tried = job(tmp_path)
    tiny.write_jsonl(rows, [*tiny.rows(2, seed=1), {"question": "w99", "reply": "w1"}])
    sentence = "train.jsonl line 3 has a token with the id 64, and the model's embedding has only 64 rows"
    assert sentence in tried.checked()
    told, _ = tried.trained()
    assert sentence in told
