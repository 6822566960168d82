"""The fields of the published formats of rows, and what happens to each, as one table. `python -m
tests.trainer.test_published_rows` writes the table into docs/data.md, and `test_published_rows.py` tests each line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Line(NamedTuple):
    """A field of a published format, what happens to it, and a row that shows it."""

    published: str
    """Name of the format."""
    field: str
    happens: str
    """What happens to the field, as text for docs/data.md."""
    row: Mapping[str, Any]
    form: Mapping[str, Any] = {"messages": {}}
    """`dataset.format` for the row."""
    template: str = "qwen3"
    """Name of a published chat template, or the text of one."""
    learned: Sequence[str] = ()
    """Texts that are learned from the row. Empty if the row is refused."""
    shown: str = ""
    """A text that the model reads before the last answer."""
    hidden: str = ""
    """A text that no example of the row may contain. Empty if there is no such text."""
    refused: str = ""
    """Beginning of the phrase with which the row is refused. Empty if the row is used."""


USER = {"role": "user", "content": "Hi"}
END = "<|im_end|>"
ANSWER = f"<think>\n\n</think>\n\nYo{END}"
CALL = {"id": "c1", "type": "function", "function": {"name": "area", "arguments": '{"side": 3}'}}
CALLED = f'<think>\n\n</think>\n\n<tool_call>\n{{"name": "area", "arguments": {{"side": 3}}}}\n</tool_call>{END}'
TOOL = {"type": "function", "function": {"name": "area", "parameters": {"type": "object", "properties": {}}}}
NAMES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that shows the field `name` of a message."""


def asked(*more: Mapping[str, Any], **changes: Any) -> list[Mapping[str, Any]]:
    """Return a conversation: a question, its answer with the fields ``changes``, and then the messages ``more``."""
    return [USER, {"role": "assistant", "content": "Yo", **changes}, *more]


def called(**changes: Any) -> list[Mapping[str, Any]]:
    """Return a conversation: a question, a tool call, and the result of the tool with the fields ``changes``."""
    result = {"role": "tool", "tool_call_id": "c1", "content": "9", **changes}
    return [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, result]


def human(*, more: Sequence[Mapping[str, Any]] = (), **changes: Any) -> dict[str, Any]:
    """Return a row of ShareGPT: a question, the messages ``more``, and an answer. ``changes`` are further columns."""
    talk = [{"from": "human", "value": "Hi"}, *more, {"from": "gpt", "value": "Yo"}]
    return {"conversations": talk, **changes}


FUNCTION_CALL = {"from": "function_call", "value": '{"name": "area", "arguments": {"side": 3}}'}
INSTRUCTIONS = {
    "promptCompletion": {"template": "{instruction}\n{#input}{input}\n{/input}", "completionField": "output"}
}
CONVERSATIONS = {"messages": {"messagesField": "conversations"}}
LEFT_OUT = "which the model's chat template leaves out"

OPENAI = "OpenAI (chat)"
SHAREGPT = "ShareGPT"
TRL = "trl"
AXOLOTL = "axolotl"
ALPACA = "Alpaca"

LINES = (
    Line(OPENAI, "`messages`", "The conversation. JSON text is read too.", {"messages": asked()}, learned=[ANSWER]),
    Line(
        OPENAI,
        "`role`",
        "Passed to the chat template, after `roles`. A role that the template leaves out, such as `critic` here, makes"
        " the row a bad row.",
        {"messages": [USER, {"role": "critic", "content": "Bad"}, *asked()[1:]]},
        refused=f"has 'content' in message 2 of role 'critic', {LEFT_OUT}",
    ),
    Line(
        OPENAI,
        "`content`: text",
        "Rendered. Text that the template would leave out makes the row a bad row.",
        {"messages": asked()},
        learned=[ANSWER],
        shown="Hi",
    ),
    Line(
        OPENAI,
        "`content`: list of text parts",
        "Passed as a list to templates that read lists, and joined by line breaks for others. A part with another field"
        " than `type` and `text` is refused.",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": text} for text in ("One", "Two")]},
                *asked()[1:],
            ]
        },
        template="qwen2_5",
        learned=[f"Yo{END}"],
        shown="One\nTwo",
    ),
    Line(
        OPENAI,
        "`content`: images, audio",
        "Refused: only text is learned.",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, *asked()[1:]]},
        refused="has a part of type 'image_url' in message 1: only text is learned",
    ),
    Line(
        OPENAI,
        "`content`: null or empty",
        "Allowed beside `tool_calls`. Any other answer without text makes the row a bad row.",
        {"messages": called()[:2], "tools": [TOOL]},
        learned=[CALLED],
    ),
    Line(
        OPENAI,
        "`weight`",
        "0: the answer is shown, and not learned. 1: as without it. Anything else is refused.",
        {"messages": [*asked(weight=0), USER, {"role": "assistant", "content": "Again", "weight": 1}]},
        learned=[f"<think>\n\n</think>\n\nAgain{END}"],
        shown="Yo",
    ),
    Line(
        OPENAI,
        "`name` of a person",
        "Passed to the chat template. Refused where the template leaves names out.",
        {"messages": [{**USER, "name": "Ada"}, *asked()[1:]]},
        template=NAMES,
        learned=[f"Yo{END}"],
        shown="user Ada",
    ),
    Line(
        OPENAI,
        "`name`, left out by the template",
        "Refused.",
        {"messages": [{**USER, "name": "Ada"}, *asked()[1:]]},
        refused=f"has 'name' in message 1 of role 'user', {LEFT_OUT}",
    ),
    Line(
        OPENAI,
        "`tools`",
        "Column of the tools (`toolsField`), a list or JSON text. Refused where the template leaves tools out.",
        {"messages": asked(), "tools": [TOOL]},
        learned=[ANSWER],
        shown='"name": "area"',
    ),
    Line(
        OPENAI,
        "`tools`, left out by the template",
        "Refused.",
        {"messages": asked(), "tools": [TOOL]},
        template="llama3",
        refused=f"has 'tools', {LEFT_OUT}",
    ),
    Line(
        OPENAI,
        "`tool_calls`",
        "Learned as the template renders them. `arguments` may be JSON text or an object, and become what the template"
        " reads. Refused where the template leaves a call or its arguments out.",
        {"messages": called()[:2]},
        learned=[CALLED],
    ),
    Line(
        OPENAI,
        "`tool_calls[].id`, `tool_call_id`",
        "Passed to the chat template. An answer with an id that no call before it has makes the row a bad row. Where"
        " there are calls before it, but none with an id, its id is not compared.",
        {"messages": [*called(tool_call_id="c2"), *asked()[1:]]},
        refused="has a tool_call_id in message 3 that no tool call before it has",
    ),
    Line(
        OPENAI,
        "`tool` messages",
        "Shown to the model, not learned.",
        {"messages": [*called(), *asked()[1:]]},
        learned=[CALLED, ANSWER],
        shown="<tool_response>\n9\n</tool_response>",
    ),
    Line(
        OPENAI,
        "`function_call`, role `function`",
        "The older form of one tool call and its answer: read as `tool_calls` and as a `tool` message.",
        {"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL["function"]}]},
        learned=[CALLED],
    ),
    Line(
        OPENAI,
        "`functions`",
        "Refused: the tools must stand in `tools`.",
        {"messages": asked(), "functions": [TOOL["function"]]},
        refused="has 'functions', which is not read",
    ),
    Line(
        OPENAI,
        "`refusal`, `audio`, `annotations` and every other field of a message",
        "Passed to the chat template. Refused where the template leaves the field out.",
        {"messages": asked(refusal="No")},
        refused=f"has 'refusal' in message 2 of role 'assistant', {LEFT_OUT}",
    ),
    Line(
        OPENAI,
        "`parallel_tool_calls` and all other columns",
        "Not read: they are no part of the conversation.",
        {"messages": asked(), "parallel_tool_calls": True, "id": 7},
        learned=[ANSWER],
        hidden="parallel",
    ),
    Line(
        SHAREGPT,
        "`conversations`",
        "Set `messagesField: conversations`.",
        human(),
        CONVERSATIONS,
        learned=[ANSWER],
    ),
    Line(
        SHAREGPT,
        "`from`, `value`",
        "Read as `role` and `content`.",
        human(),
        CONVERSATIONS,
        learned=[ANSWER],
        shown="<|im_start|>user\nHi",
    ),
    Line(
        SHAREGPT,
        "`human`, `gpt`",
        "Stand for `user` and `assistant`. `roles` names others.",
        {"conversations": [{"from": "Q", "value": "Hi"}, {"from": "A", "value": "Yo"}]},
        {"messages": {"messagesField": "conversations", "roles": {"Q": "user", "A": "assistant"}}},
        learned=[ANSWER],
    ),
    Line(
        SHAREGPT,
        "`system` (column)",
        "A system message before the others. Refused where they begin with one too.",
        human(system="Be brief"),
        CONVERSATIONS,
        learned=[ANSWER],
        shown="<|im_start|>system\nBe brief",
    ),
    Line(
        SHAREGPT,
        "`tools` (column)",
        "JSON text or a list, as above.",
        human(tools='[{"name": "area", "parameters": {}}]'),
        CONVERSATIONS,
        learned=[ANSWER],
        shown='"name": "area"',
    ),
    Line(
        SHAREGPT,
        "`function_call` (role)",
        "An answer that calls tools. Its text is JSON with `name` and `arguments`, or a list of such objects.",
        {"conversations": [*human()["conversations"][:1], FUNCTION_CALL]},
        CONVERSATIONS,
        learned=[CALLED],
    ),
    Line(
        SHAREGPT,
        "`observation` (role)",
        "Stands for `tool`, beside `from` and `value`. `roles: {observation: observation}` passes it as it is.",
        human(more=[FUNCTION_CALL, {"from": "observation", "value": "9"}]),
        CONVERSATIONS,
        learned=[CALLED, ANSWER],
        shown="<tool_response>\n9",
    ),
    Line(
        SHAREGPT,
        "`images`, `audios`, `videos` (columns)",
        "Refused where a row has a value in them.",
        human(images=["a.png"]),
        CONVERSATIONS,
        refused="has 'images', which is not read (only text is learned)",
    ),
    Line(
        ALPACA,
        "`instruction`, `input`",
        "Columns of `promptCompletion.template`: `{instruction}`, and `{#input}...{/input}` where it may be empty.",
        {"instruction": "Add", "input": "1 2", "output": "3"},
        INSTRUCTIONS,
        learned=["3<eos>"],
        shown="Add\n1 2\n",
    ),
    Line(
        ALPACA,
        "`input`: empty",
        "The optional part is left out.",
        {"instruction": "Greet", "input": "", "output": "Hi"},
        INSTRUCTIONS,
        learned=["Hi<eos>"],
        shown="Greet\n",
        hidden="\n\n",
    ),
    Line(
        ALPACA,
        "`output`",
        "`promptCompletion.completionField: output`. A row without text in it is a bad row.",
        {"instruction": "Greet", "input": "", "output": " "},
        INSTRUCTIONS,
        refused="has an empty 'output'",
    ),
    Line(
        ALPACA,
        "`text`, `system`, `history`",
        "Not read, unless a template names the column.",
        {"instruction": "Greet", "input": "", "output": "Hi", "text": "Below is", "system": "Be brief", "history": []},
        INSTRUCTIONS,
        learned=["Hi<eos>"],
        hidden="Be",
    ),
    Line(
        TRL,
        "`reasoning_content`, `reasoning`, `thinking`",
        "The thoughts of an answer. They are learned with the answer, and removed behind it where the template removes"
        " them. Refused where the template never shows them.",
        {"messages": asked(reasoning_content="Greet")},
        learned=[f"<think>\nGreet\n</think>\n\nYo{END}"],
    ),
    Line(
        TRL,
        "`reasoning_content`, left out by the template",
        "Refused.",
        {"messages": asked(reasoning_content="Greet")},
        template="qwen2_5",
        refused=f"has 'reasoning_content' in message 2 of role 'assistant', {LEFT_OUT}",
    ),
    Line(
        TRL,
        "`chat_template_kwargs`",
        "Arguments of the chat template for the row, over `templateArguments`. A name that the template does not read"
        " is refused.",
        {"messages": asked(), "chat_template_kwargs": {"enable_thinking": False}},
        learned=[f"Yo{END}"],
        shown="</think>",
    ),
    Line(
        TRL,
        "`tool_calls[].function.arguments` as an object",
        "As JSON text. In a `.parquet` file, keys of these objects that are null are left out, also in nested objects,"
        " because parquet gives all rows the same keys. Elsewhere null stays, also in JSON text in a `.parquet` file.",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "area", "arguments": {"side": 3}}]}]},
        learned=[CALLED],
    ),
    Line(
        TRL,
        "`prompt`, `completion` (lists of messages)",
        "Refused: all messages must stand in one column.",
        {"prompt": [USER], "completion": asked()[1:]},
        refused="has no 'messages'",
    ),
    Line(
        TRL,
        "`chosen`, `rejected`",
        "Refused: preferences are not learned.",
        {"chosen": asked(), "rejected": asked(content="No")},
        refused="has no 'messages'",
    ),
    Line(
        TRL,
        "`text`",
        "`format: {text: {}}`: every token is learned.",
        {"text": "Hi there"},
        {"text": {}},
        learned=["Hi there<eos>"],
    ),
    Line(
        AXOLOTL,
        "`field_messages`, `message_property_mappings`, `roles` (settings)",
        "`messagesField`, and `roles`. `from` and `value` need no mapping.",
        {"talk": [{"from": "me", "value": "Hi"}, {"from": "bot", "value": "Yo"}]},
        {"messages": {"messagesField": "talk", "roles": {"me": "user", "bot": "assistant"}}},
        learned=[ANSWER],
    ),
    Line(
        AXOLOTL,
        "`roles_to_train`, `train_on_inputs` (settings)",
        "`learn`: `AllAssistant`, `LastAssistant` or `Everything`.",
        {"messages": [*asked(), USER, {"role": "assistant", "content": "Again"}]},
        {"messages": {"learn": "LastAssistant"}},
        template="qwen2_5",
        learned=[f"Again{END}"],
    ),
    Line(
        AXOLOTL,
        "`training`, `train_detail` (fields of a message)",
        "Refused, whatever their value is: `weight` says what is learned.",
        {"messages": asked(training=False)},
        refused=f"has 'training' in message 2 of role 'assistant', {LEFT_OUT}",
    ),
    Line(
        AXOLOTL,
        "`segments` (`input_output`)",
        "Refused: use `promptCompletion`.",
        {"segments": [{"label": True, "text": "Hi"}]},
        refused="has no 'messages'",
    ),
)
