"""Conversations: which of their tokens are learned, with which templates and arguments they are rendered, and what is
refused."""

from __future__ import annotations

import json
import sys
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_core.api.dataset import DatasetFormat, DatasetSpec
from finetune_core.errors import UserError
from finetune_core.template_arguments import RESERVED, template_arguments
from finetune_trainer.data.chat import chat_template
from finetune_trainer.data.chat.chat_template import taken_names, use_chat_template
from finetune_trainer.data.dataset import check_columns, check_tools_of_mix, length_limit, make_examples
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.tokenizer import generation_stop_ids, stop_ids, tokenize_functions
from tests.trainer import tiny
from tests.trainer.chat import byte_tokenizer, learned, published, rendered

APPENDING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = APPENDING + "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "No"},
]


def spec(**form: Any) -> DatasetSpec:
    source = {"s3": {"uri": "s3://finetune/train.jsonl"}}
    return DatasetSpec.model_validate({"train": source, "format": {"messages": form}, "maxLength": 4096})


def test_a_template_that_appends_makes_one_example_and_one_that_rewrites_makes_one_for_each_answer() -> None:
    for template, answers in ((APPENDING, [["Yo", "No"]]), (published("qwen3"), [["Yo"], ["No"]])):
        tokenizer = byte_tokenizer(template)
        thought = "<think>\n\n</think>\n\n" if "think" in template else ""
        expected = [[f"{thought}{text}<|im_end|>" for text in texts] for texts in answers]
        assert learned(tokenizer, rendered(tokenizer, {"messages": TALK})) == expected


def test_a_row_with_several_examples_is_counted_as_one_row() -> None:
    tokenizer = byte_tokenizer(published("qwen3"))
    rows = [Row(1, {"messages": TALK}), Row(2, {"messages": TALK[:2]})]
    dataset = spec()
    examples, notices = make_examples(
        rows,
        "train.jsonl",
        "dataset.train",
        dataset,
        tokenize_functions(tokenizer),
        limit=length_limit(dataset, None),
        keep_rows=True,
    )
    assert notices == ["dataset.train: 2 rows became 3 examples"]
    assert [row.number for row in examples.rows] == [1, 1, 2]


def test_the_last_answer_alone_or_every_token_can_be_learned() -> None:
    tokenizer = byte_tokenizer(APPENDING)
    assert learned(tokenizer, rendered(tokenizer, {"messages": TALK}, learn="LastAssistant")) == [["No<|im_end|>"]]
    examples = rendered(tokenizer, {"messages": TALK}, learn="Everything")
    assert not isinstance(examples, str), examples
    (example,) = examples
    whole = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert list(example.ids) == whole[: len(example.ids)]
    assert list(example.spans) == [(0, len(whole) - 1)]  # The line break behind the last end token is not learned.
    asked = rendered(tokenizer, {"messages": TALK[:1]}, learn="Everything")
    assert learned(tokenizer, asked) == [["<|im_start|>user\nHi<|im_end|>\n"]]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"weight": 2}, "has a weight in message 4 that is not 0 or 1"),
        ({"weight": True}, "has a weight in message 4 that is not 0 or 1"),
        ({"weight": "0"}, "has a weight in message 4 that is not 0 or 1"),
        ({"role": "user", "weight": 1}, "has weight 1 in message 4, which is not of the assistant"),
        ({"tool_calls": [{"type": "function"}]}, "has a tool call without a name in message 4"),
        ({"tool_calls": "x"}, "has tool_calls in message 4 that are not a list of calls"),
        (
            {"tool_calls": [{"name": "f", "arguments": "[1]"}]},
            "has arguments of a tool call in message 4 that are not a",
        ),
        ({"tool_calls": [{"name": "f", "arguments": "{"}]}, "has arguments of a tool call in message 4 that are not a"),
        ({"tool_calls": [{"name": "f", "x": 1}]}, "has a tool call with the field 'x' in message 4"),
        ({"tool_calls": [{"name": "f", "type": "custom"}]}, "has a tool call with the type 'custom' in message 4"),
        ({"role": "user", "tool_calls": [{"name": "f"}]}, "has tool_calls in message 4, which is not of the assistant"),
        ({"content": [{"type": "text"}]}, "has no text as content of message 4"),
        ({"content": ["x"]}, "has no text as content of message 4"),
        ({"content": 5}, "has no text as content of message 4"),
        ({"content": []}, "has an empty answer in message 4"),
        ({"reasoning_content": "\ud800"}, "has no JSON as 'reasoning_content' of message 4 (half of a surrogate"),
        ({"other": date(2024, 2, 9)}, "has no JSON as 'other' of message 4"),
        ({"tool_calls": [{"name": "f", "arguments": {"a": b"x"}}]}, "has no JSON as 'tool_calls' of message 4"),
        ({"role": None}, "has no role in message 4"),
    ],
)
def test_a_field_that_can_not_be_read_is_named(message: dict[str, Any], problem: str) -> None:
    tokenizer = byte_tokenizer(APPENDING)
    refused = rendered(tokenizer, {"messages": [*TALK[:3], {**TALK[3], **message}]})
    assert isinstance(refused, str)
    assert refused.startswith(problem)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": [{**TALK[1], "weight": 0}]},
            "has no message of the assistant to learn, because all have weight 0",
        ),
        ({"messages": TALK[1:]}, "begins with an answer of the assistant, which the model can never give"),
        ({"messages": TALK, "tools": "x"}, "has a 'tools' that is not a list of tools"),
        ({"messages": TALK, "tools": [{}]}, "has a 'tools' that is not a list of tools"),
        ({"messages": TALK, "tools": [{"type": "function"}]}, "has a tool without a name in 'tools'"),
        (
            {"messages": TALK, "tools": [{"name": "\ud800"}]},
            "has a 'tools' that is not JSON (half of a surrogate pair)",
        ),
        ({"messages": TALK, "system": 5}, "has a 'system' that is not text"),
        (
            {"messages": [{"role": "system", "content": "x"}, *TALK], "system": "y"},
            "has a system message both in 'system'",
        ),
        ({"messages": TALK, "chat_template_kwargs": 5}, "has a 'chat_template_kwargs' that is not an object"),
        (
            {"messages": TALK, "chat_template_kwargs": {"enable_thinking": True}},
            "has an argument 'enable_thinking' for the chat template that is not read by the chat template, which",
        ),
        (
            {"messages": TALK, "chat_template_kwargs": {"tools": []}},
            "has an argument 'tools' for the chat template that is",
        ),
    ],
)
def test_a_row_that_can_not_be_read_is_named(row: dict[str, Any], problem: str) -> None:
    refused = rendered(byte_tokenizer(APPENDING), row)
    assert isinstance(refused, str)
    assert refused.startswith(problem)


def test_a_template_that_refuses_system_messages_names_them_and_reads_all_others() -> None:
    tokenizer = byte_tokenizer(published("gemma"))
    refused = rendered(tokenizer, {"messages": [{"role": "system", "content": "Be brief"}, *TALK]})
    assert refused == "can't be rendered by the model's chat template: System role not supported"
    assert learned(tokenizer, rendered(tokenizer, {"messages": TALK})) == [["Yo<end_of_turn>", "No<end_of_turn>"]]


@pytest.mark.parametrize("template", [APPENDING, published("qwen3"), published("llama3_1"), published("gemma")])
def test_a_control_token_in_a_message_is_text_unless_the_job_says_otherwise(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    control = next(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    control = "<|im_end|>" if "<|im_end|>" in template else control
    number = tokenizer.convert_tokens_to_ids(control)
    row = {
        "messages": [{"role": "user", "content": f"a {control} b"}, {"role": "assistant", "content": f"c{control}d"}]
    }
    plain, read, meant = (
        rendered(tokenizer, row if index else {"messages": TALK[:2]}, allowSpecialTokens=index == 2)
        for index in range(3)
    )
    assert not isinstance(plain, str)
    assert not isinstance(read, str)
    assert not isinstance(meant, str)
    count = [list(examples[0].ids).count(number) for examples in (plain, read, meant)]
    assert count[1] == count[0]
    assert count[2] == count[0] + 2
    assert (plain[0].read_as_text, read[0].read_as_text, meant[0].read_as_text) == ([], [control], ())
    assert tokenizer.decode(list(read[0].ids)) == tokenizer.decode(list(meant[0].ids))


def test_control_tokens_in_tools_and_in_arguments_of_calls_are_text_too() -> None:
    tokenizer = byte_tokenizer(published("qwen3"))
    number = tokenizer.convert_tokens_to_ids("<|im_start|>")
    call = {"name": "area", "arguments": {"role": "<|im_start|>", "id": ["<|im_start|>"]}}
    row = {"messages": [TALK[0], {"role": "assistant", "tool_calls": [call]}]}
    tools = [{"name": "area", "description": "<|im_start|>", "parameters": {}}]
    examples = rendered(tokenizer, row | {"tools": tools})
    others = rendered(tokenizer, {"messages": TALK[:2], "tools": [{"name": "area", "parameters": {}}]})
    assert not isinstance(examples, str), examples
    assert not isinstance(others, str), others
    ids = list(examples[0].ids)
    assert ids.count(number) == list(others[0].ids).count(number)
    assert tokenizer.decode(ids).count("<|im_start|>") == ids.count(number) + 3


def test_a_template_that_cuts_a_control_token_apart_is_named() -> None:
    tokenizer = byte_tokenizer(APPENDING.replace("m.content", "m.content[3:]"))
    refused = rendered(
        tokenizer, {"messages": [{"role": "user", "content": "<|im_end|> ends"}, {**TALK[1], "content": "Hello"}]}
    )
    assert refused == (
        "has a control token in a message that the model's chat template cuts apart or looks for (remove it, or set"
        " allowSpecialTokens)"
    )


def test_thoughts_of_a_row_stand_behind_the_tag_that_the_generation_prompt_opens() -> None:
    tokenizer = byte_tokenizer(published("deepseekv3"))
    for answer in ({"content": "<think>\nGreet\n</think>\n\nYo"}, {"content": "Yo", "reasoning_content": "Greet"}):
        examples = rendered(tokenizer, {"messages": [TALK[0], {"role": "assistant", **answer}]})
        assert learned(tokenizer, examples) == [["Greet\n</think>\n\nYo<｜end▁of▁sentence｜>"]]
        assert not isinstance(examples, str)
        asked = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False)
        assert list(examples[0].ids[: examples[0].prompt_tokens]) == asked


def test_thoughts_in_a_content_that_the_template_removes_are_not_lost_without_a_word() -> None:
    """A template may remove the thoughts of earlier answers, but the answer that is learned must keep its thoughts."""
    removing = APPENDING.replace("m.content", "m.content.split('</think>')[-1]")
    row = {"messages": [TALK[0], {"role": "assistant", "content": "<think>Greet</think>Yo"}]}
    refused = rendered(byte_tokenizer(removing), row)
    assert refused == (
        "has 'content before </think>' in message 2 of role 'assistant', which the model's chat template leaves out"
    )
    tokenizer = byte_tokenizer(published("qwen3"))
    assert learned(tokenizer, rendered(tokenizer, row)) == [["<think>\nGreet\n</think>\n\nYo<|im_end|>"]]


@pytest.mark.parametrize("place", ["content", "tool_calls", "other", "tools"])
def test_values_that_are_nested_too_deeply_are_named(place: str) -> None:
    # The depth follows the recursion limit, because a library that another test imports (celpy) raises the limit.
    depth = sys.getrecursionlimit() - 100
    deep: Any = json.loads("[" * depth + "]" * depth)
    call = {"name": "area", "arguments": {"a": deep}}
    changes = {"tool_calls": [call]} if place == "tool_calls" else {} if place == "tools" else {place: deep}
    row = {"messages": [TALK[0], {**TALK[1], **changes}], "tools": [{"name": "area", "parameters": {"enum": deep}}]}
    refused = rendered(byte_tokenizer(published("qwen3")), row)
    assert isinstance(refused, str)


def test_arguments_of_tool_calls_have_the_form_that_the_template_reads() -> None:
    """Qwen's template writes the arguments as an object. DeepSeek's template joins the arguments with text, so it needs
    them as text."""
    for name, text in (("qwen2_5", '"arguments": {"side": 3}'), ("deepseekv3", '```json\n{"side": 3}\n```')):
        tokenizer = byte_tokenizer(published(name))
        for arguments in ('{"side": 3}', {"side": 3}):
            call = {"id": "c", "type": "function", "function": {"name": "area", "arguments": arguments}}
            row = {"messages": [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
            assert text in learned(tokenizer, rendered(tokenizer, row))[0][0]


def test_a_template_without_an_end_of_messages_gets_the_end_token_behind_each_answer() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    examples = rendered(tokenizer, {"messages": TALK})
    assert learned(tokenizer, examples) == [["assistant: Yo\n<eos>"], ["assistant: No\n<eos>"]]


def test_generation_also_stops_at_the_tokens_of_the_model_and_at_the_end_of_an_answer() -> None:
    tokenizer = byte_tokenizer(APPENDING)
    end, start = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>"))
    assert stop_ids(tokenizer, spec().format) == sorted([tokenizer.eos_token_id, end])
    assert stop_ids(tokenizer, spec().format, [start, 10**6, -1]) == sorted([tokenizer.eos_token_id, end, start])


def test_a_model_with_a_chat_template_stops_at_the_end_of_a_turn_whatever_its_rows_are() -> None:
    tokenizer = byte_tokenizer(APPENDING)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    form = DatasetFormat.model_validate({"text": {}})
    assert stop_ids(tokenizer, form, [7]) == sorted([7, tokenizer.eos_token_id])
    assert generation_stop_ids(tokenizer, form, [7]) == sorted([7, tokenizer.eos_token_id, end])


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for m in messages %}{{ m.content }}!{% endfor %}", "{{", ""]
)
def test_a_chat_template_that_ends_no_turn_with_a_control_token_adds_no_stop_token(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    form = DatasetFormat.model_validate({"text": {}})
    assert generation_stop_ids(tokenizer, form) == [tokenizer.eos_token_id]


def test_the_template_of_the_job_is_rendered_and_kept_for_the_artifact(tmp_path: Path) -> None:
    (tmp_path / "short.jinja").write_text(APPENDING)
    for chosen in ({"file": "short.jinja"}, {"text": APPENDING}):
        tokenizer = byte_tokenizer("{{ raise_exception('the model has its own') }}")
        use_chat_template(tokenizer, spec(chatTemplate=chosen).format, tmp_path)
        assert tokenizer.chat_template == APPENDING


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        (
            {"chatTemplate": {"file": "other.jinja"}},
            "chatTemplate.file: the model has no other.jinja (templates: a.jinja)",
        ),
        ({"chatTemplate": {"text": "{% for %}"}}, "chatTemplate: is no chat template: Expected an expression"),
        ({"chatTemplate": {"text": "{{ 9 ** 9 ** 9 }}"}}, "chatTemplate: must not use **"),
        ({"chatTemplate": {"file": "a.jinja"}}, "chatTemplate.file: a.jinja can't be read: 'utf-8' codec"),
        (
            {"templateArguments": {"enable_thinkin": "false"}},
            "templateArguments.enable_thinkin: is not read by the chat template, which reads content,",
        ),
        *(
            (
                {"templateArguments": {"enable_thinking": text}},
                f"templateArguments.enable_thinking: must be {value} as JSON writes it: {text!r} would be a text",
            )
            for text, value in (("False", "false"), ("TRUE", "true"), (" None", "null"))
        ),
        *(
            ({"templateArguments": {name: "1"}}, f"templateArguments.{name}: is set by the trainer")
            for name in (
                "messages",
                "tools",
                "strftime_now",
                "raise_exception",
                "conversation",
                "tokenize",
                "max_length",
                "continue_final_message",
                "return_assistant_tokens_mask",
            )
        ),
    ],
)
def test_a_template_or_an_argument_that_can_not_be_used_is_refused(
    form: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError) as caught:
        use_chat_template(byte_tokenizer(published("qwen3")), spec(**form).format, tmp_path)
    assert str(caught.value).startswith(f"dataset.format.messages.{problem}")


def test_a_name_that_transformers_keeps_is_no_argument_also_where_the_template_reads_it() -> None:
    """transformers has a parameter `max_length` of its own, so it would not pass this argument to the template."""
    tokenizer = byte_tokenizer("{{ max_length }}" + APPENDING)
    refused = rendered(tokenizer, {"messages": TALK, "chat_template_kwargs": {"max_length": 5}})
    assert refused == "has an argument 'max_length' for the chat template that is set by the trainer"


def test_the_operator_knows_all_names_that_transformers_keeps() -> None:
    assert taken_names(byte_tokenizer(APPENDING)) == RESERVED


def test_of_several_templates_with_names_those_for_rows_with_and_without_tools_are_used() -> None:
    tokenizer = byte_tokenizer(APPENDING)
    named = {"default": APPENDING, "tool_use": "{{ tools }}{{ day }}" + APPENDING, "rag": "{{ quotes }}" + APPENDING}
    tokenizer.chat_template = named
    use_chat_template(tokenizer, spec(templateArguments={"day": "Monday"}).format, Path())
    examples = rendered(
        tokenizer, {"messages": TALK[:2], "tools": [{"name": "area"}]}, templateArguments={"day": "Monday"}
    )
    assert not isinstance(examples, str), examples
    assert "'area'}]Monday<|im_start|>" in tokenizer.decode(list(examples[0].ids))
    assert learned(tokenizer, rendered(tokenizer, {"messages": TALK[:2]})) == [["Yo<|im_end|>"]]
    for form, templates, problem in (
        ({"templateArguments": {"quotes": "1"}}, named, ".templateArguments.quotes: is not read by the chat template"),
        ({}, {"rag": APPENDING}, ": the model has the chat templates rag and none with the name default; give one in"),
    ):
        tokenizer.chat_template = templates
        with pytest.raises(UserError) as caught:
            use_chat_template(tokenizer, spec(**form).format, Path())
        assert str(caught.value).startswith(f"dataset.format.messages{problem}")


def test_a_column_of_tools_that_is_named_must_be_a_column_of_the_training_rows(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "train.jsonl", [{"messages": TALK, "functions_": []}, {"messages": TALK}])
    check_columns(path, "dataset.train", spec(toolsField="functions_").format)
    check_columns(path, "dataset.train", spec().format)
    form = spec(toolsField="function_s").format
    with pytest.raises(UserError) as caught:
        check_columns(path, "dataset.train", form)
    assert str(caught.value) == (
        "dataset.format.messages.toolsField: no column 'function_s' in train.jsonl; it has 'messages', 'functions_'"
    )
    for others in ("dataset.validation", "dataset.train.mix[1]"):
        check_columns(path, others, form)


def test_one_source_of_a_mix_must_have_the_column_of_tools_that_is_named(tmp_path: Path) -> None:
    plain = tiny.write_jsonl(tmp_path / "plain.jsonl", [{"messages": TALK}])
    tools = tiny.write_jsonl(tmp_path / "tools.jsonl", [{"messages": TALK}, {"messages": TALK, "functions_": []}])
    mix = {"dataset.train.mix[0]": plain, "dataset.train.mix[1]": tools}
    check_tools_of_mix(mix, spec(toolsField="functions_").format)
    check_tools_of_mix(mix, spec().format)
    misspelled = spec(toolsField="function_s").format
    check_tools_of_mix({"dataset.train": plain, "dataset.validation": plain}, misspelled)
    with pytest.raises(UserError) as caught:
        check_tools_of_mix(mix | {"dataset.validation": plain}, misspelled)
    assert str(caught.value) == (
        "dataset.format.messages.toolsField: no column 'function_s' in the 2 sources of dataset.train.mix"
    )


def test_arguments_are_json_or_text() -> None:
    given = {"a": "false", "b": "3", "c": "low", "d": '"false"', "e": "[1, null]", "f": ""}
    assert template_arguments(given) == {"a": False, "b": 3, "c": "low", "d": "false", "e": [1, None], "f": ""}


def test_arguments_change_what_the_model_gets() -> None:
    tokenizer = byte_tokenizer(published("qwen3"))
    row = {"messages": TALK[:2]}
    assert learned(tokenizer, rendered(tokenizer, row, templateArguments={"enable_thinking": "false"})) == [
        ["Yo<|im_end|>"]
    ]
    # Arguments in the row replace those of the job.
    own = row | {"chat_template_kwargs": {"enable_thinking": True}}
    examples = rendered(tokenizer, own, templateArguments={"enable_thinking": "false"})
    assert learned(tokenizer, examples) == [["<think>\n\n</think>\n\nYo<|im_end|>"]]


def test_the_date_of_a_template_is_the_given_one_in_every_format() -> None:
    day = date(2024, 2, 9)
    codes = [f"%{flag}{letter}" for flag in ("", "-", "_", "0", "^", "#") for letter in "aAbBdmyYjHMSpIUWuwVGeF%"]
    asked = f"x%{'-'.join(codes)} ünd {{}}"
    tokenizer = byte_tokenizer("{{ strftime_now(" + json.dumps(asked) + ") }}" + APPENDING)
    examples = rendered(tokenizer, {"messages": TALK}, today=day)
    assert not isinstance(examples, str), examples
    assert datetime(day.year, day.month, day.day).strftime(asked) in tokenizer.decode(list(examples[0].ids))


def test_the_date_of_a_template_changes_nothing_else() -> None:
    for template in ("\n " + APPENDING, "  {% if true %}\nx{% endif %}" + APPENDING, "{#- a -#}\n" + APPENDING):
        tokenizer = byte_tokenizer(template)
        dated, undated = (rendered(tokenizer, {"messages": TALK}, today=today) for today in (date(2024, 2, 9), None))
        assert dated == undated


def test_a_template_that_does_not_end_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"^dataset.format.messages: the chat template takes more than"):
        rendered(byte_tokenizer(ENDLESS), {"messages": TALK})


def test_a_rendering_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "LONGEST_TEXT", 1000)
    refused = rendered(byte_tokenizer(APPENDING + "{{ 'a' * 1000 }}"), {"messages": TALK})
    assert refused == "can't be rendered by the model's chat template: it makes 1065 characters of one row"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.fixed_dictionaries({}, optional={"id": JSON, "type": JSON, "function": JSON, "name": JSON, "arguments": JSON}),
    max_size=2,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system"]) | JSON, "content": st.just("Yo") | JSON},
        optional={"tool_calls": CALLS | JSON, "weight": JSON, "name": JSON, "reasoning_content": JSON, "other": JSON},
    ),
    max_size=4,
)
TOKENIZERS = [byte_tokenizer(published(name)) for name in ("qwen3", "deepseekv3", "gemma", "idefics3", "gptoss")]


@given(
    number=st.integers(0, len(TOKENIZERS) - 1),
    messages=MESSAGES | JSON,
    others=st.dictionaries(st.sampled_from(["tools", "system", "chat_template_kwargs", "functions"]), JSON, max_size=2),
    learn=st.sampled_from(["AllAssistant", "LastAssistant", "Everything"]),
)
@settings(max_examples=150)
def test_any_json_value_becomes_examples_or_a_sentence(
    number: int, messages: Any, others: dict[str, Any], learn: str
) -> None:
    found = rendered(TOKENIZERS[number], {"messages": messages, **others}, learn=learn)
    if isinstance(found, str):
        assert found
        return
    assert all(example.supervised_tokens for example in found)
    assert all(0 <= a < b <= len(example.ids) for example in found for a, b in example.spans)


PIECES = (
    "{{ messages[0].content }}",
    "{{ messages }}",
    "{{ tools }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if x %}",
    "{% endif %}",
    "{{ raise_exception(1) }}",
    "{{ 1 / 0 }}",
    "{{ none.x.y }}",
    "{{ 'a' * 100000 }}",
    "{{ range(10**9) }}",
    "{{ messages | tojson }}",
    "{{ strftime_now(5) }}",
    "{% set m = 1 %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% break %}",
    "{{ m.content }}",
    "{{ messages[9].content }}",
    "<|im_end|>",
    "text",
    "{{ '\\ud800' }}",
    "{{ m.items() }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ namespace(_a=1) }}",
)


@given(template=st.lists(st.sampled_from(PIECES), max_size=6).map("".join))
@settings(max_examples=50)
def test_any_template_makes_examples_or_a_sentence(template: str) -> None:
    tokenizer = byte_tokenizer("")
    form = DatasetFormat.model_validate({"messages": {"chatTemplate": {"text": template or "x"}}})
    try:
        use_chat_template(tokenizer, form, Path())
    except UserError as error:
        sentence = str(error)
    else:
        sentence = ""
        assert rendered(tokenizer, {"messages": TALK}, today=date(2024, 2, 9))
    assert not sentence or sentence.startswith("dataset.format.messages.chatTemplate: is no chat template: ")
