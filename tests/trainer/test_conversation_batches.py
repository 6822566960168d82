"""Conversations that are rendered and tokenised many at once have the examples, problems and notices of conversations
that are rendered one by one, and take a few calls of the template's process and of the tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_core.api.dataset import DatasetSpec
from finetune_core.errors import UserError
from finetune_trainer.data.chat import chat_template
from finetune_trainer.data.chat.template_process import TemplateProcess
from finetune_trainer.data.dataset import LengthLimit, RowOutcome, render_row
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.formats import TokenizeFunctions, renderer
from finetune_trainer.data.prepared import batch_encoding, piece_batches
from finetune_trainer.data.prepared.chunk_outcomes import ChunkRenderer
from finetune_trainer.data.prepared.conversation_batches import MOST_ROWS, BatchChatTemplate, batch_functions
from finetune_trainer.data.prepared.expected_texts import ANSWERS, BatchProcess
from finetune_trainer.data.tokenizer import load_tokenizer, tokenize_functions
from tests.trainer import tiny
from tests.trainer.chat import byte_tokenizer, published
from tests.trainer.prepared import as_values, dataset_of
from tests.trainer.row_formats import APPENDING, REWRITING

ENDS = ("<|im_end|>",)
TEMPLATES: dict[str, str] = {
    "qwen3": published("qwen3"),
    "appending": APPENDING.replace("<end>", "<|im_end|>"),
    "rewriting": REWRITING.replace("<end>", "<|im_end|>"),
    "order of the fields": (
        "{% for m in messages %}{{ m.role }}:{{ m | tojson }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    "fails for a word": (
        "{% for m in messages %}{% if 'wrong' in m.content %}{{ raise_exception('no ' ~ m.role) }}{% endif %}"
        "{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    ),
    "half of a pair": (
        "{% for m in messages %}{{ m.role }} {{ m.content }}{{ '\\ud800' if 'wrong' in m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    ),
    "arguments and date": (
        "{{ strftime_now('%d %B') }}{{ flag }}{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    ),
    "two tokens at the end": (
        "{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant {% else %}<|endoftext|>{% endif %}"
    ),
}
"""Chat templates, of which some fail for a row, rewrite earlier messages, or show how a message is written."""
LIMIT = LengthLimit(400, "dataset.maxLength 400")
TODAY = date(2026, 11, 30)
TEXTS = st.lists(
    st.sampled_from(["a", "bc ", "\n", "é", "🙂", "<|im_end|>", "<|im", "end|>", "<think>", "</think>", "wrong", "  "]),
    max_size=6,
).map("".join)
ROLES = st.sampled_from(["user", "assistant", "assistant", "system", "gpt", "human", "tool", "bot", "<|im_end|>"])
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "a"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "b", "parameters": {"type": "object"}}}
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": TEXTS}),
    st.fixed_dictionaries({"content": TEXTS, "role": ROLES}),
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "observation", "system"]), "value": TEXTS}),
    st.fixed_dictionaries({"role": ROLES, "content": TEXTS, "weight": st.sampled_from([0, 1, None])}),
    st.fixed_dictionaries({"role": ROLES, "content": TEXTS, "name": TEXTS}),
    st.fixed_dictionaries({"role": ROLES, "content": TEXTS.map(lambda text: [{"type": "text", "text": text}])}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS, "reasoning_content": TEXTS}),
    st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": st.just([CALL])}),
    st.fixed_dictionaries({"role": ROLES, "content": st.none()}),
)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=ANSWERS + 2).map(
    lambda pairs: [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
)
PLAIN = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]}
REORDERED = [dict(reversed(message.items())) for message in PLAIN["messages"]]
"""The messages of PLAIN with their fields in another order, which a template can show."""
ROWS = st.fixed_dictionaries(
    {"messages": st.one_of(PAIRS, PAIRS, st.lists(MESSAGES, max_size=6))},
    optional={
        "system": st.one_of(TEXTS, st.just(3)),
        "tools": st.sampled_from([[TOOL], [], None]),
        "chat_template_kwargs": st.sampled_from([{}, {"flag": 1}, {"flag": True}, {"unknown": 1}]),
    },
)


@functools.cache
def tokenizer_of(template: str, folder: Path | None) -> Any:
    """Return a tokenizer with a template. With ``folder``, its texts can't be cut into parts."""
    if folder is None:
        return byte_tokenizer(TEMPLATES[template] + "".join(ENDS) + "<|endoftext|>")
    tokenizer = load_tokenizer(tiny.write_llama_tokenizer(folder / "llama"))
    tokenizer.add_tokens([*ENDS, "<|endoftext|>"], special_tokens=True)
    return tokenizer


def functions(make: Callable[..., TokenizeFunctions], template: str, folder: Path | None) -> TokenizeFunctions:
    tokenizer = tokenizer_of(template, folder)
    tokenizer.chat_template = TEMPLATES[template]
    return make(tokenizer, ends=tokenizer.convert_tokens_to_ids([*ENDS, "<|endoftext|>"]), today=TODAY)


def one_by_one(tokenize: TokenizeFunctions, dataset: DatasetSpec, rows: Sequence[Row]) -> list[object]:
    render = renderer(dataset.format, tokenize, LIMIT.tokens)
    found: list[object] = []
    for row in rows:
        outcome: RowOutcome
        try:
            outcome = render_row(row, dataset, render, LIMIT)
        except UserError as error:
            return [*found, as_values(error)]
        found.append(as_values(outcome))
    return found


def ended(tokenize: TokenizeFunctions) -> None:
    assert tokenize.chat is not None
    tokenize.chat.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@settings(max_examples=60)
@given(
    st.lists(ROWS, min_size=1, max_size=6),
    st.sampled_from(sorted(TEMPLATES)),
    st.sampled_from(["AllAssistant", "LastAssistant", "Everything"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
)
@example([{"messages": [{"role": "user", "content": "a"}]}], "appending", "Everything", False, True, 1)
@example([PLAIN, {"messages": REORDERED}], "order of the fields", "AllAssistant", False, True, 2)
@example([PLAIN, PLAIN | {"chat_template_kwargs": {"flag": 1}}], "arguments and date", "AllAssistant", False, True, 2)
@example([PLAIN, PLAIN | {"tools": [TOOL]}], "qwen3", "AllAssistant", False, True, 2)
def test_any_conversations_become_the_same(
    folder: Path,
    rows: list[dict[str, Any]],
    template: str,
    learn: str,
    allow: bool,
    has_parts: bool,
    chunks: int,
) -> None:
    arguments = {"flag": "true"} if template == "arguments and date" else {}
    form = {"learn": learn, "allowSpecialTokens": allow, "roles": {"bot": "assistant"}, "templateArguments": arguments}
    dataset = dataset_of({"messages": form}, badRows="Skip", longRows="Skip")
    numbered = [Row(number, fields) for number, fields in enumerate(rows, start=1)] * chunks
    slow = functions(tokenize_functions, template, None if has_parts else folder)
    fast = functions(batch_functions, template, None if has_parts else folder)
    expected = one_by_one(slow, dataset, numbered)
    render = ChunkRenderer(dataset, fast, LIMIT)
    found: list[object] = []
    kinds: set[Any] = set()
    for place in range(0, len(numbered), len(rows)):
        packed = render(numbered[place : place + len(rows)], frozenset(kinds))
        kinds |= packed.found
        found += [as_values(outcome) for outcome in packed.outcomes()]
    ended(slow)
    ended(fast)
    assert found == expected


SLOW = (
    "{% for m in messages %}{% if m.content == 'slow' and messages | length == 2 %}{% for n in range(1500) %}"
    "{% for k in range(150) %}{% if n == k %}{% endif %}{% endfor %}{% endfor %}{% endif %}"
    "{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
"""A chat template that takes a part of a second for a conversation with the text `slow`."""


def conversation(question: str, answers: int = 1) -> dict[str, Any]:
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": "b"}]
    return {"messages": pair * answers}


def test_texts_that_reach_a_limit_only_together_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEMPLATES, "slow", SLOW)
    dataset = dataset_of({"messages": {}})
    rows = [Row(number, conversation(word)) for number, word in enumerate(["a", *["slow"] * 12], start=1)]
    slow = functions(tokenize_functions, "slow", None)
    expected = one_by_one(slow, dataset, rows)
    ended(slow)
    monkeypatch.setattr(BatchProcess, "several", limited(BatchProcess.several))
    fast = functions(batch_functions, "slow", None)
    assert isinstance(fast.chat, BatchChatTemplate)
    fast.chat.rows_at_once = 13
    found = [as_values(each) for each in ChunkRenderer(dataset, fast, LIMIT)(rows, frozenset()).outcomes()]
    assert fast.chat.calls >= 24, "the texts were made one by one"
    ended(fast)
    assert found == expected


def limited(several: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``several`` with a limit of 0.1 s of processor time in the place of 10 s."""

    @functools.wraps(several)
    def with_limit(process: BatchProcess, *arguments: Any) -> Any:
        seconds, process._seconds = process._seconds, 0.1
        process.end()  # the limit of a process is that of its beginning
        try:
            return several(process, *arguments)
        finally:
            process.end()
            process._seconds = seconds

    return with_limit


def test_a_template_that_takes_too_long_for_one_text_is_the_error_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = SLOW.replace("range(150)", "range(90000)")
    monkeypatch.setitem(TEMPLATES, "endless", endless)
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.5)
    dataset = dataset_of({"messages": {}})
    rows = [Row(number, conversation(word)) for number, word in enumerate(["a", "c", "slow", "d"], start=1)]
    slow, fast = (functions(make, "endless", None) for make in (tokenize_functions, batch_functions))
    expected = one_by_one(slow, dataset, rows)
    assert expected[-1] == ("dataset.format.messages", "the chat template takes more than 0 s for one row")
    render = ChunkRenderer(dataset, fast, LIMIT)
    for at_once in (1, 4):
        assert isinstance(fast.chat, BatchChatTemplate)
        fast.chat.rows_at_once = at_once
        assert [as_values(outcome) for outcome in render(rows, frozenset()).outcomes()] == expected
    ended(slow)
    ended(fast)


class Counted:
    """Counts calls of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.count = function, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.count += 1
        return self.function(*arguments, **named)


@pytest.mark.parametrize("has_parts", [True, False])
def test_simple_conversations_take_a_few_calls(has_parts: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays are the checks of kinds of fields, once for each kind."""
    asked = Counted(TemplateProcess.call)
    monkeypatch.setattr(TemplateProcess, "call", lambda *given: asked(*given))
    encodings = Counted(batch_encoding.encoded)
    monkeypatch.setattr(piece_batches, "encoded", encodings)
    tokenize = functions(batch_functions, "appending", None if has_parts else folder)
    chat = tokenize.chat
    assert isinstance(chat, BatchChatTemplate)
    chat.rows_at_once = MOST_ROWS
    rows = [Row(number, conversation(f"a{number}", 1 + number % 2)) for number in range(4 * MOST_ROWS)]
    ChunkRenderer(dataset_of({"messages": {}}), tokenize, LIMIT)(rows, frozenset())
    # At first one group may be shorter, because the time of a row is measured then.
    assert asked.count - chat.calls <= 2 * len(rows) / MOST_ROWS
    assert encodings.count <= 2 * len(rows) / MOST_ROWS + chat.calls
    assert chat.calls <= 24
    ended(tokenize)


@pytest.mark.parametrize("has_parts", [True, False])
def test_texts_with_marks_of_control_tokens_are_not_tokenised(
    has_parts: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the pieces between the marks become tokens."""
    asked: list[str] = []

    def encoded(tokenizer: Any, texts: Sequence[str], *, specials: bool) -> Any:
        asked.extend(texts)
        return batch_encoding.encoded(tokenizer, texts, specials=specials)

    monkeypatch.setattr(piece_batches, "encoded", encoded)
    tokenize = functions(batch_functions, "appending", None if has_parts else folder)
    render = ChunkRenderer(dataset_of({"messages": {}}), tokenize, LIMIT)
    (outcome,) = render([Row(1, conversation(f"a {ENDS[0]} b", 2))], frozenset()).outcomes()
    assert isinstance(outcome, list)
    assert outcome[0].read_as_text == (ENDS[0],)
    assert isinstance(tokenize.chat, BatchChatTemplate)
    assert any("a " in text for text in asked)
    assert not [text for text in asked if tokenize.chat.row_texts._begin in text]
    ended(tokenize)


def test_a_row_with_thousands_of_answers_is_not_rendered_as_a_whole() -> None:
    """Its texts would have billions of characters, and the row is too long after a few answers."""
    tokenize = functions(batch_functions, "appending", None)
    dataset = dataset_of({"messages": {}}, longRows="Skip")
    (found,) = ChunkRenderer(dataset, tokenize, LIMIT)([Row(1, conversation("a" * 100, 3000))], frozenset()).outcomes()
    ended(tokenize)
    assert "tokens, more than dataset.maxLength 400" in str(found)


def test_a_row_that_is_no_simple_conversation_takes_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize = functions(batch_functions, "order of the fields", None)
    assert isinstance(tokenize.chat, BatchChatTemplate)
    render = ChunkRenderer(dataset_of({"messages": {}}), tokenize, LIMIT)
    messages = [{**message, "name": "c"} for message in conversation("a", 2)["messages"]]
    rows = [Row(number, {"messages": messages}) for number in range(5)]
    known = render(rows, frozenset()).found
    asked = Counted(TemplateProcess.call)
    monkeypatch.setattr(TemplateProcess, "call", lambda *given: asked(*given))
    render(rows, known)
    assert asked.count == len(rows)
    ended(tokenize)
