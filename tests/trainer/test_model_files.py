"""Whatever the small files of a base model contain, the model is read, or the user gets one sentence. Nothing crashes,
even where a library that is written in Rust panics."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer
from transformers import LlamaConfig, PreTrainedTokenizerFast

from finetune_core.api.dataset import DatasetSpec
from finetune_core.errors import UserError
from finetune_trainer.data.chat.chat_template import use_chat_template
from finetune_trainer.data.dataset import length_limit, make_examples
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.tokenizer import add_tokens, load_tokenizer, model_stop_ids, stop_ids, tokenize_functions
from finetune_trainer.model.configuration import load_configuration, model_context
from finetune_trainer.model.load import load_base
from finetune_trainer.model.structure import read_structure
from finetune_trainer.model.weight_check import check_weights
from finetune_trainer.model.weight_files import check_complete
from finetune_trainer.pod.model_file_names import INDEX_FILE
from tests.trainer import tiny
from tests.trainer.chat import byte_tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORMS: tuple[dict[str, Any], ...] = (
    {"promptCompletion": {"template": "<|user|>{prompt} is", "completionSuffix": "<|end|>"}},
    {"messages": {}},
    {"text": {}},
)
ROW = Row(
    1,
    {
        "prompt": "what <|end|>",
        "completion": "it is",
        "text": "it is é",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "inform <|end|> it"}],
    },
)
KINDS = ("bytes", "llama", "unigram")


def unigram() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a Unigram model, as T5 has one. The tokenizer has a normalizer, and puts the BOS token in
    front of a text."""
    inner = Tokenizer(Unigram())
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = UnigramTrainer(vocab_size=50, special_tokens=special, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(["inform name it what is the cat request genres"] * 20, trainer)
    inner.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the small files of one model for each of `KINDS`."""
    folder = tmp_path_factory.mktemp("models")
    byte_tokenizer(CHAT).save_pretrained(folder / "bytes")
    tiny.write_llama_tokenizer(folder / "llama")
    unigram().save_pretrained(folder / "unigram")
    for kind in KINDS:
        config = LlamaConfig(
            vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        config.save_pretrained(folder / kind)
        (folder / kind / "chat_template.jinja").write_text(CHAT)
        (folder / kind / "generation_config.json").write_text('{"eos_token_id": [2]}')
    return folder


def outcome(folder: Path) -> str:
    """Read the model in ``folder`` like the preflight check and the workers, and tokenise a row in every format.
    Return the sentence for the user, or an empty text."""
    try:
        context = model_context(load_configuration(folder, "model"))
        tokenizer = load_tokenizer(folder)
        add_tokens(tokenizer, ["<new>"])
        for form in FORMS:
            spec = DatasetSpec.model_validate(
                {"train": {"volume": {"claimName": "c", "path": "a.jsonl"}}, "format": form, "longRows": "Skip"}
            )
            use_chat_template(tokenizer, spec.format, folder)
            ends = stop_ids(tokenizer, spec.format, model_stop_ids(folder))
            tokenize = tokenize_functions(tokenizer, ["<new>"], ends=ends, today=date(2024, 2, 9))
            make_examples([ROW], "a.jsonl", "dataset.train", spec, tokenize, limit=length_limit(spec, context))
        read_structure(folder)
        tokenizer.save_pretrained(folder / "artifact")
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return str(error)
    return ""


def changed(models: Path, folder: Path, kind: str, name: str, content: bytes) -> Path:
    """Copy the model of ``kind`` to ``folder``, replace the content of its file ``name``, and return ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(models / kind, folder)
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_of_these_tests_are_good(kind: str, models: Path, tmp_path: Path) -> None:
    assert outcome(Path(shutil.copytree(models / kind, tmp_path / kind))) == ""


PANICS: dict[str, dict[str, Any]] = {
    "zero length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "unknown token": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "missing", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "broken map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}},
    "no map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "endless pattern": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(is|is| )+$|(.|.)*é"},
            "behavior": "Isolated",
            "invert": False,
        }
    },
}


@pytest.mark.parametrize("name", PANICS)
def test_a_panic_of_the_tokenizers_library_is_a_sentence(name: str, models: Path, tmp_path: Path) -> None:
    document = json.loads((models / "bytes" / "tokenizer.json").read_bytes()) | PANICS[name]
    found = outcome(changed(models, tmp_path / "model", "bytes", "tokenizer.json", json.dumps(document).encode()))
    assert found.startswith(("model: its tokenizer can't be ", "dataset.train: a.jsonl line 1 can't be tokenised: "))


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "many layers": ({"num_hidden_layers": 10**9}, "its config.json can't be used: num_hidden_layers must be between"),
    "no heads": ({"num_attention_heads": 0}, "its config.json can't be used: "),
    "text as a limit": ({"max_position_embeddings": "long"}, "its config.json can't be used: "),
    "no such type": ({"model_type": "\ud800"}, "its config.json can't be used: "),
    "other padding": ({"pad_token_id": 1000}, "its files can't be loaded: "),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_that_describes_no_model_is_a_sentence(name: str, models: Path, tmp_path: Path) -> None:
    change, sentence = CONFIGURATIONS[name]
    document = json.loads((models / "bytes" / "config.json").read_bytes()) | change
    found = outcome(changed(models, tmp_path / "model", "bytes", "config.json", json.dumps(document).encode()))
    assert found.startswith(f"model: {sentence}")


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"vocab_size": 100}, {"num_key_value_heads": 4}])
def test_a_configuration_that_does_not_fit_the_weights_is_a_sentence(change: dict[str, int], tmp_path: Path) -> None:
    import torch

    tiny.write_model(tmp_path)
    check_weights(read_structure(tmp_path), tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(
        UserError, match=r"^model: its config.json does not fit its weights: model\..* has the shape \["
    ):
        check_weights(read_structure(tmp_path), tmp_path, torch.float32)
    with pytest.raises(UserError, match=r"^model: its config.json does not fit its weights: "):
        load_base(tmp_path, torch.float32)


def test_a_limit_of_the_tokenizer_that_is_no_number_is_a_sentence(models: Path, tmp_path: Path) -> None:
    document = json.loads((models / "bytes" / "tokenizer_config.json").read_bytes()) | {"model_max_length": "long"}
    folder = changed(models, tmp_path / "model", "bytes", "tokenizer_config.json", json.dumps(document).encode())
    assert outcome(folder).startswith(
        "model: its tokenizer can't be used: `model_max_length` of tokenizer_config.json is 'long'"
    )


ODD: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 2**31, 2**32, 2**63, 2**64, 10**30, 1e308, 0.5, float("nan"), "", "x", "<s>", "\ud800"),
    *("\x00", [], {}, [[]], ["a"], {"a": 1}, {"type": "BPE"}, {"__type": "AddedToken"}, "(a+)+$", "é" * 99),
)
TYPES = [
    "BPE",
    "Unigram",
    "WordPiece",
    "WordLevel",
    "Sequence",
    "ByteLevel",
    "Metaspace",
    "Replace",
    "Prepend",
    "Precompiled",
    "NFC",
    "StripAccents",
    "Split",
    "BertNormalizer",
    "Digits",
    "Punctuation",
    "TemplateProcessing",
    "BertProcessing",
    "RobertaProcessing",
    "ByteFallback",
    "Fuse",
    "Strip",
    "CTC",
    "FixedLength",
    "Whitespace",
    "Lowercase",
]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each value within ``value``, as a tuple of keys and positions. Of each mapping and list only
    the first 40 items are visited. ``at`` is the place of ``value`` itself, which is yielded too unless it is empty."""
    if at:
        yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, item) in enumerate(inner):
        if number < 40:
            yield from places(item, (*at, key))


def mutated(document: Any, data: st.DataObject) -> Any:
    """Replace, rename or remove one value in ``document``, and return ``document``. ``data`` draws the value and the
    change."""
    place = data.draw(st.sampled_from(list(places(document))))
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    key, way = place[-1], data.draw(st.sampled_from(["odd", "odd", "remove", "deep", "rename", "huge", "copy", "type"]))
    if way == "remove":
        del parent[key]
    elif way == "deep":
        for _ in range(data.draw(st.sampled_from([1, 60, 900]))):
            parent[key] = [parent[key]]
    elif way == "rename" and isinstance(parent, dict):
        parent[data.draw(st.sampled_from(["type", "content", "x", "unk_token", f"{key}2"]))] = parent.pop(key)
    elif way == "huge" and isinstance(parent[key], int):
        parent[key] = data.draw(st.sampled_from([parent[key] + 1, 10**6, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1]))
    elif way == "copy":
        other = document
        for step in data.draw(st.sampled_from(list(places(document)))):
            other = other[step]
        parent[key] = copy.deepcopy(other)
    elif way == "type" and isinstance(parent, dict) and "type" in parent:
        parent["type"] = data.draw(st.sampled_from(TYPES))
    else:
        parent[key] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
    return document


def check_any_content(models: Path, folder: Path, data: st.DataObject) -> str:
    kind = data.draw(st.sampled_from(KINDS))
    name = data.draw(st.sampled_from(sorted(path.name for path in (models / kind).iterdir())))
    content = (models / kind / name).read_bytes()
    if name.endswith(".jinja") or data.draw(st.integers(0, 7)) == 0:
        at, noise = data.draw(st.integers(0, len(content))), data.draw(st.binary(max_size=4))
        content = data.draw(
            st.sampled_from(
                [content[:at], content[:at] + noise + content[at:], noise, b"[" * 100_000, b"\xff" + content]
            )
        )
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            document = mutated(json.loads(content.decode(errors="surrogatepass")), data)
            content = json.dumps(document, ensure_ascii=False).encode(errors="surrogatepass")
            # Python can't go through a document that is nested as deep as some changes make it.
            if not isinstance(document, dict) or not document or b"[" * 60 in content:
                break
    return outcome(changed(models, folder, kind, name, content))


def test_any_content_of_a_models_small_files_is_a_model_or_a_sentence(models: Path, tmp_path: Path) -> None:
    outcomes: Counter[bool] = Counter()

    @given(st.data())
    @settings(max_examples=25)
    def check(data: st.DataObject) -> None:
        outcomes[bool(check_any_content(models, tmp_path / "model", data))] += 1

    check()
    assert min(outcomes[True], outcomes[False]) > 1


@pytest.mark.long
@pytest.mark.timeout(3600)  # 2,000 models are loaded, which takes ten minutes on a busy machine
def test_many_contents_of_a_models_small_files_are_models_or_sentences(models: Path, tmp_path: Path) -> None:
    outcomes: Counter[bool] = Counter()

    @given(st.data())
    @settings(max_examples=2000)
    def check(data: st.DataObject) -> None:
        outcomes[bool(check_any_content(models, tmp_path / "model", data))] += 1

    check()
    assert min(outcomes[True], outcomes[False]) > 100


@pytest.mark.parametrize(
    "index",
    [
        b"\xff",
        b"[",
        b"[]",
        b"{}",
        b'{"weight_map": 5}',
        b'{"weight_map": {"a": 5}}',
        b'{"weight_map": {"a": ["b"]}}',
        b'{"weight_map": {"a": "../../x"}}',
        b'{"weight_map": {"a": "b\\u0000"}}',
        b'{"weight_map": {"a": "model.safetensors"}}',
        b"[" * 100_000,
    ],
)
def test_any_index_of_weights_is_complete_or_a_sentence(index: bytes, tmp_path: Path) -> None:
    tiny.write_model(tmp_path)
    check_complete(tmp_path)
    (tmp_path / INDEX_FILE).write_bytes(index)
    with pytest.raises(UserError, match=r"^model: its files are incomplete: [^\n]+$"):
        check_complete(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 7, b"\xff" * 20, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"])
def test_any_bytes_as_weights_are_complete_or_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"a": "model.safetensors"}}')
    with pytest.raises(UserError, match=r"^model: its files are incomplete: model.safetensors [^\n]+$"):
        check_complete(tmp_path)
