"""For any conversation and any template of a usual kind, either the row is refused, or each learned answer follows
exactly the text that the model gets at inference. No word of the answer or of what stands before it in the row is lost,
except for the thoughts of earlier answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_trainer.data.chat.conversations import _forms
from tests.trainer.chat import byte_tokenizer, rendered, renderer

Message = Mapping[str, Any]

TOOLS = ("", "{{ tools | tojson if tools }}", "{% if tools %}{{ tools }}{% endif %}")
SYSTEMS = ("", "{% if messages[0].role == 'system' %}<|sys|>{{ messages[0].content }}<|end|>{% endif %}")
SHOWN = ("true", "m.role != 'system'", "m.role != 'system' or not loop.first")
HEADERS = (
    ("<|{{ m.role }}|>", "<|assistant|>"),
    ("<|{{ m.role }}|>\n", "<|assistant|>\n"),
    ("<|{{ m.role }}|>\n", "<|assistant|>\n<think>\n"),
    ("<|{{ m.role }}|>\n", "<|assistant|>\n<think>\n\n</think>\n\n"),
    ("<|{{ m.role }}|>", ""),
    ("{{ m.role }}: ", "assistant: "),
)
"""What the template writes before a message, and its generation prompt."""
CONTENTS = (
    "{{ m.content }}",
    "{{ m.content or '' }}",
    "{{ m.content | trim }}",
    "{{ m.content[2:] }}",
    "{{ m.content.split('</think>')[-1] | trim }}",
    "{% for part in m.content %}{{ part.text }}{% endfor %}",
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}",
)
THOUGHTS = (
    "",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}",
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}",
)
CALLS = (
    "",
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}",
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments }}{% endif %}",
)
ENDS = ("<|end|>", "<|end|>\n", "</s>", "\n", "", "{{ '<|end|>' if not loop.last else '<|ret|>' }}")
TEMPLATES = st.tuples(
    *(st.sampled_from(kinds) for kinds in (TOOLS, SYSTEMS, SHOWN, HEADERS, THOUGHTS, CONTENTS, CALLS, ENDS))
).map(
    lambda parts: (
        f"{parts[0]}{parts[1]}{{% for m in messages %}}{{% if {parts[2]} %}}{parts[3][0]}"
        f"{{% if m.role == 'assistant' %}}{parts[4]}{parts[5]}{parts[6]}{parts[7]}"
        f"{{% else %}}{parts[5]}<|end|>\n{{% endif %}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{parts[3][1]}{{% endif %}}"
    )
)

KINDS = ("W#", "  W#\n", "W# <|end|> W#", "> W# <", "W#</s>", "W# é", "W# </think> W#", "<think>\nW#\n</think>\n\nW#")
TEXTS = st.sampled_from(KINDS[:6] * 3 + KINDS[6:])
ASKED = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user"] * 5 + ["tool", "system"]),
        "content": TEXTS | st.lists(TEXTS, min_size=1, max_size=2),
    }
)
CALLED = st.lists(st.dictionaries(TEXTS, TEXTS, max_size=1), min_size=1, max_size=2)
ANSWERS = st.one_of(
    st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXTS},
        optional={"reasoning_content": TEXTS, "weight": st.just(0), "tool_calls": CALLED},
    ),
)
MESSAGES = st.tuples(
    st.sampled_from([(), (), ({"role": "system", "content": "W#"},)]),
    st.lists(st.tuples(ASKED, ANSWERS), min_size=1, max_size=3),
    st.sampled_from([(), (), ({"role": "assistant", "content": "W#"},), ({"role": "user", "content": "W#"},)]),
).map(lambda parts: [*parts[0], *(message for turn in parts[1] for message in turn), *parts[2]])
TOOL = {"type": "function", "function": {"name": "W#", "description": "W#"}}


def numbered(value: Any, numbers: Iterator[int]) -> Any:
    """Return the JSON value ``value``, with each `#` in its texts replaced by the next of ``numbers`` and an `x`, so
    that each word occurs once."""
    return json.loads(re.sub(r"#", lambda _: f"{next(numbers)}x", json.dumps(value)))


def conversation(made: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages ``made`` in OpenAI's form."""
    found = []
    for message in made:
        new = dict(message)
        if isinstance(message["content"], list):
            new["content"] = [{"type": "text", "text": text} for text in message["content"]]
        if "tool_calls" in message:
            new["tool_calls"] = [
                {"type": "function", "function": {"name": "W#", "arguments": arguments}}
                for arguments in message["tool_calls"]
            ]
        found.append(new)
    return found


def words(messages: Sequence[Message], *, thoughts: bool) -> set[str]:
    """Return the words of ``messages``. Without ``thoughts``, the words in the assistant's thoughts are left out."""
    found = set()
    for message in messages:
        kept = {key: value for key, value in message.items() if thoughts or key != "reasoning_content"}
        text = json.dumps(kept)
        if message["role"] == "assistant" and not thoughts:
            text = text.rpartition("</think>")[-1] + json.dumps(message.get("tool_calls"))
        found |= set(re.findall(r"W\d+x", text))
    return found


@given(
    template=TEMPLATES,
    made=MESSAGES,
    tools=st.sampled_from([None, None, [TOOL]]),
)
@settings(max_examples=80, suppress_health_check=list(HealthCheck))
def test_each_answer_stands_behind_the_tokens_of_inference_and_no_word_is_lost(
    template: str, made: Sequence[Message], tools: list[Any] | None
) -> None:
    tokenizer = byte_tokenizer(template + "{# <|system|><|user|><|assistant|><|tool|><|sys|><|ret|><|end|></s> #}")
    numbers = iter(range(999))
    messages, tools = numbered(conversation(made), numbers), numbered(tools, numbers)
    examples = rendered(tokenizer, {"messages": messages, "tools": tools}, ["<|end|>"])
    if isinstance(examples, str):
        assert examples
        return
    learned = [at for at, message in enumerate(messages) if message["role"] == "assistant" and "weight" not in message]
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    spans = [(example, span) for example in examples for span in example.spans]
    for at, (example, (first, last)) in zip(learned, spans, strict=True):
        before = tokenizer.decode(list(example.ids[:first]))
        assert before in list(asked(tokenizer, plain[:at], tools))
        answer = tokenizer.decode(list(example.ids[first:last]))
        assert words(messages[at : at + 1], thoughts=True) <= set(re.findall(r"W\d+x", answer))
        assert words(messages[:at], thoughts=False) <= set(re.findall(r"W\d+x", before))
        assert not tools or words([{"role": "tools", "content": tools}], thoughts=True) <= words(
            [{"role": "tools", "content": before}], thoughts=True
        )
        assert example.ids[last - 1] in tokenizer.convert_tokens_to_ids(["<|end|>", "</s>", "<|ret|>", "<eos>"])


ODD_TEXTS = (
    "W#",
    " ",
    "<think>\nW#\n</think>\n\nW#",
    "W# <think>W#</think> W#",
    "<think>\n\n</think>\n\nW#",
    "</think>W#",
    "<think>W#",
)
ODD_VALUES = st.sampled_from([*ODD_TEXTS, None, True, False, 0, 1, [], ["W#"], {}, {"W#": "W#"}])
ODD_ANSWERS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.sampled_from(ODD_TEXTS)},
    optional={"reasoning_content": ODD_VALUES, "name": ODD_VALUES, "training": ODD_VALUES, "tool_calls": CALLED},
)
ODD_ROWS = st.lists(st.lists(ODD_ANSWERS, min_size=1, max_size=2), min_size=2, max_size=4)


@given(template=TEMPLATES, rows=ODD_ROWS)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_what_a_row_becomes_does_not_depend_on_the_rows_before_it(
    template: str, rows: Sequence[Sequence[Message]]
) -> None:
    tokenizer = byte_tokenizer(template + "{# <|system|><|user|><|assistant|><|tool|><|sys|><|ret|><|end|></s> #}")
    numbers = iter(range(999))
    question = {"role": "user", "content": "W#"}
    talks = [
        numbered(conversation([message for answer in answers for message in (question, answer)]), numbers)
        for answers in rows
    ]
    render = renderer(tokenizer, ["<|end|>"])
    together = [render({"messages": talk}) for talk in talks]
    assert together == [rendered(tokenizer, {"messages": talk}, ["<|end|>"]) for talk in talks]


def asked(tokenizer: Any, messages: Sequence[Message], tools: list[Any] | None) -> Iterator[str]:
    """Yield the text that the model gets at inference, for each form of ``messages`` that the template can read."""
    for form in _forms(messages):
        try:
            yield tokenizer.apply_chat_template(
                [dict(message) for message in form], tools=tools, add_generation_prompt=True, tokenize=False
            )
        except Exception:  # noqa: BLE001, S112  (a template fails in its own ways for the forms that it can't read)
            continue
