"""In every format, a row with any values becomes examples, or the user gets a sentence about the row. With `badRows`
and `longRows` Skip, the row is skipped instead. The rows come from JSON lines and from parquet files. A row that is
kept for graders can be written and read again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, date
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from finetune_core.api.dataset import DatasetSpec
from finetune_core.errors import UserError
from finetune_trainer.data.dataset import LengthLimit, check_columns, columns_read, make_examples
from finetune_trainer.data.examples import ExampleSet, graded_fields
from finetune_trainer.data.formats import TokenizeFunctions
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import tokenize_functions
from tests.trainer.chat import byte_tokenizer, published

FIELD = "dataset.train"
TEMPLATE = "{instruction}{#input}\n{input}{/input} <|im_end|>"
PROMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"template": TEMPLATE},
    {"template": TEMPLATE, "completion": "{output}{#text} {text}{/text}", "completionSuffix": "<|im_end|>"},
    {"promptField": "input", "completionField": "output", "allowSpecialTokens": True},
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "learn": st.sampled_from(["AllAssistant", "LastAssistant", "Everything"]),
        "roles": st.just({"human": "user", "gpt": "assistant"}),
        "toolsField": st.sampled_from(["tools", "input"]),
        "messagesField": st.sampled_from(["messages", "text"]),
        "allowSpecialTokens": st.booleans(),
        "templateArguments": st.sampled_from([{}, {"enable_thinking": "false"}, {"enable_thinking": "[1, {}]"}]),
    },
)
FORMS = st.one_of(
    st.sampled_from(PROMPTS).map(lambda form: {"promptCompletion": form}),
    st.sampled_from([{}, {"textField": "input"}, {"allowSpecialTokens": True}]).map(lambda form: {"text": form}),
    MESSAGES.map(lambda form: {"messages": form}),
)
OPTIONS = st.fixed_dictionaries(
    {
        "format": FORMS,
        "badRows": st.sampled_from(["Skip", "Skip", "Fail"]),
        "longRows": st.sampled_from(["Skip", "Fail", "Split", "Truncate"]),
    }
)
COLUMNS = ("messages", "text", "prompt", "completion", "instruction", "input", "output", "tools")


@pytest.fixture(scope="module")
def tokenize() -> TokenizeFunctions:
    tokenizer: Any = byte_tokenizer(published("qwen3"))
    return tokenize_functions(tokenizer, today=date(2024, 2, 9))


def check(path: Path, options: dict[str, Any], tokenize: TokenizeFunctions) -> str:
    """Make examples of the rows of ``path``. Return the sentence for the user if this fails, else an empty text."""
    if "text" not in options["format"] and options["longRows"] in ("Split", "Truncate"):
        options = options | {"longRows": "Skip"}
    spec = DatasetSpec.model_validate({"train": {"volume": {"claimName": "c", "path": path.name}}} | options)
    try:
        check_columns(path, FIELD, spec.format)
        rows = read_rows(path, FIELD, columns=columns_read(spec, FIELD, None, COLUMNS[3:6]))
        found, notices = make_examples(
            rows, path.name, FIELD, spec, tokenize, limit=LengthLimit(40, "the limit"), keep_rows=True
        )
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return str(error)
    assert all("\n" not in notice for notice in notices)
    assert all(example.supervised_tokens for example in found)
    found.save(path.parent / "made")
    for row in ExampleSet.load(path.parent / "made").rows:
        assert graded_fields(row).keys() == dict(row.fields).keys()
    return ""


ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=6) | st.sampled_from(["<|im_end|>", "[]", '{"a": 1}'])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
CALL = st.fixed_dictionaries({}, optional=dict.fromkeys(("id", "type", "function", "name", "arguments"), JSON))
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "tool", "system", "human", "gpt"]) | JSON,
        "content": ANY_TEXT | JSON,
    },
    optional={
        "tool_calls": st.lists(CALL, max_size=2) | JSON,
        "weight": st.sampled_from([0, 1]) | JSON,
        **dict.fromkeys(("name", "reasoning_content", "from", "value", "function_call", "tool_call_id"), JSON),
    },
)
TOOL = st.fixed_dictionaries({}, optional=dict.fromkeys(("type", "function", "name", "parameters"), JSON))
ROW = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(COLUMNS, ANY_TEXT | JSON),
        "messages": st.lists(MESSAGE, max_size=4) | JSON,
        "tools": st.lists(TOOL, max_size=2) | JSON,
        **dict.fromkeys(("system", "chat_template_kwargs", "functions", "images", "other"), JSON),
    },
)
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
GOOD = dict.fromkeys(COLUMNS, "w") | {"messages": TALK, "tools": []}


def check_json(folder: Path, rows: Sequence[Any], options: dict[str, Any], tokenize: TokenizeFunctions) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return check(path, options, tokenize)


def test_any_json_value_is_an_example_or_a_sentence_in_every_format(
    tmp_path: Path, tokenize: TokenizeFunctions
) -> None:
    outcomes: Counter[str] = Counter()

    @given(st.lists(ROW | JSON, min_size=1, max_size=3), OPTIONS)
    @settings(max_examples=100, suppress_health_check=list(HealthCheck))
    def ask(rows: list[Any], options: dict[str, Any]) -> None:
        sentence = check_json(tmp_path, [*rows, GOOD], options, tokenize)
        outcomes[sentence.partition(":")[0]] += 1
        if sentence.startswith(FIELD) and options["badRows"] == options["longRows"] == "Skip":
            # With some options even the good row can't be used, for example where `messagesField` is `text`.
            assert "no row left to use" in sentence

    ask()
    assert min(outcomes[""], outcomes[FIELD]) > 10


@pytest.mark.long
@given(rows=st.lists(ROW | JSON, min_size=1, max_size=4), options=OPTIONS)
@settings(max_examples=3000, suppress_health_check=list(HealthCheck))
def test_many_json_values_are_examples_or_sentences_in_every_format(
    tmp_path: Path, tokenize: TokenizeFunctions, rows: list[Any], options: dict[str, Any]
) -> None:
    check_json(tmp_path, rows, options, tokenize)


TEXTS = st.text(max_size=5)
BYTES = st.binary(max_size=5)
LEAVES: list[tuple[Any, Any]] = [
    (pyarrow.null(), st.none()),
    (pyarrow.bool_(), st.booleans()),
    (pyarrow.int8(), st.integers(-(2**7), 2**7 - 1)),
    (pyarrow.uint64(), st.integers(0, 2**64 - 1)),
    (pyarrow.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pyarrow.float32(), st.floats(width=32)),
    (pyarrow.float64(), st.floats()),
    (pyarrow.string(), TEXTS),
    (pyarrow.large_string(), TEXTS),
    (pyarrow.string_view(), TEXTS),
    (pyarrow.binary(), BYTES),
    (pyarrow.binary(3), st.binary(min_size=3, max_size=3)),
    (pyarrow.date32(), st.dates()),
    (pyarrow.date64(), st.dates()),
    (pyarrow.time32("ms"), st.times()),
    (pyarrow.time64("ns"), st.integers(0, 86_399_999_999_999)),
    (pyarrow.timestamp("ns"), st.integers(-(2**62), 2**62)),
    (pyarrow.timestamp("us", "America/New_York"), st.datetimes(timezones=st.just(UTC))),
    (pyarrow.timestamp("s", "+07:30"), st.integers(-(2**40), 2**40)),
    (pyarrow.duration("us"), st.timedeltas()),
    (pyarrow.decimal128(30, 4), st.decimals(-(10**20), 10**20, places=4)),
    (pyarrow.decimal256(60, 2), st.decimals(-(10**50), 10**50, places=2)),
    (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), TEXTS),
    (pyarrow.uuid(), st.binary(min_size=16, max_size=16)),
    (pyarrow.json_(), TEXTS),
    (pyarrow.bool8(), st.integers(-2, 2)),
    (pyarrow.month_day_nano_interval(), st.just((1, 2, 3))),
    (pyarrow.sparse_union([pyarrow.field("x", pyarrow.int8())], [0]), st.integers(0, 3)),
]
Kind = tuple[Any, Any]


def listed(inner: Kind) -> Kind:
    return pyarrow.list_(inner[0]), st.lists(inner[1] | st.none(), max_size=2)


def fixed(inner: Kind) -> Kind:
    return pyarrow.list_(inner[0], 2), st.lists(inner[1], min_size=2, max_size=2)


def mapped(inner: Kind) -> Kind:
    return pyarrow.map_(pyarrow.string(), inner[0]), st.lists(st.tuples(TEXTS, inner[1]), max_size=2)


def structured(kinds: list[tuple[str, Kind]]) -> Kind:
    fields = dict(kinds)
    return (
        pyarrow.struct([pyarrow.field(name, kind) for name, (kind, _) in fields.items()]),
        st.fixed_dictionaries({name: values | st.none() for name, (_, values) in fields.items()}),
    )


NAMES = st.sampled_from(["role", "content", "type", "text", "name", "a"])
PARQUET = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        inner.map(listed),
        inner.map(fixed),
        inner.map(mapped),
        st.lists(st.tuples(NAMES, inner), max_size=3).map(structured),
    ),
    max_leaves=4,
)


def check_parquet(
    folder: Path, data: st.DataObject, options: dict[str, Any], tokenize: TokenizeFunctions
) -> str | None:
    """Write a parquet file with columns of any types, and check it. Return None if pyarrow can't write the file."""
    columns = data.draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=3, unique=True))
    arrays = {}
    try:
        for name in columns:
            kind, values = data.draw(PARQUET)
            arrays[name] = pyarrow.array(data.draw(st.lists(values | st.none(), min_size=2, max_size=2)), kind)
        for name in sorted(GOOD.keys() - arrays.keys()):
            arrays[name] = pyarrow.array([GOOD[name]] * 2)
        parquet.write_table(pyarrow.table(arrays), folder / "a.parquet")
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
        return None
    return check(folder / "a.parquet", options, tokenize)


def test_any_value_of_any_parquet_type_is_an_example_or_a_sentence_in_every_format(
    tmp_path: Path, tokenize: TokenizeFunctions
) -> None:
    outcomes: Counter[str] = Counter()

    @given(st.data(), OPTIONS)
    @settings(max_examples=100, suppress_health_check=list(HealthCheck))
    def ask(data: st.DataObject, options: dict[str, Any]) -> None:
        sentence = check_parquet(tmp_path, data, options, tokenize)
        outcomes["not written" if sentence is None else sentence.partition(":")[0]] += 1

    ask()
    assert min(outcomes[""], outcomes[FIELD]) > 5


@pytest.mark.long
@given(data=st.data(), options=OPTIONS)
@settings(max_examples=3000, suppress_health_check=list(HealthCheck))
def test_many_values_of_any_parquet_type_are_examples_or_sentences(
    tmp_path: Path, tokenize: TokenizeFunctions, data: st.DataObject, options: dict[str, Any]
) -> None:
    check_parquet(tmp_path, data, options, tokenize)
