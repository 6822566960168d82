"""Prompts and completions: which tokens the text of templates and of rows becomes, and which columns must exist."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune_core.api.dataset import DatasetSpec
from finetune_core.errors import UserError
from finetune_core.row_templates import Piece, RowError
from finetune_trainer.data.dataset import check_columns, length_limit, make_examples
from finetune_trainer.data.examples import ExampleSet
from finetune_trainer.data.formats import renderer, required_columns
from finetune_trainer.data.piece_tokens import PieceTokenizer
from finetune_trainer.data.prompts import answer_reader, base_prompt_columns
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import add_tokens, load_tokenizer, model_stop_ids, stop_ids, tokenize_functions
from finetune_trainer.evaluation.generation import Decoding, answer_text
from finetune_trainer.evaluation.sets import base_format
from tests.trainer import tiny

TEXTS = ["it is it", " ", "\n", "</s>", "<s>", "<|im_end|>", "<tool>", "<add>", "END", "é", "hello"]
SOURCE = {"s3": {"uri": "s3://rows/train.jsonl"}}
ALPACA = "### Instruction:\n{instruction}{#input}\n\n### Input:\n{input}{/input}\n\n### Response:\n"


@cache
def byte_level(*, bos: bool = True, eos: bool = False, lstrip: bool = False) -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer like that of Llama 3 or Qwen. With ``bos`` the tokenizer puts BOS before every
    text, and with ``eos`` EOS behind every text. With ``lstrip`` the token `<sep>` includes the white space before
    it."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    inner.train_from_iterator(["Question: what is it?\nAnswer: it is it. [INST] hello [/INST]"] * 20, trainer)
    inner.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    inner.add_special_tokens([AddedToken("<sep>", lstrip=lstrip)])
    inner.add_tokens(["<tool>"])
    if bos or eos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}",
            special_tokens=[(token, inner.token_to_id(token)) for token in ("<s>", "</s>")],
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def words(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny.write_model(folder / "tiny"))


@pytest.fixture(scope="module")
def llama(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny.write_llama_tokenizer(folder / "llama"))


def spec(form: dict[str, Any], **options: Any) -> DatasetSpec:
    return DatasetSpec.model_validate({"train": SOURCE, "format": form, "maxLength": 512} | options)


def made(
    folder: Path,
    rows: list[Any],
    tokenizer: PreTrainedTokenizerBase,
    form: dict[str, Any],
    *,
    added_tokens: Sequence[str] = (),
    **options: Any,
) -> tuple[ExampleSet, list[str]]:
    dataset = spec(form, **options)
    return make_examples(
        read_rows(tiny.write_jsonl(folder / "train.jsonl", rows), "dataset.train"),
        "s3://rows/train.jsonl",
        "dataset.train",
        dataset,
        tokenize_functions(tokenizer, added_tokens),
        limit=length_limit(dataset, None),
    )


def tokens(folder: Path, row: Any, tokenizer: Any, form: dict[str, Any], **options: Any) -> tuple[list[str], list[str]]:
    """Return the tokens of prompt and completion of the one example of ``row``."""
    examples, _ = made(folder, [row], tokenizer, form, **options)
    (example,) = examples
    found = tokenizer.convert_ids_to_tokens([int(number) for number in example.ids])
    return found[: example.prompt_tokens], found[example.prompt_tokens :]


def plain(text: str) -> list[Piece]:
    return [Piece(text, from_row=True)]


# Text without control tokens, and templates with control tokens, have the token ids that the tokenizer alone gives for
# the whole text.

WORDS = st.one_of(st.text(max_size=8), st.sampled_from(["it", " is", "\n", " ", "w1", "ask", "é"]))
PIECES = st.lists(st.tuples(WORDS, st.booleans()))


@pytest.mark.parametrize("name", ["words", "llama", "byte_level", "byte_level with eos"])
@settings(derandomize=True, max_examples=150, suppress_health_check=list(HealthCheck))
@given(parts=PIECES)
def test_text_without_control_tokens_has_the_ids_of_the_whole_text(
    name: str, parts: list[tuple[str, bool]], words: Any, llama: Any
) -> None:
    tokenizer = {"words": words, "llama": llama}.get(name) or byte_level(eos="eos" in name)
    pieces = [Piece(text, from_row) for text, from_row in parts if text]
    whole = "".join(piece.text for piece in pieces)
    expected = tokenizer(whole)["input_ids"]
    if expected[-1:] == [tokenizer.eos_token_id]:
        expected = expected[:-1]
    found = PieceTokenizer(tokenizer)
    assert found.begin(pieces) == (expected, ())
    assert found.follow(pieces) == (tokenizer(whole, add_special_tokens=False)["input_ids"], ())


@settings(derandomize=True, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(WORDS, st.sampled_from(["", "</s>", "<|im_end|>", " <sep> "]))))
def test_a_template_with_control_tokens_has_the_ids_of_the_whole_text(parts: list[tuple[str, str]]) -> None:
    tokenizer: Any = byte_level(lstrip=True)
    pieces = [piece for text, own in parts for piece in (Piece(text, from_row=True), Piece(own, from_row=False))]
    whole = "".join(piece.text for piece in pieces)
    assert PieceTokenizer(tokenizer).follow(pieces) == (tokenizer(whole, add_special_tokens=False)["input_ids"], ())


# The name of a control token becomes this token in a template, and stays ordinary text in a row.


CONTROLS = ["<s>", "</s>", "<|im_end|>", "<sep>", "<tool>", "<unk>", "<end>"]


@pytest.mark.parametrize("name", ["words", "llama", "byte_level", "byte_level with lstrip"])
@settings(derandomize=True, max_examples=150, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(st.tuples(st.sampled_from([*CONTROLS, "it", " is", " ", "<", "s>", "w1", "é"]), st.booleans())))
def test_control_tokens_are_tokens_in_templates_and_text_in_rows(
    name: str, parts: list[tuple[str, bool]], words: Any, llama: Any
) -> None:
    tokenizer: Any = {"words": words, "llama": llama}.get(name) or byte_level(lstrip="lstrip" in name)
    special = {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content in CONTROLS and number != tokenizer.unk_token_id
    }
    pieces = [Piece(text, from_row) for text, from_row in parts]
    found = PieceTokenizer(tokenizer).follow(pieces).ids
    own = [text for text, from_row in _joined(parts) if not from_row]
    expected = [number for text in own for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert [number for number in found if number in special] == [number for number in expected if number in special]


@cache
def bpe(kind: str, *, knows_end: bool) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the control token `<b>`, which includes the white space around it. With ``knows_end``,
    `<end>` is a control token too. ``kind`` says how the tokenizer reads white space. `every` puts a mark before
    every piece of text, and `first` before the first piece only. `bytes` and `bytes with a space` read bytes, and the
    latter puts a space in front of a text."""
    inner = Tokenizer(BPE(unk_token="<unk>"))
    if kind == "every":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "first":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes with a space")
    texts = ["it is the end of it <end> is it </b> <b> the <endless> end"] * 20
    trainer = BpeTrainer(vocab_size=330, special_tokens=["<unk>"], show_progress=False)
    inner.train_from_iterator([*texts, *pre_tokenizers.ByteLevel.alphabet()], trainer)
    inner.add_special_tokens([AddedToken("<b>", lstrip=True, rstrip=True)])
    if knows_end:
        inner.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<b>")


@pytest.mark.parametrize("kind", ["every", "first", "bytes", "bytes with a space"])
@settings(derandomize=True, max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    parts=st.lists(
        st.one_of(
            st.tuples(
                st.sampled_from(["it", " is", " ", "<", "end>", "<end>", " the end <end> of", "é"]), st.just(True)
            ),
            st.tuples(st.sampled_from(["it", " is", " ", "<b>", "\n"]), st.just(False)),
        )
    )
)
def test_a_control_token_of_a_row_is_read_as_if_the_tokenizer_did_not_know_it(
    kind: str, parts: list[tuple[str, bool]]
) -> None:
    pieces = [Piece(text, from_row) for text, from_row in parts]
    found = PieceTokenizer(bpe(kind, knows_end=True)).follow(pieces)
    whole = "".join(piece.text for piece in pieces)
    assert list(found.ids) == bpe(kind, knows_end=False)(whole, add_special_tokens=False)["input_ids"]
    assert found.read_as_text == (["<end>"] if "<end>" in whole else ())


def _joined(parts: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Return ``parts``, with neighbours of the same kind joined."""
    joined: list[tuple[str, bool]] = []
    for text, from_row in parts:
        if joined and joined[-1][1] is from_row:
            joined[-1] = (joined[-1][0] + text, from_row)
        else:
            joined.append((text, from_row))
    return joined


@settings(derandomize=True, max_examples=100, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from([*CONTROLS[:5], "it", " is", "é", " "]), min_size=1))
def test_the_text_of_rows_is_kept_to_the_letter(parts: list[str]) -> None:
    tokenizer = byte_level()
    text = "".join(parts)
    found = PieceTokenizer(tokenizer).follow(
        [Piece("<s>", from_row=False), *plain(text), Piece("</s>", from_row=False)]
    )
    assert tokenizer.decode(found.ids, clean_up_tokenization_spaces=False) == f"<s>{text}</s>"


def test_a_template_with_bos_has_bos_once(tmp_path: Path) -> None:
    form = {"promptCompletion": {"template": "<s>[INST] {prompt} [/INST]"}}
    row = {"prompt": "hello", "completion": "it"}
    for tokenizer in (byte_level(bos=True), byte_level(bos=False), byte_level(bos=True, eos=True)):
        prompt, _ = tokens(tmp_path, row, tokenizer, form)
        assert prompt.count("<s>") == 1
        assert prompt[0] == "<s>"
        examples, _ = made(tmp_path, [row], tokenizer, form)
        alone = tokenizer("<s>[INST] hello [/INST]", add_special_tokens=False)["input_ids"]
        assert list(examples[0].ids[: examples[0].prompt_tokens]) == alone


def test_what_a_tokenizer_puts_in_front_stands_once_also_where_it_is_more_than_bos(tmp_path: Path) -> None:
    """GLM's tokenizers have no BOS and put two control tokens in front of every text."""
    tokenizer = copy.deepcopy(byte_level(bos=False))
    inner = tokenizer.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(
        single="<sep> <|im_end|> $A",
        special_tokens=[(token, inner.token_to_id(token)) for token in ("<sep>", "<|im_end|>")],
    )
    for template in ("{prompt}", "<sep><|im_end|>{prompt}"):
        form = {"promptCompletion": {"template": template}}
        prompt, _ = tokens(tmp_path, {"prompt": "hello", "completion": "it"}, tokenizer, form)
        assert prompt[:2] == ["<sep>", "<|im_end|>"]
        assert not {"<sep>", "<|im_end|>"} & set(prompt[2:])


def test_what_a_template_ends_with_is_kept_and_what_the_tokenizer_appends_is_not(tmp_path: Path) -> None:
    row = {"prompt": "hello", "completion": "it"}
    for template, ends in (("{prompt}</s>", 1), ("{prompt}</s></s>", 2), ("{prompt}", 0), ("{prompt}<|im_end|>", 0)):
        for eos in (False, True):
            prompt, _ = tokens(tmp_path, row, byte_level(eos=eos), {"promptCompletion": {"template": template}})
            assert prompt.count("</s>") == ends
            assert (prompt[-1] == "<|im_end|>") is ("im_end" in template)


def test_an_example_ends_with_one_end_token_also_where_the_suffix_is_the_end_token(tmp_path: Path) -> None:
    row = {"prompt": "hello", "completion": "it"}
    for form in ({"completionSuffix": "</s>"}, {"completion": "{completion}</s>"}, {}):
        _, completion = tokens(tmp_path, row, byte_level(), {"promptCompletion": form})
        assert completion == ["i", "t", "</s>"]


def test_control_tokens_in_the_text_of_people_are_text_and_counted(tmp_path: Path, words: Any) -> None:
    rows = [
        {"question": "w1 <end> w2", "reply": "w3 <end> w4"},
        {"question": "w1", "reply": "w2"},
        {"question": "w1", "reply": "w2 <end>"},
    ]
    form = {"promptCompletion": {"promptField": "question", "completionField": "reply"}}
    examples, notices = made(tmp_path, rows, words, form)
    end = words.eos_token_id
    assert [list(example.ids).count(end) for example in examples] == [1, 1, 1]
    assert notices == [
        "dataset.train: 2 rows have control tokens of the model in the text, which were read as ordinary text (set"
        " allowSpecialTokens of dataset.format to true if they are meant as such); the first: s3://rows/train.jsonl"
        " line 1 ('<end>')"
    ]
    form["promptCompletion"]["allowSpecialTokens"] = True  # type: ignore[assignment]
    examples, notices = made(tmp_path, rows, words, form)
    assert [list(example.ids).count(end) for example in examples] == [3, 1, 1]
    assert notices == []


def test_control_tokens_in_plain_text_are_text_unless_they_are_allowed(tmp_path: Path) -> None:
    row = {"text": "<s>[INST] hello [/INST] it</s>"}
    found, _ = made(tmp_path, [row], byte_level(), {"text": {}})
    assert byte_level().decode(found[0].ids) == "<s><s>[INST] hello [/INST] it</s></s>"
    assert [int(number) for number in found[0].ids].count(byte_level().bos_token_id) == 1
    allowed, notices = made(tmp_path, [row], byte_level(), {"text": {"allowSpecialTokens": True}})
    assert list(allowed[0].ids) == byte_level()(row["text"], add_special_tokens=False)["input_ids"]
    assert notices == []


def test_a_control_token_that_template_and_row_make_together_is_text(tmp_path: Path) -> None:
    form = {"promptCompletion": {"template": "<|im_end|><{prompt}>"}}
    prompt, _ = tokens(tmp_path, {"prompt": "/s", "completion": "it"}, byte_level(), form)
    assert prompt[:2] == ["<s>", "<|im_end|>"]
    assert "</s>" not in prompt


def test_added_tokens_of_the_job_are_tokens_everywhere(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(byte_level())
    added = ["<START_Q>", "<END_A>"]
    add_tokens(tokenizer, added)
    form = {"promptCompletion": {"template": "<START_Q>{prompt}", "completionSuffix": "<END_A>"}}
    row = {"prompt": "it<END_A></s>", "completion": "is<START_Q>"}
    prompt, completion = tokens(tmp_path, row, tokenizer, form, added_tokens=added)
    assert [token for token in prompt if token in (*added, "</s>")] == added
    assert completion[-3:] == ["<START_Q>", "<END_A>", "</s>"]


def test_a_tokenizer_that_takes_control_tokens_for_words_names_the_row(tmp_path: Path) -> None:
    inner = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "it": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    with pytest.raises(
        UserError, match=r"line 1 holds '</s>', a control token that the model's tokenizer can't read as ordinary text"
    ):
        made(tmp_path, [{"prompt": "it", "completion": "it </s>"}], tokenizer, {"promptCompletion": {}})
    unknown = PieceTokenizer(tokenizer).follow(plain("it <unk> w"))
    assert unknown.ids == [2, 0, 0]


def test_no_row_can_write_what_stands_for_a_control_token() -> None:
    tokenizer = PieceTokenizer(byte_level())
    pieces = [Piece("<s>", from_row=False), *plain("</s>")]
    tokenizer.follow(pieces)
    other = PieceTokenizer(byte_level())
    other.follow(pieces)
    marks = [found._literal._mark for found in (tokenizer, other) if found._literal is not None]
    assert len(set(marks)) == 2


# Templates of prompts and completions, in which the names of columns stand in braces.


def test_alpaca_rows_are_one_line_of_yaml(tmp_path: Path) -> None:
    form = {"promptCompletion": {"template": ALPACA, "completionField": "output"}}
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "hello"},
    ]
    examples, _ = made(tmp_path, rows, byte_level(), form)
    decoded = [byte_level().decode(example.ids) for example in examples]
    assert decoded == [
        "<s>### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>",
        "<s>### Instruction:\nGreet.\n\n### Response:\nhello</s>",
    ]


def test_a_completion_of_several_columns_is_learned_as_one(tmp_path: Path) -> None:
    form = {"promptCompletion": {"template": "{q}\n", "completion": "{why}\n#### {answer}", "completionSuffix": "."}}
    prompt, completion = tokens(tmp_path, {"q": "what", "why": "it is", "answer": 42}, byte_level(bos=False), form)
    tokenizer: Any = byte_level()
    assert tokenizer.convert_tokens_to_string(prompt) == "what\n"
    assert tokenizer.convert_tokens_to_string(completion[:-1]) == "it is\n#### 42."


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"q": "x", "why": "", "answer": " "}, "has an empty completion"),
        ({"q": "x", "why": "it"}, "has no 'answer'"),
        ({"q": ["x"], "why": "it", "answer": "it"}, r"has a 'q' that is not text \(a list\)"),
        (
            {"q": "", "why": "it", "answer": "it"},
            "has an empty prompt, and the model's tokenizer puts no token in fron",
        ),
    ],
)
def test_a_row_that_teaches_nothing_is_bad(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    form = {"promptCompletion": {"template": "{q}", "completion": "Because {why}: {answer}"}}
    with pytest.raises(UserError, match=rf"^dataset.train: s3://rows/train.jsonl line 1 {problem}"):
        made(tmp_path, [row], byte_level(bos=False), form)


def test_an_empty_prompt_is_a_prompt_where_the_tokenizer_puts_bos_in_front(tmp_path: Path) -> None:
    prompt, _ = tokens(tmp_path, {"prompt": "", "completion": "it"}, byte_level(eos=True), {"promptCompletion": {}})
    assert prompt == ["<s>"]


ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=5)
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(ANY_TEXT, inner, max_size=2),
)


@settings(derandomize=True, max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(["instruction", "input", "output", "text"]), ANY_VALUE))
def test_a_row_of_any_values_becomes_an_example_or_a_reason(row: dict[str, Any]) -> None:
    tokenize = tokenize_functions(byte_level())
    forms: tuple[dict[str, Any], ...] = (
        {"promptCompletion": {"template": ALPACA, "completionField": "output"}},
        {"text": {}},
    )
    for form in forms:
        made = renderer(spec(form).format, tokenize)(row)
        if isinstance(made, str):
            assert made.startswith("has ")
        else:
            assert made[0].supervised_tokens > 0


def test_a_tokenizer_that_fails_is_a_fault_of_the_row() -> None:
    """A real tokenizer fails if its file is wrong: here a WordLevel model whose unknown token is not in its
    vocabulary."""
    inner = Tokenizer(WordLevel({"it": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    with pytest.raises(RowError, match=r"^can't be tokenised: WordLevel error: Missing"):
        PieceTokenizer(tokenizer).follow(plain("other"))


def test_only_the_columns_that_a_template_names_are_read() -> None:
    form = {"template": "{prompt}{#b}{c}{/b}", "promptField": "a", "completion": "{d}"}
    assert [column.name for column in required_columns(spec({"promptCompletion": form}).format)] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("form", "base_prompt", "problem"),
    [
        ({"template": "{a}{x}"}, None, "dataset.format.promptCompletion.template: no column 'x' in train.jsonl; it"),
        ({"template": "{a}{#x}.{/x}"}, None, "dataset.format.promptCompletion.template: no column 'x' in train.jsonl"),
        ({"completion": "{a}{x}"}, None, "dataset.format.promptCompletion.completion: no column 'x' in train.jsonl"),
        ({"promptField": "x"}, None, "dataset.format.promptCompletion.promptField: no column 'x' in train.jsonl; it"),
        ({}, "{prompt}{x}", "evaluation.basePrompt: no column 'x' in train.jsonl; it has 'a', 'prompt', 'completion'"),
        ({}, "{x", "evaluation.basePrompt: must hold each brace of the text twice"),
    ],
)
def test_a_name_that_no_row_has_is_named_with_the_names_that_the_file_has(
    form: dict[str, Any], base_prompt: str | None, problem: str, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "train.jsonl", [{"a": "1", "prompt": "2", "completion": "3"}])
    dataset = spec({"promptCompletion": form}, validation=SOURCE)
    field = "dataset.validation"
    with pytest.raises(UserError) as caught:
        check_columns(path, field, dataset.format, base_prompt_columns(dataset, field, base_prompt))
    assert str(caught.value).startswith(problem)


def test_a_column_that_only_some_rows_have_may_stand_in_an_optional_part(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "t.jsonl", [{"prompt": "1", "completion": "2"}, {"input": "3"}])
    dataset = spec({"promptCompletion": {"template": "{prompt}{#input}{input}{/input}"}})
    check_columns(path, "dataset.train", dataset.format)


def test_the_columns_of_the_base_prompt_are_needed_in_the_scored_rows_only() -> None:
    dataset = spec({"promptCompletion": {}}, validation=SOURCE, test=SOURCE)
    assert base_prompt_columns(dataset, "dataset.train", "{x}") == []
    assert base_prompt_columns(dataset, "dataset.validation", "{x}") == []
    assert [column.name for column in base_prompt_columns(dataset, "dataset.test", "{x}{prompt}")] == ["x", "prompt"]


# The tokens at which an answer ends.


@pytest.mark.parametrize(
    ("form", "ends"),
    [
        ({}, ["</s>"]),
        ({"completionSuffix": "<|im_end|>"}, ["</s>", "<|im_end|>"]),
        ({"completion": "{completion}\n<|im_end|>\n<sep>"}, ["</s>", "<|im_end|>"]),
        ({"completion": "<sep>{completion}"}, ["</s>"]),
        ({"completionSuffix": "."}, ["</s>"]),
    ],
)
def test_an_answer_ends_at_the_first_control_token_behind_the_completion(form: dict[str, Any], ends: list[str]) -> None:
    tokenizer: Any = byte_level()
    found = stop_ids(tokenizer, spec({"promptCompletion": form}).format)
    assert tokenizer.convert_ids_to_tokens(found) == ends


def test_the_models_own_stop_tokens_are_kept(tmp_path: Path) -> None:
    tokenizer = byte_level()
    assert stop_ids(tokenizer, spec({"text": {}}).format, [7, 9, -1, 10**9]) == [7, 9, tokenizer.eos_token_id]
    assert model_stop_ids(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert model_stop_ids(tmp_path) == [5]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    assert model_stop_ids(tmp_path) == [1, 5]


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"eos_token_id": null}', '{"eos_token_id": ["a", true]}', "\udfff"]
)
def test_stop_tokens_that_can_not_be_read_are_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert model_stop_ids(tmp_path) == []


def test_the_base_prompt_takes_every_column_and_has_no_suffix(tmp_path: Path) -> None:
    dataset = spec({"promptCompletion": {"promptField": "q", "completion": "{a}!", "completionSuffix": "<|im_end|>"}})
    form = base_format(dataset, "<s>{{{topic}}}: {prompt} {q}\n")
    row = {"topic": "it", "q": "what </s>", "a": "is"}
    examples, _ = made(tmp_path, [row], byte_level(), form.model_dump(by_alias=True, exclude_none=True))
    assert byte_level().decode(examples[0].ids) == "<s>{it}: what </s> what </s>\nis!</s>"
    assert [int(number) for number in examples[0].ids].count(byte_level().eos_token_id) == 1


# ---- The right answer where answers are graded ----


@settings(max_examples=300)
@given(
    texts=st.lists(st.tuples(st.sampled_from(TEXTS), st.booleans()), min_size=1, max_size=6),
    suffix=st.sampled_from(["", "END", "</s>", "<add>"]),
    allowed=st.booleans(),
)
def test_the_right_answer_of_a_row_is_what_a_model_would_answer_that_repeats_the_completion(
    texts: list[tuple[str, bool]], suffix: str, allowed: bool
) -> None:
    tokenizer = copy.deepcopy(byte_level())
    add_tokens(tokenizer, ["<add>"])
    form = spec({"promptCompletion": {"completionSuffix": suffix, "allowSpecialTokens": allowed}}).format
    assert form.prompt_completion is not None
    completion = [Piece(text, from_row) for text, from_row in texts]
    # If the job allows control tokens in rows, the trainer reads the texts of a row like those of a template.
    pieces = [Piece(piece.text, piece.from_row and not allowed) for piece in completion]
    try:
        ids = PieceTokenizer(tokenizer, ["<add>"]).follow([*pieces, Piece(suffix, from_row=False)]).ids
    except RowError:
        return
    stops = stop_ids(tokenizer, form)
    decoding = Decoding(
        tokenizer=tokenizer,
        stop_ids=stops,
        suffix=suffix,
        suppressed=(),
        batch_size=1,
        max_new_tokens=100,
        context=100,
    )
    read = answer_reader(form.prompt_completion, tokenizer, ["<add>"], stops)
    assert read(completion) == answer_text(ids, decoding)
