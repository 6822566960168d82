"""The chat templates of published models: the tokens around each learned answer are those that the model sees at
inference."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data.examples import Example
from tests.trainer.chat import byte_tokenizer, learned, published, rendered, renderer, template_folder

Message = Mapping[str, Any]
Render = Callable[[Mapping[str, Any]], Sequence[Example] | str]
FamilyOf = Callable[[str], tuple[PreTrainedTokenizerFast, Render]]

CALL = {"type": "function", "function": {"name": "area", "arguments": {"side": 3}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "area",
        "description": "The area of a square",
        "parameters": {"type": "object", "properties": {"side": {"type": "integer"}}},
    },
}
PLAIN: tuple[Message, ...] = (
    {"role": "user", "content": "Name a colour"},
    {"role": "assistant", "content": "Red"},
    {"role": "user", "content": "And another"},
    {"role": "assistant", "content": "Blue"},
)
THOUGHTS: tuple[Message, ...] = (
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "reasoning_content": "That is easy.", "content": "2"},
    {"role": "user", "content": "Plus one?"},
    {"role": "assistant", "reasoning_content": "Add it.", "content": "3"},
)
TOOLS: tuple[Message, ...] = (
    {"role": "user", "content": "How large is the square?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "area", "content": "9"},
    {"role": "assistant", "content": "It is 9."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Welcome"},
)
CONVERSATIONS = {"plain": PLAIN, "thoughts": THOUGHTS, "tools": TOOLS}


@dataclass(frozen=True)
class Difference:
    """A difference between what trl's training variant of a template marks and what is learned here."""

    marked: str
    """Regular expression for the part of trl's marked text that is different here."""
    learned: str
    """The text that is learned in place of this part."""
    why: str


BREAK = Difference(r"\n$", "", "a line break behind the end, after which nothing is generated")
HEADER = Difference(r"^<\|start\|>assistant|^<｜Assistant｜>|^\n(?=[A-Z<]\w)", "", "a header that the model gets")
OPENED = Difference(r"^<think>\n", "", "the generation prompt has opened the thoughts")
EOS = Difference(r"\n<eos>$", "", "the EOS behind the whole conversation, after which nothing is generated")
CLOSED_ALREADY = Difference(r"^<think>\n\n</think>\n\n", "", "the generation prompt has closed the thoughts already")
EMPTY = Difference(r"^<think></think>", "</think>", "the generation prompt has opened the thoughts")
EMPTY_LINES = Difference(r"^<think></think>\n?", "\n</think>\n", "the generation prompt has opened the thoughts")
CLOSED = Difference(r"^<｜Assistant｜>", "\n</think>\n\n", "the generation prompt has opened the thoughts")
RESPONSE = Difference(
    r"<tool_call\|>$", "<tool_call|><|tool_response>", "the token at which the model stops for a tool"
)
TURN = Difference(r"^It is 9", "<|turn>model\nIt is 9", "no generation prompt comes behind the result of a tool")


@dataclass(frozen=True)
class Family:
    """What is expected of one published template."""

    ends: tuple[str, ...]
    """Tokens at which the model stops, besides EOS."""
    refused: Mapping[str, str]
    """For each conversation that the template can't show, the beginning of the phrase with which it is refused."""
    examples: Mapping[str, int]
    """For each conversation that the template can show, the number of its examples."""
    differences: tuple[Difference, ...] = ()
    unmarked: tuple[str, ...] = ()
    """Conversations of which trl's training variant leaves out a part that is learned here."""


NO_TOOLS = {"tools": "has 'tools', which"}
NO_THOUGHTS_SHOWN = {"thoughts": "has 'reasoning_content' in message 2 of role 'assistant', which"}
NEITHER = NO_TOOLS | NO_THOUGHTS_SHOWN
ROLES = {"tools": "can't be rendered by the model's chat template: Conversation roles must alternate"}
UNREADABLE = "can't be rendered by the model's chat template: "
CHANGED = "has a message 2 that the model's chat template does not put unchanged behind the messages before it"
PLAIN_ONLY = {"plain": 1}
NO_THOUGHTS = {"plain": 1, "tools": 1}
APPENDS = {"plain": 1, "thoughts": 1, "tools": 1}
FORGETS = {"plain": 1, "thoughts": 2, "tools": 1}
"""The numbers of examples where the template removes the thoughts of earlier messages."""
REWRITES = {"plain": 2, "thoughts": 2, "tools": 3}
"""The numbers of examples where the template writes empty thoughts into the last message only."""
IM = ("<|im_end|>",)

FAMILIES = {
    "cohere": Family(("<|END_OF_TURN_TOKEN|>",), NO_THOUGHTS_SHOWN | {"tools": UNREADABLE}, PLAIN_ONLY),
    "cohere2": Family(("<|END_OF_TURN_TOKEN|>",), NO_THOUGHTS_SHOWN | ROLES, PLAIN_ONLY),
    "deepseek_r1_distill": Family(
        ("<｜end▁of▁sentence｜>",), NO_TOOLS, {"plain": 2, "thoughts": 2}, (CLOSED,), ("thoughts",)
    ),
    "deepseekv3": Family(("<｜end▁of▁sentence｜>",), NO_TOOLS, {"plain": 2, "thoughts": 2}, (CLOSED,), ("thoughts",)),
    "diffusion_gemma": Family(("<turn|>", "<|tool_response>"), {}, FORGETS, (BREAK, RESPONSE, TURN)),
    "gemma": Family(("<end_of_turn>",), NO_THOUGHTS_SHOWN | ROLES, PLAIN_ONLY, (BREAK,)),
    "gemma3": Family(("<end_of_turn>",), NO_THOUGHTS_SHOWN | ROLES, PLAIN_ONLY, (BREAK,)),
    "gemma4": Family(("<turn|>", "<|tool_response>"), NO_THOUGHTS_SHOWN, NO_THOUGHTS),
    "gemma4_v2": Family(("<turn|>", "<|tool_response>"), NO_THOUGHTS_SHOWN, NO_THOUGHTS),
    "gemma4_v3": Family(("<turn|>", "<|tool_response>"), NO_THOUGHTS_SHOWN, NO_THOUGHTS),
    "gemma4_v4": Family(("<turn|>", "<|tool_response>"), NO_THOUGHTS_SHOWN, NO_THOUGHTS),
    "gemma4_v5": Family(("<turn|>", "<|tool_response>"), {}, FORGETS),
    "glm4moe": Family(("<|user|>", "<|observation|>"), {}, FORGETS),
    "gptoss": Family(("<|return|>", "<|call|>"), {}, {"plain": 2, "thoughts": 2, "tools": 2}, (HEADER,)),
    "lfm2": Family(IM, NO_THOUGHTS_SHOWN | {"tools": "has 'tool_calls' in message 2"}, PLAIN_ONLY, (BREAK,)),
    "lfm2_2_5": Family(IM, {}, FORGETS),
    "lfm2_2_5_v2": Family(IM, {}, FORGETS),
    "lfm2_2_5_vl": Family(IM, {}, FORGETS),
    "lfm2_v2": Family(IM, NO_THOUGHTS_SHOWN, NO_THOUGHTS, (BREAK,)),
    "llama3": Family(("<|eot_id|>",), NEITHER, PLAIN_ONLY),
    "llama3_1": Family(("<|eot_id|>",), NO_THOUGHTS_SHOWN, NO_THOUGHTS),
    "llama3_2": Family(("<|eot_id|>",), NO_THOUGHTS_SHOWN, NO_THOUGHTS),
    "muse_glimmer": Family(("<|eot|>",), {}, APPENDS, (HEADER,)),
    "nemotron_3_5_lightning": Family(IM, {}, REWRITES, (BREAK, OPENED, EMPTY)),
    "nemotron_3_nano": Family(IM, {}, REWRITES, (BREAK, OPENED, EMPTY_LINES)),
    "nemotron_3_super": Family(IM, {}, REWRITES, (BREAK, OPENED, EMPTY_LINES)),
    "nemotron_3_ultra": Family(IM, {}, REWRITES, (BREAK, OPENED, EMPTY)),
    "phi3": Family(("<|end|>",), NEITHER, PLAIN_ONLY, (EOS,)),
    "phi3_5": Family(("<|end|>",), NEITHER, PLAIN_ONLY, (EOS,)),
    "qwen2_5": Family(IM, NO_THOUGHTS_SHOWN, NO_THOUGHTS, (BREAK, HEADER)),
    "qwen2_5_vl": Family(IM, NEITHER, PLAIN_ONLY, (BREAK,)),
    "qwen3": Family(IM, {}, REWRITES, (BREAK,)),
    "qwen3_5_nothink": Family(IM, {"thoughts": CHANGED}, {"plain": 2, "tools": 2}, (BREAK, CLOSED_ALREADY)),
    "qwen3_5_think": Family(IM, {}, REWRITES, (BREAK, OPENED)),
    "qwen3_6": Family(IM, {}, REWRITES, (BREAK, OPENED)),
    "qwen3_8": Family(IM, {}, {"plain": 2, "thoughts": 1, "tools": 3}, (BREAK, OPENED)),
    "qwen3_instruct_2507": Family(IM, NO_THOUGHTS_SHOWN, NO_THOUGHTS, (BREAK,)),
    "qwen3_vl": Family(IM, NO_THOUGHTS_SHOWN, NO_THOUGHTS, (BREAK,)),
}
NO_TEXT_FAMILIES = {"idefics3", "llava_next", "smolvlm"}
"""Templates that read the content of a message only as a list of parts. They are not tested here, because
`at_inference` renders the conversations of this file with texts as contents."""
TODAY = date(2026, 11, 9)


def row_of(kind: str, messages: tuple[Message, ...]) -> dict[str, Any]:
    return {"messages": [dict(message) for message in messages], **({"tools": [TOOL]} if kind == "tools" else {})}


def at_inference(tokenizer: Any, kind: str, messages: tuple[Message, ...], **options: Any) -> Any:
    """Return the token ids of ``messages`` as transformers renders them for a row of ``kind``. With `tokenize=False`
    among ``options``, return the rendered text."""
    row = row_of(kind, messages)
    return tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), return_dict=False, **options)


def cases(*, refused: bool) -> list[tuple[str, str]]:
    """Return pairs of a template's name and the name of a conversation. The template can show the conversation, or,
    with ``refused``, the conversation is refused."""
    return [
        (name, kind) for name, family in FAMILIES.items() for kind in (family.refused if refused else family.examples)
    ]


@pytest.fixture(scope="module")
def family_of() -> FamilyOf:
    """A function that returns the tokenizer and the renderer of the family with the given name. In each test
    function, the cases of a family follow each other, and share one renderer."""

    @functools.lru_cache(maxsize=1)
    def find(name: str) -> tuple[PreTrainedTokenizerFast, Render]:
        tokenizer = byte_tokenizer(published(name))
        return tokenizer, renderer(tokenizer, FAMILIES[name].ends)

    return find


def test_every_published_template_of_a_text_model_is_in_the_table() -> None:
    names = {path.stem for path in template_folder().glob("*.jinja")}
    assert {name for name in names if not name.endswith("_training")} - NO_TEXT_FAMILIES == set(FAMILIES)


@pytest.mark.parametrize(("name", "kind"), cases(refused=False))
def test_before_and_behind_each_answer_stand_the_tokens_of_inference(name: str, kind: str, family_of: FamilyOf) -> None:
    family, messages = FAMILIES[name], CONVERSATIONS[kind]
    tokenizer, render = family_of(name)
    examples = render(row_of(kind, messages))
    assert not isinstance(examples, str), examples
    assert len(examples) == family.examples[kind]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [(example, span) for example in examples for span in example.spans]
    for index, (example, (first, last)) in zip(answers, spans, strict=True):
        asked = at_inference(tokenizer, kind, messages[:index], add_generation_prompt=True)
        assert list(example.ids[:first]) == asked
        if any(difference in family.differences for difference in (CLOSED, EMPTY, EMPTY_LINES)):
            continue  # the template does not render what the model must generate behind the opened thoughts
        answered = at_inference(tokenizer, kind, messages[: index + 1], tokenize=False)
        text = tokenizer.decode(list(example.ids[:last]))
        # GLM's models end an answer with the token that begins the next message.
        assert answered.startswith(text) or answered == re.sub(r"<\|(user|observation)\|>$", "", text)
    for (example, _), (other, _) in pairwise(spans):
        assert example is other or list(other.ids[: len(example.ids)]) != list(example.ids)


@pytest.mark.parametrize(("name", "kind"), cases(refused=True))
def test_a_conversation_that_a_template_can_not_show_is_refused_by_name(
    name: str, kind: str, family_of: FamilyOf
) -> None:
    _, render = family_of(name)
    refused = render(row_of(kind, CONVERSATIONS[kind]))
    assert isinstance(refused, str)
    assert refused.startswith(FAMILIES[name].refused[kind])


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if (template_folder() / f"{name}_training.jinja").is_file()]
)
def test_what_is_learned_is_what_the_training_variant_of_the_template_marks(name: str, family_of: FamilyOf) -> None:
    """Each conversation is cut behind each of its answers in turn, and the last answer of each part is compared."""
    family, marked = FAMILIES[name], published(f"{name}_training")
    tokenizer, render = family_of(name)
    needed = set()
    for kind in family.examples.keys() - family.unmarked:
        messages = CONVERSATIONS[kind]
        for index in [index for index, message in enumerate(messages) if message["role"] == "assistant"]:
            row = row_of(kind, messages[: index + 1])
            found = tokenizer.apply_chat_template(
                row["messages"], tools=row.get("tools"), chat_template=marked, return_assistant_tokens_mask=True
            )
            mask = found["assistant_masks"]
            end = len(mask) - mask[::-1].index(1)
            begin = end - (mask[:end][::-1].index(0) if 0 in mask[:end] else end)
            text = tokenizer.decode(found["input_ids"][begin:end])
            for difference in family.differences:
                text, count = re.subn(difference.marked, difference.learned, text)
                needed.update([difference] if count else [])
            assert learned(tokenizer, render(row))[-1][-1] == text
    assert needed == set(family.differences)


@pytest.mark.parametrize(("name", "text"), [("llama3_2", "Today Date: 09 Nov 2026"), ("gptoss", "date: 2026-11-09")])
def test_a_template_gets_the_date_of_the_run(name: str, text: str) -> None:
    tokenizer = byte_tokenizer(published(name))
    examples = rendered(tokenizer, row_of("plain", PLAIN), FAMILIES[name].ends, TODAY)
    assert not isinstance(examples, str), examples
    assert all(text in tokenizer.decode(list(example.ids)) for example in examples)
