"""The grader of JSON: the value of the answer is compared with the row's own value, key by key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation

from finetune_core.row_templates import text_or_none
from finetune_core.tasks import JSON
from finetune_trainer.evaluation.graders.grades import Grade

DEEPEST = 100
"""Largest number of objects and lists that may enclose any part of a value that can be graded."""

_FENCE = re.compile(r"(`{3,9}|~{3,9})[^\n`]*\n(.*)\1", re.DOTALL)
"""A Markdown fence around a whole text. Its first line may name a language, such as `json`."""
_FENCE_OF_ONE_LINE = re.compile(r"(`{3,9}|~{3,9})([^\n]*)\1")
_LANGUAGE = re.compile(r"\s*json[a-z0-9]*(?=\s|[{\[\"])", re.IGNORECASE)
"""The language that a fence of one line may name before the value. It is always JSON, since any other word, such as
`null`, may be the value."""


class NoValueError(ValueError):
    """A text, or a value of a data file, is no JSON value, or is nested too deeply."""


def grade(answer: str, row: Mapping[str, object]) -> Grade:
    """Return the grade of ``answer``. Its JSON value is compared with the JSON value of the row's column `answer`."""
    try:
        own = row.get("answer")
        if own is None:
            raise NoValueError
        # Of a single value, such as a decimal of a parquet file, the text that a template shows is parsed. A list or an
        # object, which a template can't show, is written as JSON first.
        shown = own if isinstance(own, str) else text_or_none(own)
        reference = parse(json.dumps(own, allow_nan=False, ensure_ascii=False) if shown is None else shown)
    except (NoValueError, ValueError, TypeError, RecursionError):
        return Grade.left_out("the row's own answer is no JSON")
    try:
        value = parse(answer)
    except NoValueError:
        return Grade.of(JSON, {}, problem="the answer is no JSON")
    equal = same(value, reference)
    return Grade.of(JSON, {"equal": equal, "keys": 1.0 if equal else _share(value, reference)})


def parse(text: str) -> object:
    """Return the JSON value of ``text``, in which numbers are decimals. A Markdown fence around the text is ignored.

    Raises NoValueError where the text is something else, has a key twice in an object, or is nested deeper than
    DEEPEST.
    """
    try:
        value = json.loads(
            _unfenced(text.strip()),
            object_pairs_hook=_object,
            parse_int=Decimal,
            parse_float=Decimal,
            parse_constant=_refuse,
        )
    except (ValueError, InvalidOperation, RecursionError) as error:
        raise NoValueError from error
    if _deeper_than(value, DEEPEST):
        raise NoValueError
    return value


def _unfenced(text: str) -> str:
    """Return ``text``, which has no white space at its ends, without a Markdown fence around it."""
    if fenced := _FENCE.fullmatch(text):
        return fenced[2]
    if fenced := _FENCE_OF_ONE_LINE.fullmatch(text):
        language = _LANGUAGE.match(fenced[2])
        return fenced[2][language.end() :] if language else fenced[2]
    return text


def _object(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise NoValueError
    return made


def _refuse(name: str) -> object:
    """Refuse NaN and Infinity, which JSON does not have."""
    raise NoValueError


def _deeper_than(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper_than(item, levels - 1) for item in inner)


def same(left: object, right: object) -> bool:
    """Return whether two parsed values are equal. True does not equal 1, and the order of keys makes no difference."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def _share(left: object, right: object) -> float:
    """Return how many leaves are equal in both values, as a share of all paths that lead to a leaf in at least one of
    the two."""
    ours, theirs = dict(_leaves(left)), dict(_leaves(right))
    paths = ours.keys() | theirs.keys()
    equal = sum(path in ours and path in theirs and same(ours[path], theirs[path]) for path in paths)
    return equal / len(paths)


def _leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the path and the value of each leaf of ``value``. A leaf is any value that is no object, or an empty
    object."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value
