"""ViGGO: a sentence about a video game is turned into a functional representation.

The gold row's `mr` holds it, for example `inform(name[Dirt: Showdown], genres[driving/racing, sport])`: a function,
then attributes, each with its value or values in square brackets, which may be empty (`request_attribute(esrb[])`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from finetune_trainer.evaluation.graders.grades import Grade, graded, ungradable

GOLD_FIELD = "mr"

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
"""The data set's dialogue acts (Juraska et al. 2019, ViGGO)."""

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
"""In the order that the study's prompt demands; every published row keeps it: "order kept" is "order of the gold"."""

LISTS = frozenset({"genres", "player_perspective", "platforms"})
"""Attributes whose value is a list: elsewhere a comma belongs to the value (`June 29, 2018`, `Sumo Digital, Inc.`)."""

STRICT, ORDER_FREE, FUNCTION, NAMES, VALUES = "strict", "orderFree", "function", "attributes", "values"
SCORES = (STRICT, ORDER_FREE, FUNCTION, NAMES, VALUES)
"""The study's two scores, and the three parts apart.

strict      function, attributes and values, all in the gold's order
orderFree   the same, whatever the order of attributes, and of values in a list
function    the function's name
attributes  the names of the attributes, whatever their order; one too many or twice is wrong
values      the attributes with their values, whatever their order (orderFree = function and values)
"""

_FUNCTION = re.compile(r"\s*(\w+)\s*\(")
_ATTRIBUTE = re.compile(r"\s*(\w+)\s*\[")
_COMMA = re.compile(r"\s*,")
_END = re.compile(r"\s*\)\s*\Z")


class Attribute(NamedTuple):
    """An attribute and its values in the order written; none where the brackets are empty."""

    name: str
    values: tuple[str, ...]


class Representation(NamedTuple):
    """A functional representation."""

    function: str
    attributes: tuple[Attribute, ...]


def parse(text: str) -> Representation | None:
    """Return what ``text`` says, None where it is not one functional representation and nothing else.

    White space around names, brackets and commas says nothing, and a run of it inside a value is one space. Quotes have
    no meaning, square brackets inside a value must be balanced, a list is split at commas outside of all brackets.
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


def grade(answer: str, gold_row: Mapping[str, object]) -> Grade:
    """Return the five scores (see `SCORES`) of ``answer`` against the row's `mr`.

    Of an answer that does not parse only the function's name can be right. Ungradable is a row whose representation
    does not parse or has a function or an attribute that the data set does not know.
    """
    gold = parse(str(gold_row.get(GOLD_FIELD, "")))
    if gold is None:
        return ungradable("the gold row is not a functional representation")
    if gold.function not in FUNCTIONS or any(attribute.name not in ATTRIBUTES for attribute in gold.attributes):
        return ungradable("the gold row has a function or an attribute that ViGGO does not know")
    said = parse(answer)
    if said is None:
        name = _FUNCTION.match(answer)
        right = [FUNCTION] if name and name[1] == gold.function else []
        return graded(SCORES, right=right, problem="the answer is not a functional representation")
    checks = {
        STRICT: said == gold,
        ORDER_FREE: said.function == gold.function and _unordered(said) == _unordered(gold),
        FUNCTION: said.function == gold.function,
        NAMES: _names(said) == _names(gold),
        VALUES: _unordered(said) == _unordered(gold),
    }
    return graded(SCORES, right=[name for name, right in checks.items() if right])


def _names(representation: Representation) -> Counter[str]:
    return Counter(attribute.name for attribute in representation.attributes)


def _unordered(representation: Representation) -> Counter[tuple[str, tuple[str, ...]]]:
    return Counter((attribute.name, tuple(sorted(attribute.values))) for attribute in representation.attributes)


def _closing_bracket(text: str, start: int) -> int | None:
    """Return where the square bracket that opened just before ``start`` is closed."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"[": 1, "]": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return None


def _values(name: str, text: str) -> tuple[str, ...]:
    """Return the values between an attribute's brackets."""
    if not text.strip():
        return ()
    parts = _split(text) if name in LISTS else [text]
    return tuple(" ".join(part.split()) for part in parts)


def _split(text: str) -> list[str]:
    """Return the parts between commas that stand in no bracket."""
    parts = [""]
    depth = 0
    for character in text:
        depth = max(depth + {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0), 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
