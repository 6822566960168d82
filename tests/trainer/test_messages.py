"""Messages of rows: what is no JSON in them, and which answers belong to a tool call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_core.api.dataset import MessagesFormat
from finetune_trainer.data.chat.messages import Conversation, read_conversation
from finetune_trainer.data.reader import read_rows

USER = {"role": "user", "content": "?"}
FUNCTION = {"name": "f", "arguments": "{}"}


def read(fields: Any) -> Conversation | str:
    return read_conversation(fields, MessagesFormat())


def called(arguments: Any, **call: Any) -> list[dict[str, Any]]:
    """Return a question and a call with ``arguments``, and with the further fields ``call``."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}, **call}]
    return [USER, {"role": "assistant", "tool_calls": calls}]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("place", ["{}", '{{"a": [1, {{"b": {}}}]}}', '{{"x": {}}}'])
def test_a_number_that_is_not_finite_makes_a_bad_row_in_every_json_that_is_read(
    tmp_path: Path, number: str, place: str
) -> None:
    text = place.format(number)
    in_calls = "has no JSON as 'tool_calls' of message 2 (a number that is not finite)"
    whole = json.dumps(called("ARGUMENTS"))
    if text.startswith("{"):
        assert read({"messages": called(text)}) == in_calls
        in_row = whole.replace('"ARGUMENTS"', text)
        assert read({"messages": in_row}) == in_calls
        (tmp_path / "a.jsonl").write_text(f'{{"messages": {in_row}}}\n')
        (row,) = read_rows(tmp_path / "a.jsonl", "dataset.train")
        assert read(row.fields) == in_calls
        problem = read({"messages": called("{}"), "chat_template_kwargs": text})
        assert (
            problem == "has a 'chat_template_kwargs' that is not an object of JSON values (a number that is not finite)"
        )
    tools = f'[{{"name": "f", "parameters": {text}}}]'
    assert read({"messages": called("{}"), "tools": tools}) == (
        "has a 'tools' that is not JSON (a number that is not finite)"
    )


@pytest.mark.parametrize("text", ['{"x": 1e300}', '{"x": -0.0}', '{"x": "NaN"}', '{"NaN": null}'])
def test_finite_numbers_and_texts_are_read(text: str) -> None:
    found = read({"messages": called(text)})
    assert isinstance(found, Conversation), found
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == json.loads(text)


UNKNOWN = "has a tool_call_id in message {} that no tool call before it has"


@pytest.mark.parametrize(
    ("before", "answer", "problem"),
    [
        ([USER], {"tool_call_id": "c9"}, UNKNOWN.format(2)),
        ([USER, {"role": "assistant", "content": "Yo"}], {"tool_call_id": "c9"}, UNKNOWN.format(3)),
        (called("{}", id="c1"), {"tool_call_id": "c9"}, UNKNOWN.format(3)),
        (called("{}", id="c1"), {"tool_call_id": "c1"}, None),
        (called("{}", id=1), {"tool_call_id": "1"}, None),
        (called("{}", id="c1"), {}, None),
        (called("{}"), {"tool_call_id": "c9"}, None),
        (called("{}"), {}, None),
        ([USER, {"role": "assistant", "function_call": FUNCTION}], {"tool_call_id": "c9"}, None),
        ([USER], {}, None),
    ],
    ids=[
        "no answer before it",
        "no call",
        "another call",
        "its call",
        "a number as id",
        "no id in the answer",
        "no id in the call",
        "no id at all",
        "the older form, which has no ids",
        "neither call nor id",
    ],
)
def test_the_id_of_an_answer_must_be_that_of_a_call(
    before: list[dict[str, Any]], answer: dict[str, Any], problem: str | None
) -> None:
    found = read({"messages": [*before, {"role": "tool", "content": "9", **answer}]})
    assert found == problem if problem else isinstance(found, Conversation), found
