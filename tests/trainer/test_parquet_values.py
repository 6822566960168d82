"""Values of parquet files whose Python objects in pyarrow differ from what the writer of the rows meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from finetune_core.api.dataset import MessagesFormat
from finetune_trainer.data.chat.messages import Conversation, read_conversation
from finetune_trainer.data.reader import read_rows


def rows_of(folder: Path, table: Any) -> list[dict[str, Any]]:
    """Return the columns of the rows of ``table``, written to a parquet file and read by the product."""
    parquet.write_table(table, folder / "rows.parquet")
    return [dict(row.fields) for row in read_rows(folder / "rows.parquet", "dataset.train")]


def arguments_of(fields: dict[str, Any]) -> list[Any]:
    """Return the arguments of the tool calls that a row's conversation has."""
    found = read_conversation(fields, MessagesFormat())
    assert isinstance(found, Conversation), found
    return [call["function"]["arguments"] for message in found.messages for call in message.get("tool_calls", ())]


def asked(*calls: dict[str, Any], **message: Any) -> dict[str, Any]:
    """Return a row in which the assistant makes ``calls``."""
    made = [{"type": "function", "function": call} for call in calls]
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": made, **message}]}


def test_arguments_that_the_parquet_format_adds_to_a_tool_call_are_left_out(tmp_path: Path) -> None:
    given_arguments: list[list[dict[str, Any]]] = [
        [{"city": "Paris"}],
        [{"n": 3, "where": {"street": "A", "points": [{"x": 1}, {"y": 2}]}}, {"where": {"number": 4}}],
        [{}],
    ]
    rows = [asked(*({"name": "f", "arguments": each} for each in calls)) for calls in given_arguments]
    read = rows_of(tmp_path, pyarrow.Table.from_pylist(rows))
    assert [arguments_of(fields) for fields in read] == given_arguments


@pytest.mark.parametrize("field", ["tool_calls", "function_call"])
def test_calls_in_the_other_published_shapes_get_no_added_arguments_either(tmp_path: Path, field: str) -> None:
    wrapped = (lambda call: [call]) if field == "tool_calls" else (lambda call: call)
    arguments: list[dict[str, Any]] = [{"a": 1}, {"b": [None, 2]}]
    rows = [
        {"messages": [{"role": "assistant", field: wrapped({"name": "f", "arguments": each})}]} for each in arguments
    ]
    read = rows_of(tmp_path, pyarrow.Table.from_pylist(rows))
    assert [arguments_of(fields) for fields in read] == [[each] for each in arguments]


def test_an_argument_that_is_null_in_a_jsonl_row_or_in_json_text_stays(tmp_path: Path) -> None:
    meant = {"city": None, "where": {"street": None}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(asked({"name": "f", "arguments": meant})) + "\n")
    (row,) = read_rows(tmp_path / "rows.jsonl", "dataset.train")
    assert arguments_of(dict(row.fields)) == [meant]
    as_text = asked({"name": "f", "arguments": json.dumps(meant)})
    assert arguments_of(*rows_of(tmp_path, pyarrow.Table.from_pylist([as_text]))) == [meant]


def test_null_keys_of_structs_outside_of_tool_calls_stay(tmp_path: Path) -> None:
    rows = [{"meta": {"a": 1, "b": None}, "arguments": {"c": None}}, {"meta": {"a": None, "b": 2}, "arguments": None}]
    table = pyarrow.Table.from_pylist(rows)
    assert rows_of(tmp_path, table) == rows


@pytest.mark.parametrize("narrow", [numpy.float32, numpy.float16])
@settings(max_examples=60)
@given(data=st.data())
def test_a_narrow_float_is_the_shortest_number_that_stands_for_it(
    tmp_path_factory: pytest.TempPathFactory, narrow: Any, data: st.DataObject
) -> None:
    width: Literal[16, 32] = 32 if narrow is numpy.float32 else 16
    values = data.draw(st.lists(st.floats(width=width, allow_nan=False), min_size=1, max_size=9))
    kind = pyarrow.from_numpy_dtype(numpy.dtype(narrow))
    column = pyarrow.array(numpy.array(values, dtype=narrow), type=kind)
    (read,) = [[fields["x"] for fields in rows_of(tmp_path_factory.mktemp("x"), pyarrow.table({"x": column}))]]
    for value, found in zip(values, read, strict=True):
        assert type(found) is float
        assert narrow(found) == narrow(value)
        for fewer in range(9):
            shorter = float(f"{value:.{fewer}e}")
            if narrow(shorter) == narrow(value):
                # The digits of `found` are those of a decimal of at most this length.
                assert float(f"{found:.{fewer}e}") == found, (value, found)
                break


def test_narrow_floats_are_short_wherever_they_lie(tmp_path: Path) -> None:
    narrow = pyarrow.float32()
    kinds: dict[str, tuple[Any, Any]] = {
        "alone": (narrow, 0.1),
        "list": (pyarrow.list_(narrow), [0.1, None]),
        "large": (pyarrow.large_list(narrow), [0.1]),
        "fixed": (pyarrow.list_(narrow, 2), [0.1, 0.2]),
        "struct": (pyarrow.struct([("a", pyarrow.list_(pyarrow.struct([("b", narrow)])))]), {"a": [{"b": 0.1}]}),
        "map": (pyarrow.map_(pyarrow.string(), narrow), [("a", 0.1)]),
        "half": (pyarrow.list_(pyarrow.float16()), [0.1]),
        "wide": (pyarrow.float64(), 0.10000000149011612),
    }
    columns = {}
    for name, (kind, value) in kinds.items():
        if name == "half":
            value = [numpy.float16(item) for item in value]
        columns[name] = pyarrow.array([value, None], type=kind)
    first, second = rows_of(tmp_path, pyarrow.table(columns))
    assert first == {name: value for name, (_, value) in kinds.items()}
    assert second == dict.fromkeys(kinds)
