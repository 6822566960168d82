"""The grader of ViGGO. In this task, the model turns a sentence about a video game into a formal meaning (a functional
representation).

The row's column `mr` holds the reference, for example `inform(name[Dirt: Showdown], genres[driving/racing, sport])`. A
representation consists of a function and its attributes, each with values in square brackets. The brackets may be
empty, as in `request_attribute(esrb[])`. `evaluation/scorer.py` calls `grade` for every generated answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from finetune_core.row_templates import text_or_none
from finetune_core.tasks import VIGGO
from finetune_trainer.evaluation.graders.grades import Grade

FUNCTIONS = (
    "inform",
    "request",
    "give_opinion",
    "confirm",
    "verify_attribute",
    "suggest",
    "request_explanation",
    "recommend",
    "request_attribute",
)
"""All functions that a representation can have: the dialogue acts of the data set (Juraska et al. 2019, ViGGO)."""

ATTRIBUTES = (
    "name",
    "exp_release_date",
    "release_year",
    "developer",
    "esrb",
    "rating",
    "genres",
    "player_perspective",
    "has_multiplayer",
    "platforms",
    "available_on_steam",
    "has_linux_release",
    "has_mac_release",
    "specifier",
)
"""All attributes that a representation can have, in the order that the prompt of Anyscale's study of LoRA demands.

Every published row keeps this order. So an answer with the attributes in the order of its reference keeps it too.
"""

LISTS = frozenset({"genres", "player_perspective", "platforms"})
"""Attributes that hold a list of values. In all other attributes a comma belongs to the value, as in `Sumo Digital,
Inc.`.
"""

_FUNCTION = re.compile(r"\s*(\w+)\s*\(")
_ATTRIBUTE = re.compile(r"\s*(\w+)\s*\[")
_COMMA = re.compile(r"\s*,")
_END = re.compile(r"\s*\)\s*\Z")


class Attribute(NamedTuple):
    """An attribute of a representation, with its values in the order of the text. An attribute with empty brackets has
    no values."""

    name: str
    values: tuple[str, ...]


class Representation(NamedTuple):
    """A functional representation: a function, and its attributes in the order of the text."""

    function: str
    attributes: tuple[Attribute, ...]


def parse(text: str) -> Representation | None:
    """Parse ``text`` as a functional representation. Return None if ``text`` is anything else, or has other text beside
    the representation.

    White space around names, brackets and commas is ignored, and white space inside a value counts as one space. Quotes
    have no meaning. Square brackets inside a value must be balanced. A list is split at commas outside of all brackets.
    """
    match = _FUNCTION.match(text)
    if match is None:
        return None
    attributes: list[Attribute] = []
    position = match.end()
    while not _END.match(text, position):
        if attributes:
            comma = _COMMA.match(text, position)
            if comma is None:
                return None
            position = comma.end()
        name = _ATTRIBUTE.match(text, position)
        closing = _closing_bracket(text, name.end()) if name else None
        if name is None or closing is None:
            return None
        attributes.append(Attribute(name[1], _values(name[1], text[name.end() : closing])))
        position = closing + 1
    return Representation(match[1], tuple(attributes))


def grade(answer: str, row: Mapping[str, object]) -> Grade:
    """Return the five scores of ``answer``, compared with the representation in the row's column `mr`.

    If the answer is no representation, only its function can still be right. The row can't be used if its reference is
    no representation, or has a function or an attribute that is not in FUNCTIONS or ATTRIBUTES.
    """
    reference = parse(text_or_none(row.get("mr")) or "")
    if reference is None:
        return Grade.left_out("the gold row is not a functional representation")
    unknown = any(attribute.name not in ATTRIBUTES for attribute in reference.attributes)
    if reference.function not in FUNCTIONS or unknown:
        return Grade.left_out("the gold row has a function or an attribute that ViGGO does not know")
    parsed = parse(answer)
    if parsed is None:
        name = _FUNCTION.match(answer)
        named = name is not None and name[1] == reference.function
        return Grade.of(VIGGO, {"function": named}, problem="the answer is not a functional representation")
    same_function = parsed.function == reference.function
    same_values = _unordered(parsed) == _unordered(reference)
    scores = {
        "strict": parsed == reference,
        "orderFree": same_function and same_values,
        "function": same_function,
        "attributes": _attribute_names(parsed) == _attribute_names(reference),
        "values": same_values,
    }
    return Grade.of(VIGGO, scores)


def _attribute_names(representation: Representation) -> Counter[str]:
    """Return how often ``representation`` has each attribute, by the attribute's name."""
    return Counter(attribute.name for attribute in representation.attributes)


def _unordered(representation: Representation) -> Counter[tuple[str, tuple[str, ...]]]:
    """Return the attributes with their values. Two representations that differ only in order have equal results."""
    return Counter((attribute.name, tuple(sorted(attribute.values))) for attribute in representation.attributes)


def _closing_bracket(text: str, start: int) -> int | None:
    """Return the index of the bracket that closes the opening bracket before ``start``. None if there is no such
    bracket."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"[": 1, "]": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return None


def _values(name: str, text: str) -> tuple[str, ...]:
    """Return the values of the attribute ``name``. ``text`` is the text between its brackets."""
    if not text.strip():
        return ()
    parts = _split(text) if name in LISTS else [text]
    return tuple(" ".join(part.split()) for part in parts)


def _split(text: str) -> list[str]:
    """Split ``text`` at its commas. Commas inside of brackets do not count."""
    parts = [""]
    depth = 0
    for character in text:
        depth = max(depth + {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0), 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
