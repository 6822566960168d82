"""Conversations of thousands of messages, calls or keys are read in seconds, and the errors about them stay short."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_core.api.dataset import DatasetSpec
from finetune_core.errors import UserError
from finetune_trainer.data.chat import chat_template
from finetune_trainer.data.dataset import length_limit, make_examples
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.tokenizer import tokenize_functions
from tests.trainer.chat import byte_tokenizer, published, rendered

APPENDING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "No"},
]
SPEC = DatasetSpec.model_validate(
    {"train": {"s3": {"uri": "s3://finetune/a.jsonl"}}, "format": {"messages": {}}, "maxLength": 4096}
)


def problem(row: dict[str, Any], template: str = APPENDING) -> str:
    """Return the error for a data source that holds only ``row``."""
    tokenize = tokenize_functions(byte_tokenizer(template))
    with pytest.raises(UserError) as caught:
        make_examples([Row(1, row)], "a.jsonl", "dataset.train", SPEC, tokenize, limit=length_limit(SPEC, None))
    return str(caught.value)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets, at each rendering of a template, the number of rendered messages."""
    numbers: list[int] = []
    text = chat_template.ChatTemplate.text

    def counted(self: Any, messages: Any, *arguments: Any, **named: Any) -> str:
        numbers.append(len(messages))
        return text(self, messages, *arguments, **named)

    monkeypatch.setattr(chat_template.ChatTemplate, "text", counted)
    return numbers


@pytest.mark.parametrize("template", [APPENDING, published("qwen3")])
def test_a_row_of_thousands_of_turns_is_too_long_after_its_first_ones(template: str, asked: list[int]) -> None:
    """For each answer, all messages before the answer are rendered, so all answers of a row with thousands of turns
    would take hours."""
    sentence = problem({"messages": TALK * 1000}, template)
    assert sentence.startswith("dataset.train: a.jsonl line 1 has ")
    assert int(sentence.split()[5]) > 10 * 4096
    assert sum(count > 500 for count in asked) < 60
    assert len(asked) < 1000


@pytest.mark.parametrize(("most", "left_out"), [(9999, ""), (2, "tool_calls[2]")])
def test_of_thousands_of_tool_calls_few_are_looked_for(most: int, left_out: str, asked: list[int]) -> None:
    template = APPENDING.replace("m.tool_calls or []", f"(m.tool_calls or [])[:{most}]")
    calls = [{"function": {"name": "f", "arguments": {"at": at} if at % 2 else {}}} for at in range(2000)]
    row = {"messages": [TALK[0], {"role": "assistant", "content": "Yo", "tool_calls": calls}]}
    examples = rendered(byte_tokenizer(template), row)
    assert left_out in examples if left_out else not isinstance(examples, str)
    assert len(asked) < 100


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [TALK[0], {**TALK[1], "k" * 100_000: "x"}]},
        {"messages": [TALK[0], {**TALK[1], "content": [{"type": "k" * 100_000}]}]},
        {"messages": TALK, "chat_template_kwargs": {"k" * 100_000: 1}},
    ],
)
def test_a_very_long_name_in_a_row_is_cut_off_in_its_sentence(row: dict[str, Any]) -> None:
    sentence = problem(row)
    assert sentence.endswith("kkk... (set dataset.badRows to Skip to leave such rows out)")
    assert len(sentence) < 1000


def test_a_hundred_thousand_keys_in_json_text_are_searched_once_for_equal_ones() -> None:
    text = "{" + ",".join(f'"{number}":0' for number in [*range(100_000), 99_999]) + "}"
    found = rendered(byte_tokenizer(APPENDING), {"messages": text})
    assert found == "has JSON text with the key '99999' twice in 'messages'"
