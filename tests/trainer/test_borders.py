"""The preflight check tells where prompt and completion meet at a place where running text has no border of tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune_core.api.dataset import DatasetFormat, PromptCompletionFormat
from finetune_trainer.data.examples import Example
from finetune_trainer.data.formats import renderer
from finetune_trainer.data.tokenizer import load_tokenizer, tokenize_functions
from finetune_trainer.preflight.border_check import LARGEST_SHARE, MOST_EXAMPLES, border_notices, is_natural
from finetune_trainer.preflight.model_check import check_model
from finetune_trainer.preflight.row_check import check_rows
from finetune_trainer.sources.model_files import model_files
from finetune_trainer.storage.root import object_store
from tests.core.test_docs import ROOT
from tests.trainer import tiny
from tests.trainer.families import write_family
from tests.trainer.test_base_checks import job, model_folder

WORDS = ("the", "mill", "is", "open", "Question", "Answer", "Sentence", "Meaning", "yes", "no", "twelve", "rivers")


def byte_level() -> PreTrainedTokenizerFast:
    """Return a tokenizer of GPT-2's kind: a word and the space before it are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [" ".join(WORDS), *(f"{word}: {other}\n{word} {other}" for word in WORDS for other in WORDS)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """Return a tokenizer of Llama 2's kind: it adds a space before every text, and several spaces are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    # Words are split for the training only, so that no token reaches over a space.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([f"{word}: {other} {word}" for word in WORDS for other in WORDS], trainer)
    made = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    made["model"]["vocab"]["▁▁"] = len(made["model"]["vocab"])
    made["model"]["merges"].insert(0, ["▁", "▁"])
    tokenizer = Tokenizer.from_str(json.dumps(made))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS: Mapping[str, PreTrainedTokenizerFast] = {"byte level": byte_level(), "sentence piece": sentence_piece()}


def examples_of(tokenizer: Any, template: str, completion: str, answers: list[str]) -> list[Example]:
    form = DatasetFormat(prompt_completion=form_of(template, completion))
    render = renderer(form, tokenize_functions(tokenizer, [], ends=[tokenizer.eos_token_id]))
    rows = [render({"prompt": "the mill is open", "completion": answer}) for answer in answers]
    assert not any(isinstance(row, str) for row in rows)
    return [row[0] for row in rows if not isinstance(row, str)]


def form_of(template: str, completion: str) -> PromptCompletionFormat:
    return PromptCompletionFormat(template=template, completion=completion)


@pytest.mark.parametrize(
    ("kind", "template", "completion", "natural"),
    [
        ("byte level", "Question: {prompt} Answer: ", "{completion}", False),
        ("byte level", "Question: {prompt} Answer:", " {completion}", True),
        ("byte level", "Question: {prompt} Answer:", "{completion}", True),
        ("byte level", "Question: {prompt}\n", "{completion}", True),
        ("byte level", "Question: {prompt}\n", "\n{completion}", True),
        ("byte level", "{prompt}  ", "{completion}", False),
        ("sentence piece", "Question: {prompt} Answer: ", "{completion}", False),
        ("sentence piece", "Question: {prompt} Answer:", "{completion}", True),
        # Two spaces, but with the tokens that two spaces have in running text.
        ("sentence piece", "Question: {prompt} Answer:", " {completion}", True),
    ],
)
def test_a_border_is_natural_where_running_text_has_it(
    kind: str, template: str, completion: str, natural: bool
) -> None:
    tokenizer = TOKENIZERS[kind]
    examples = examples_of(tokenizer, template, completion, ["yes", "twelve rivers", "no"])
    assert [is_natural(example, tokenizer) for example in examples] == [natural] * 3
    notices = border_notices(examples, tokenizer, form_of(template, completion), "dataset.train")
    assert bool(notices) is not natural
    for notice in notices:
        assert notice.startswith("dataset.train: in 3 of 3 rows the completion begins with another token")


def test_the_notice_says_how_to_write_it_instead() -> None:
    tokenizer = TOKENIZERS["byte level"]
    template = "Question: {prompt} Answer: "
    examples = examples_of(tokenizer, template, "{completion}", ["yes"])
    form = PromptCompletionFormat(template=template)
    (notice,) = border_notices(examples, tokenizer, form, "dataset.train")
    assert "template ends with a space" in notice
    assert '(completion: " {completion}")' in notice
    advised = form_of("Question: {prompt} Answer:", " {completion}")
    better = examples_of(tokenizer, advised.template, advised.completion or "", ["yes"])
    assert border_notices(better, tokenizer, advised, "dataset.train") == []


@given(
    st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=5), st.sampled_from([*TOKENIZERS])
)
def test_any_rows_have_an_answer(answers: list[str], kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    for template in ("{prompt}: ", "{prompt}\n"):
        for example in examples_of(tokenizer, template, "{completion}", answers):
            assert is_natural(example, tokenizer) in (True, False, None)


def test_few_rows_are_no_reason_for_a_notice() -> None:
    tokenizer = TOKENIZERS["byte level"]
    good = examples_of(tokenizer, "{prompt}:", " {completion}", ["yes"]) * MOST_EXAMPLES
    bad = examples_of(tokenizer, "{prompt}: ", "{completion}", ["yes"])
    few = int(LARGEST_SHARE * MOST_EXAMPLES)
    form = form_of("{prompt}:", " {completion}")
    assert border_notices([*bad * few, *good], tokenizer, form, "dataset.train") == []
    (notice,) = border_notices([*bad * (few + 1), *good], tokenizer, form, "dataset.train")
    assert f"in {few + 1} of {MOST_EXAMPLES} rows" in notice
    assert "change how dataset.format.promptCompletion.template ends" in notice


def notices_of(folder: Path, template: str, completion: str) -> list[str]:
    """Return the notices of the preflight check about training rows, with a tokenizer of GPT-2's kind."""
    write_family("gpt-2", model_folder(folder))
    form = {"promptField": "question", "completionField": "reply", "template": template, "completion": completion}
    made = job(folder, dataset__format={"promptCompletion": form})
    store, dataset = object_store(made.config, made.paths), made.config.dataset
    files = model_files(made.config.model, made.paths, store)
    facts = check_model(files, made.folder / "small", made.folder / "headers", [])
    tiny.write_byte_tokenizer(folder / "tokenizer")
    facts = replace(facts, tokenizer=load_tokenizer(folder / "tokenizer"), rows=400)
    return check_rows(dataset, dataset.train, "dataset.train", made.paths, store, made.folder / "rows", facts)


def test_the_preflight_check_tells_it_of_the_training_rows(tmp_path: Path) -> None:
    assert "begins with another token" not in str(notices_of(tmp_path / "good", "{prompt}:", " {completion}"))
    (notice,) = notices_of(tmp_path / "bad", "{prompt}: ", "{completion}")
    assert "begins with another token" in notice


def test_the_examples_have_no_template_that_ends_with_a_space() -> None:
    """Every job of the project is an example."""
    found = 0
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            template = document["spec"]["dataset"]["format"].get("promptCompletion", {}).get("template")
            if template is not None:
                found += 1
                assert template == template.rstrip(" \t"), path
    assert found > 10
