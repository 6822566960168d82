"""Chat templates that leave out a part of a row, or that render the messages before an answer differently once the
answer follows them."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_core.api.dataset import KNOWN_ROLES, DatasetFormat, MessagesFormat
from finetune_trainer.data.chat.chat_template import ChatTemplate
from finetune_trainer.data.chat.conversations import conversation_renderer
from finetune_trainer.data.piece_tokens import PieceTokenizer
from finetune_trainer.data.tokenizer import stop_ids
from tests.trainer.chat import byte_tokenizer, learned, published, rendered

APPENDING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = APPENDING.replace(
    "{{ m.content }}", "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function }}{% endfor %}"
)
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yo"}
TOOL = {"type": "function", "function": {"name": "area", "description": "A square"}}


def call(side: int, number: str = "a") -> dict[str, Any]:
    return {"id": number * 9, "type": "function", "function": {"name": "area", "arguments": {"side": side}}}


@pytest.mark.parametrize(
    ("shown", "field"),
    [
        ("{{ call.function }}", ""),
        ("{{ call.function if loop.first }}", "tool_calls[1]"),
        ("{{ call.function.name }}", "tool_calls[0].function.arguments"),
    ],
)
def test_each_call_and_its_arguments_must_be_rendered(shown: str, field: str) -> None:
    tokenizer = byte_tokenizer(CALLS.replace("{{ call.function }}", shown))
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [call(3), call(4, "b")]}]}
    found = rendered(tokenizer, row)
    if not field:
        assert learned(tokenizer, found) == [["".join(str(call(side)["function"]) for side in (3, 4)) + "<|im_end|>"]]
    else:
        assert found == (f"has {field!r} in message 2 of role 'assistant', which the model's chat template leaves out")


def test_the_second_of_two_calls_is_not_lost_in_the_template_of_gpt_oss() -> None:
    """The template renders the first call of a message, and no other."""
    tokenizer = byte_tokenizer(published("gptoss"))
    one, two = [call(3)], [call(3), call(4, "b")]
    rows = [{"messages": [USER, {"role": "assistant", "tool_calls": calls}], "tools": [TOOL]} for calls in (one, two)]
    assert '{"side": 3}<|call|>' in learned(tokenizer, rendered(tokenizer, rows[0], ["<|call|>"]))[0][0]
    refused = rendered(tokenizer, rows[1], ["<|call|>"])
    assert refused == "has 'tool_calls[1]' in message 2 of role 'assistant', which the model's chat template leaves out"


def test_what_a_template_shows_in_one_conversation_may_be_left_out_in_another() -> None:
    """A renderer remembers which fields the template has shown. It checks the tools again in a conversation with other
    roles, and a field of a message again where the messages beside it have other roles."""
    template = "{% if messages[0].role == 'system' %}{{ tools }}{% endif %}" + APPENDING.replace(
        "{{ m.content }}", "{{ m.content if loop.first or loop.previtem.role != 'user' or m.role != 'user' }}"
    )
    tokenizer = byte_tokenizer(template)
    chat = ChatTemplate(tokenizer, PieceTokenizer(tokenizer), ends=[tokenizer.eos_token_id])
    render = conversation_renderer(MessagesFormat(), chat, tokenizer.eos_token_id)
    system = {"role": "system", "content": "Be brief"}
    assert not isinstance(render({"messages": [system, USER, ANSWER, USER, ANSWER], "tools": [TOOL]}), str)
    left_out = "which the model's chat template leaves out"
    assert render({"messages": [USER, ANSWER, USER, ANSWER], "tools": [TOOL]}) == (
        f"has 'tools', {left_out} (format.messages.chatTemplate can name one that shows them)"
    )
    assert (
        render({"messages": [system, USER, ANSWER, USER, USER, ANSWER]})
        == f"has 'content' in message 5 of role 'user', {left_out}"
    )


MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}<s>{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
"""A template like that of Mistral: it puts the system message into the last message, if a person wrote that message."""


def test_a_system_message_that_a_template_moves_stands_before_each_answer_as_at_inference() -> None:
    tokenizer = byte_tokenizer(MISTRAL)
    talk = [{"role": "system", "content": "Be brief"}, USER, ANSWER, {**USER, "content": "More"}, ANSWER]
    examples = rendered(tokenizer, {"messages": talk}, ["</s>"])
    assert learned(tokenizer, examples) == [[" Yo</s>"], [" Yo</s>"]]
    assert not isinstance(examples, str)
    for index, example in zip((2, 4), examples, strict=True):
        asked = tokenizer.apply_chat_template(talk[:index], add_generation_prompt=True, return_dict=False)
        assert list(example.ids[: example.prompt_tokens]) == asked
        assert "Be brief" in tokenizer.decode(asked)


def test_an_answer_stands_behind_a_history_that_the_template_shortens_for_the_answer() -> None:
    """The template of gpt-oss shows the text beside a call until the final answer comes."""
    tokenizer = byte_tokenizer(published("gptoss"))
    result = {"role": "tool", "tool_call_id": "a" * 9, "name": "area", "content": "nine"}
    talk = [USER, {"role": "assistant", "content": "Let me see", "tool_calls": [call(3)]}, result, ANSWER]
    examples = rendered(tokenizer, {"messages": talk, "tools": [TOOL]}, learn="LastAssistant")
    assert not isinstance(examples, str), examples
    (example,) = examples
    asked = tokenizer.apply_chat_template(talk[:3], tools=[TOOL], add_generation_prompt=True, return_dict=False)
    assert list(example.ids[: example.prompt_tokens]) == asked
    assert "Let me see" in tokenizer.decode(asked)
    assert learned(tokenizer, examples) == [["<|channel|>final<|message|>Yo<|return|>"]]


def test_thoughts_that_the_generation_prompt_has_closed_are_part_of_the_prompt() -> None:
    closed = "<|channel>thought\n<channel|>"
    template = APPENDING.replace("assistant\n{% endif %}", f"assistant\n{closed}{{% endif %}}")
    tokenizer = byte_tokenizer(template)
    examples = rendered(tokenizer, {"messages": [USER, ANSWER, USER, ANSWER]})
    assert learned(tokenizer, examples) == [["Yo<|im_end|>"], ["Yo<|im_end|>"]]
    assert not isinstance(examples, str)
    assert tokenizer.decode(list(examples[0].ids[: examples[0].prompt_tokens])).endswith(closed)
    # An answer with thoughts can't follow a prompt that has closed the thoughts already.
    thinking = template.replace(
        "{{ m.content }}", "{{ '<think>' + m.thinking + '</think>' if m.thinking }}{{ m.content }}"
    )
    refused = rendered(byte_tokenizer(thinking), {"messages": [USER, {**ANSWER, "thinking": "Greet"}]})
    assert isinstance(refused, str)
    assert refused.startswith("has a message 2 that the model's chat template does not put unchanged behind")
    # Thoughts that are still open must be closed by the answer, and this template has no text that closes them.
    tokenizer = byte_tokenizer(template.replace("<channel|>", ""))
    refused = rendered(tokenizer, {"messages": [USER, ANSWER]})
    assert isinstance(refused, str)
    assert refused.startswith("has a message 2 that the model's chat template does not put unchanged behind")


def test_a_template_that_joins_two_answers_makes_a_bad_row() -> None:
    joining = (
        "{% for m in messages %}{% if loop.first or loop.previtem.role != m.role %}<|im_start|>{{ m.role }}\n"
        "{% endif %}{{ m.content }}{% if loop.last or loop.nextitem.role != m.role %}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    refused = rendered(byte_tokenizer(joining), {"messages": [USER, ANSWER, {**ANSWER, "content": "No"}]})
    assert isinstance(refused, str)
    assert refused.startswith("has a message 3 that the model's chat template does not put unchanged behind")


def test_generation_also_stops_at_the_token_that_ends_a_call() -> None:
    form = DatasetFormat.model_validate({"messages": {}})
    tokenizer = byte_tokenizer(published("gptoss"))
    stops = tokenizer.convert_ids_to_tokens(stop_ids(tokenizer, form))
    assert stops == ["<eos>", "<|call|>", "<|return|>"]


def test_tags_around_thoughts_are_tags_where_they_are_control_tokens_too() -> None:
    tokenizer = byte_tokenizer(published("qwen3"))
    plain = learned(tokenizer, rendered(tokenizer, {"messages": [USER, {**ANSWER, "reasoning_content": "Greet"}]}))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    assert {"<think>", "</think>"} <= set(PieceTokenizer(tokenizer).control_tokens.values())
    row = {"messages": [USER, {**ANSWER, "content": "<think>\nGreet\n</think>\n\nYo"}]}
    examples = rendered(tokenizer, row)
    assert learned(tokenizer, examples) == plain
    assert not isinstance(examples, str)
    assert examples[0].read_as_text == []
    asked = rendered(tokenizer, {"messages": [{**USER, "content": "What is </think>?"}, ANSWER]})
    assert not isinstance(asked, str), asked
    assert asked[0].read_as_text == ["</think>"]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            {"content": [{"type": "text", "text": "Yo", "note": "x"}]},
            "has a part with the field 'note' in message 2, which is not read",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]},
            "has JSON text with the key 'a' twice in message 2",
        ),
        (
            {"content": [{"type": "text", "text": "<think>Greet</think>Yo"}]},
            "has 'content before </think>' in message 2 of role 'assistant', which the model's chat template leaves",
        ),
    ],
)
def test_no_part_of_a_message_is_lost_without_a_word(message: dict[str, Any], problem: str) -> None:
    lists = "{% for part in m.content %}{{ part.text.split('</think>')[-1] }}{% endfor %}"
    tokenizer = byte_tokenizer(CALLS.replace("{{ m.content }}", lists))
    refused = rendered(tokenizer, {"messages": [USER, {**ANSWER, **message}]})
    assert isinstance(refused, str)
    assert refused.startswith(problem)


@pytest.mark.parametrize(
    ("change", "content", "problem"),
    [
        ("m.content.split('</think>')[-1]", "What is </think> for?", "content before </think>"),
        ("m.content[3:]", "What is it for?", "the beginning of content"),
        ("m.content[:3]", "What is it for?", "content"),
    ],
)
def test_no_part_of_a_question_is_lost_without_a_word(change: str, content: str, problem: str) -> None:
    tokenizer = byte_tokenizer(APPENDING.replace("m.content", change))
    refused = rendered(tokenizer, {"messages": [{**USER, "content": content}, {**ANSWER, "content": "For thoughts"}]})
    assert refused == f"has {problem!r} in message 1 of role 'user', which the model's chat template leaves out"


def test_names_of_sharegpt_mean_what_the_job_says() -> None:
    called = {"from": "function_call", "value": "[1]"}
    asked = {"from": "human", "value": "Hi"}
    row = {"messages": [asked, called, {"from": "observation", "value": "9"}, {"from": "gpt", "value": "Yo"}]}
    tokenizer = byte_tokenizer(APPENDING)
    assert rendered(tokenizer, row) == "has a function_call in message 2 that is no JSON object"
    examples = rendered(tokenizer, row, roles={"function_call": "assistant", "observation": "observation"})
    assert learned(tokenizer, examples) == [["[1]<|im_end|>", "Yo<|im_end|>"]]
    assert not isinstance(examples, str)
    assert "<|im_start|>observation\n9" in tokenizer.decode(list(examples[0].ids))


@pytest.mark.parametrize("name", sorted(KNOWN_ROLES))
def test_every_known_role_means_what_the_job_says(name: str) -> None:
    tokenizer = byte_tokenizer(APPENDING)
    row = {"messages": [{"role": name, "content": "Hi"}, ANSWER]}
    examples = rendered(tokenizer, row, roles={name: "critic"})
    assert not isinstance(examples, str)
    assert "<|im_start|>critic\nHi" in tokenizer.decode(list(examples[0].ids))


def test_the_same_thoughts_under_two_names_are_no_more_than_thoughts() -> None:
    tokenizer = byte_tokenizer(published("qwen3"))
    twice = {**ANSWER, "reasoning": "Greet", "reasoning_content": "Greet"}
    expected = [["<think>\nGreet\n</think>\n\nYo<|im_end|>"]]
    assert learned(tokenizer, rendered(tokenizer, {"messages": [USER, twice]})) == expected
    refused = rendered(tokenizer, {"messages": [USER, {**twice, "reasoning": "Or not"}]})
    assert refused == "has 'reasoning' in message 2 of role 'assistant', which the model's chat template leaves out"


def test_a_list_of_parts_is_text_also_for_a_template_that_writes_it_as_json() -> None:
    tokenizer = byte_tokenizer(APPENDING.replace("m.content", "m.content | tojson if m.role == 'tool' else m.content"))
    result = {"role": "tool", "content": [{"type": "text", "text": "9"}]}
    examples = rendered(tokenizer, {"messages": [USER, result, ANSWER]})
    assert not isinstance(examples, str), examples
    assert '<|im_start|>tool\n"9"<|im_end|>' in tokenizer.decode(list(examples[0].ids))


def test_a_template_that_can_not_show_calls_is_refused_with_its_own_reason() -> None:
    """In the first form that is tried, the message with the calls has no content, and the template fails because of the
    missing content. The row must be refused with the reason that the template itself gives."""
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m.content + '' }}{{ raise_exception('No tools, please') if m.tool_calls }}"
        "{% endfor %}"
    )
    refused = rendered(tokenizer, {"messages": [USER, {"role": "assistant", "tool_calls": [call(3)]}]})
    assert refused == "can't be rendered by the model's chat template: No tools, please"
