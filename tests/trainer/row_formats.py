"""A table of the formats of rows that the API has, with several entries for each format. An entry makes rows of its
format, and the examples that these rows must become.

The examples are written down here as text, each part with a flag that says whether it is learned. No code of the
trainer makes them. `test_row_formats.py` trains with every entry, and fails if the API gets a format, a field of a
format or a kind of file that no entry has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finetune_trainer.data.examples import ExampleSet
from tests.trainer import tiny
from tests.trainer.plain_loop import PlainExample

WORDS = [*tiny.WORDS, "note", "offer", "call", "result"]
LONGEST = 12
"""`dataset.maxLength` of the formats that have rows that are too long."""
Row = Mapping[str, Any]
Text = Sequence[tuple[str, bool]]
"""An example as text: its parts, each with whether it is learned."""

APPENDING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}answer {{ m.content }}<end> {% else %}"
    "{{ 'ask' if m.role == 'user' else 'note' }} {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer {% endif %}"
)
"""The model's own chat template, which only appends messages."""
REWRITING = (
    "{% for m in messages %}{% if m.role == 'user' and (history or loop.index0 >= messages | length - 2) %}"
    "ask {{ m.content }} {% elif m.role == 'assistant' and (history or loop.last) %}answer {{ m.content }}<end> "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}answer {% endif %}"
)
"""A chat template that shows only the last question and its answer, unless the argument `history` is true."""
REWRITING_FILE = "newest.jinja"
TOOLS = (
    "{% for tool in tools or [] %}offer {{ tool.function.name }} {% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}answer {{ m.content }}{% for c in m.tool_calls or [] %} call {{ c.function.name }}"
    " {{ c.function.arguments.at }}{% endfor %}<end> {% else %}{{ 'ask' if m.role == 'user' else 'result' }}"
    " {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}answer {% endif %}"
)
"""A chat template with tools."""


def write_model(folder: Path) -> Path:
    """Write a tiny model to ``folder``. The tokenizer of the model has the chat template APPENDING, and the folder has
    a file REWRITING_FILE with the chat template REWRITING."""
    tiny.write_model(folder, WORDS)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": APPENDING}))
    (folder / REWRITING_FILE).write_text(REWRITING)
    return folder


class Made(NamedTuple):
    """A row, and the examples that it must become. There are no examples where the row is skipped."""

    row: Row
    examples: Sequence[Text]


@dataclass(frozen=True, eq=False)
class RowFormat:
    """An entry for a format of rows. Two entries count as equal only if they are the same object."""

    name: str
    form: Mapping[str, Any]
    """`dataset.format`."""
    file: str
    """Suffix of the data files. For a mix, and for a folder of several files, the suffixes of all files with a comma in
    between."""
    make: Callable[[random.Random, int], Made]
    """Makes a row, with a random generator and the number of the row, counted from 0."""
    dataset: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of `dataset`."""
    mix: Sequence[str | None] = ()
    """The weight of each source of a mix, None for a source without one. Empty where the format is no mix."""

    def rows(self, count: int, seed: int) -> list[Made]:
        """Return ``count`` rows with their examples. The same ``seed`` gives the same rows."""
        rng = random.Random(f"{self.name}/{seed}")
        return [self.make(rng, number) for number in range(count)]


def _words(rng: random.Random, most: int = 5, least: int = 1) -> str:
    return " ".join(rng.choices(tiny.WORDS, k=rng.randint(least, most)))


def _reversed(words: str) -> str:
    """Return the words in reverse order, so that the model has something to learn."""
    return " ".join(reversed(words.split()))


def _plain_text(rng: random.Random, number: int) -> str:
    """Return a text. Every third text is too long."""
    return _words(rng, 28, 20) if number % 3 == 2 else _words(rng, 8)


def _skipped_text(rng: random.Random, number: int) -> Made:
    """Make a row of text that is skipped if it is too long. The text of row 1 contains `<end>`, which becomes the
    control token, because the format has `allowSpecialTokens`."""
    text = "w1 <end> w2" if number == 1 else _plain_text(rng, number)
    return Made({"text": text}, [] if number % 3 == 2 else [[(f"{text} <end>", True)]])


def _split_text(rng: random.Random, number: int) -> Made:
    text = _plain_text(rng, number)
    words = [*text.split(), "<end>"]
    examples: list[Text] = [[(" ".join(words[:LONGEST]), True)]]
    while len(words) > LONGEST:
        words = words[LONGEST - 1 :]
        examples.append([(words[0], False), (" ".join(words[1:LONGEST]), True)])
    return Made({"body": text}, examples)


def _cut_text(rng: random.Random, number: int) -> Made:
    """Make a row of text that is truncated if it is too long. The text of row 1 contains `<end>`, which is read as
    ordinary text of three words, none of which the tiny model knows."""
    text = "w1 <end> w2" if number == 1 else _plain_text(rng, number)
    shown = f"{text.replace('<end>', '<unk> <unk> <unk>')} <end>"
    return Made({"body": text, "other": "unused"}, [[(" ".join(shown.split()[:LONGEST]), True)]])


def _prompt_completion(rng: random.Random, number: int) -> Made:
    """Make a row with a prompt and a completion. Every fifth row is bad, because its completion is empty."""
    question, bad = _words(rng), number % 5 == 3
    reply = "" if bad else _reversed(question)
    examples = [[(f"ask {question} answer", False), (f"{reply} w59 <end>", True)]]
    return Made({"question": question, "reply": reply}, [] if bad else examples)


def _template(rng: random.Random, number: int) -> Made:
    """Make a row with four columns. In every second row the optional column has no value, and row 2 has a control
    token."""
    task, rest = _words(rng), _words(rng, 3) if number % 2 else ""
    reason, answer = "w5 <end>" if number == 2 else _words(rng), _reversed(task)
    row = {"task": task, "input": rest, "reason": reason, "answer": answer}
    prompt = f"ask {task} note {rest} answer" if rest else f"ask {task} offer answer"
    return Made(row, [[(prompt, False), (f"{reason} result {answer} <end>", True)]])


def _turns(rng: random.Random, number: int) -> list[tuple[str, str]]:
    """Return the questions and answers of a conversation."""
    questions = [_words(rng, 4) for _ in range(1 + number % 3)]
    return [(question, _reversed(question)) for question in questions]


def _messages(turns: Sequence[tuple[str, str]], names: Sequence[str] = ("user", "assistant")) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for turn in turns for role, text in zip(names, turn, strict=True)]


def _shown(turns: Sequence[tuple[str, str]], learned: Sequence[bool] | None = None) -> Text:
    """Return a conversation as one example, up to the last answer that is learned. ``learned`` says for each answer
    whether it is learned. Where ``learned`` is None, all answers are learned."""
    learned = learned or [True] * len(turns)
    parts = []
    for (question, answer), flag in zip(turns, learned, strict=True):
        parts += [(f"ask {question} answer", False), (f"{answer} <end>", flag)]
    while not parts[-1][1]:
        parts.pop()
    return parts


def _appended(rng: random.Random, number: int) -> Made:
    """Make a conversation with a system message. Every second conversation ends with a question, and row 1 has a
    control token."""
    turns = _turns(rng, number)
    if number == 1:
        turns[0] = (turns[0][0], "w1 <end> w2")
    first, last = {"role": "system", "content": "w7"}, {"role": "user", "content": "w8"}
    row = {"messages": [first, *_messages(turns), *([last] if number % 2 else [])]}
    return Made(row, [[("note w7", False), *_shown(turns)]])


def _rewritten(rng: random.Random, number: int) -> Made:
    """Make a conversation that becomes one example for each answer."""
    turns = _turns(rng, number)
    return Made({"messages": _messages(turns)}, [_shown([turn]) for turn in turns])


def _last(rng: random.Random, number: int) -> Made:
    turns = _turns(rng, number)
    return Made({"messages": _messages(turns)}, [_shown(turns, [False] * (len(turns) - 1) + [True])])


def _everything(rng: random.Random, number: int) -> Made:
    """Make a conversation of which all tokens are learned, even those of a question at the end."""
    turns = _turns(rng, number)
    messages = _messages(turns)
    text = " ".join(part for part, _ in _shown(turns))
    if number % 2:
        messages.append({"role": "user", "content": "w8 w9"})
        text += " ask w8 w9"
    return Made({"messages": messages}, [[(text, True)]])


def _tools(rng: random.Random, number: int) -> Made:
    """Make a conversation in which the assistant calls a tool, and answers after the tool's result. Every third row has
    no tools."""
    ((question, answer),) = _turns(rng, 0)
    if number % 3 == 2:
        return Made({"dialogue": _messages([(question, answer)])}, [_shown([(question, answer)])])
    arguments: Any = {"at": "w3"}
    call = {"id": "1", "function": {"name": "w2", "arguments": json.dumps(arguments) if number % 2 else arguments}}
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "w4"},
        {"role": "assistant", "content": answer},
    ]
    example = [
        (f"offer w2 ask {question} answer", False),
        ("call w2 w3 <end>", True),
        ("result w4 answer", False),
        (f"{answer} <end>", True),
    ]
    tool = {"type": "function", "function": {"name": "w2", "parameters": {"type": "object"}}}
    return Made({"dialogue": messages, "functions_offered": [tool]}, [example])


def _weighted(rng: random.Random, number: int) -> Made:
    """Make a conversation with two answers, of which only one is learned. The names of its roles are keys of
    `roles`."""
    turns = [*_turns(rng, 0), *_turns(rng, 0)]
    learned = [number % 2 == 0, number % 2 == 1]
    messages = _messages(turns, ("teacher", "pupil"))
    for message, flag in zip(messages[1::2], learned, strict=True):
        message["weight"] = int(flag)
    return Made({"messages": messages}, [_shown(turns, learned)])


def _share_gpt(rng: random.Random, number: int) -> Made:
    turns = _turns(rng, number)
    messages = [{"from": m["role"], "value": m["content"]} for m in _messages(turns, ("human", "gpt"))]
    return Made({"system": "w7", "conversations": messages}, [[("note w7", False), *_shown(turns)]])


FORMATS = (
    RowFormat(
        "text-skipped",
        {"text": {"allowSpecialTokens": True}},
        ".txt",
        _skipped_text,
        {"longRows": "Skip", "maxLength": LONGEST},
    ),
    RowFormat(
        "text-split",
        {"text": {"textField": "body"}},
        ".jsonl.gz",
        _split_text,
        {"longRows": "Split", "maxLength": LONGEST},
    ),
    RowFormat(
        "text-truncated",
        {"text": {"textField": "body"}},
        ".csv.zst",
        _cut_text,
        {"longRows": "Truncate", "maxLength": LONGEST},
    ),
    RowFormat("prompt-completion", tiny.PROMPT_COMPLETION, ".tsv", _prompt_completion, {"badRows": "Skip"}),
    RowFormat(
        "template",
        {
            "promptCompletion": {
                "template": "ask {task} {#input}note {input} {/input}{^input}offer {/input}answer",
                "completion": "{reason} result {answer}",
                "allowSpecialTokens": True,
            }
        },
        ".csv",
        _template,
    ),
    RowFormat("messages-appended", {"messages": {"allowSpecialTokens": True}}, ".jsonl", _appended),
    RowFormat(
        "messages-rewritten",
        {"messages": {"chatTemplate": {"file": REWRITING_FILE}, "learn": "AllAssistant"}},
        ".json",
        _rewritten,
    ),
    RowFormat(
        "messages-last",
        {
            "messages": {
                "chatTemplate": {"text": REWRITING},
                "templateArguments": {"history": "true"},
                "learn": "LastAssistant",
            }
        },
        ".parquet",
        _last,
    ),
    RowFormat("messages-everything", {"messages": {"learn": "Everything"}}, ".jsonl.zst", _everything),
    RowFormat(
        "messages-tools",
        {
            "messages": {
                "messagesField": "dialogue",
                "toolsField": "functions_offered",
                "chatTemplate": {"text": TOOLS},
            }
        },
        ".json.gz",
        _tools,
    ),
    RowFormat(
        "messages-weighted",
        {"messages": {"roles": {"teacher": "user", "pupil": "assistant"}}},
        ".parquet.gz",
        _weighted,
    ),
    RowFormat("share-gpt", {"messages": {"messagesField": "conversations"}}, ".csv", _share_gpt),
    RowFormat(
        "mix-weighted",
        tiny.PROMPT_COMPLETION,
        ".jsonl,.parquet",
        _prompt_completion,
        {"badRows": "Skip"},
        mix=("3", "0.5"),
    ),
    RowFormat(
        "mix",
        {"text": {"textField": "body"}},
        ".jsonl,.jsonl",
        _split_text,
        {"longRows": "Split", "maxLength": LONGEST},
        mix=(None, None),
    ),
    RowFormat("folder", {"messages": {"allowSpecialTokens": True}}, ".jsonl,.jsonl", _appended),
)


def texts(rows: Sequence[Made]) -> list[Text]:
    """Return the examples of all rows."""
    return [text for made in rows for text in made.examples]


def plain_example(tokenizer: Any, text: Text) -> PlainExample:
    """Return the token ids of ``text``, each with whether it is learned."""
    parts = [(tokenizer(part)["input_ids"], learned) for part, learned in text]
    return PlainExample(
        [number for ids, _ in parts for number in ids], [learned for ids, learned in parts for _ in ids]
    )


def found_examples(examples: ExampleSet) -> list[PlainExample]:
    """Return ``examples``, which the trainer has made, in the form of `plain_example`."""
    return [
        PlainExample(
            [int(number) for number in example.ids],
            [any(first <= at < last for first, last in example.spans) for at in range(len(example.ids))],
        )
        for example in examples
    ]
