"""A status with every field, and what an operator of another version may have made of it.

`test_version_skew.py` stores such statuses, and the operator must get on with each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from finetune_core.api.status import FineTuneJobStatus

Json = Any
ENUMS = ("status", "reason", "verdict", "kind", "action", "rows")
"""Names of status fields whose values are words from a list. Some of these lists are closed enums and some are open."""


def plain(annotation: Any) -> Any:
    """Return the type in ``annotation`` without bounds and without None."""
    while get_args(annotation) and get_origin(annotation) is not list:
        annotation = get_args(annotation)[0]
    return annotation


def sample(annotation: Any) -> Json:
    """Return a value of the type ``annotation`` as JSON."""
    kind = plain(annotation)
    if get_origin(kind) is list:
        return [sample(get_args(kind)[0])]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return filled(kind, {})
    if kind is datetime:
        return "2026-11-24T11:00:00Z"
    return {bool: False, int: 1}.get(kind, "Test")


def filled(model: type[BaseModel], known: dict[str, Json]) -> dict[str, Json]:
    """Return ``known`` with a sample value in every field of ``model`` that it lacks, at every depth."""
    result = dict(known)
    for name, info in model.model_fields.items():
        key, kind = info.alias or name, plain(info.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel) and key in known:
            result[key] = filled(kind, known[key])
        elif not known.get(key):
            result[key] = sample(info.annotation)
    return result


def with_doubled_lists(value: Json) -> Json:
    """Return ``value`` with every list twice as long. Each copied condition gets a new type, because a list of
    conditions has each type only once."""
    if isinstance(value, dict):
        return {key: with_doubled_lists(inner) for key, inner in value.items()}
    if isinstance(value, list):
        items = [with_doubled_lists(item) for item in value]
        again = [
            item | {"type": f"{item['type']}2"} if isinstance(item, dict) and "type" in item else item for item in items
        ]
        return [*items, *again]
    return value


def with_new_words(value: Json, key: str = "") -> Json:
    """Return ``value`` with a new value in every field that `ENUMS` names."""
    if isinstance(value, dict):
        return {name: with_new_words(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_new_words(item) for item in value]
    return "Novel7: x" if key in ENUMS else value


def with_new_fields(value: Json) -> Json:
    """Return ``value`` with an unknown field in every object."""
    if isinstance(value, dict):
        return {name: with_new_fields(inner) for name, inner in value.items()} | {"novel": {"deep": [1]}}
    return [with_new_fields(item) for item in value] if isinstance(value, list) else value


def without_optional_fields(value: Json, annotation: Any = FineTuneJobStatus) -> Json:
    """Return ``value`` without the fields that the models do not require. The current attempt stays."""
    kind = plain(annotation)
    if get_origin(kind) is list:
        return [without_optional_fields(item, get_args(kind)[0]) for item in value]
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return value
    fields = {info.alias or name: info for name, info in kind.model_fields.items()}
    needed = {"attempts", "current"}
    return {
        key: without_optional_fields(inner, fields[key].annotation)
        for key, inner in value.items()
        if fields[key].is_required() or key in needed
    }


def without_required_fields(value: Json, annotation: Any = FineTuneJobStatus) -> Json:
    """Return ``value`` without the fields that the models require. Conditions keep `type`, the key of their list.

    The number of the current attempt stays: no operator can do without it.
    """
    kind = plain(annotation)
    if get_origin(kind) is list:
        return [without_required_fields(item, get_args(kind)[0]) for item in value]
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return value
    fields = {info.alias or name: info for name, info in kind.model_fields.items()}
    return {
        key: without_required_fields(inner, fields[key].annotation)
        for key, inner in value.items()
        if not fields[key].is_required() or key in ("number", "type")
    }


def with_long_texts(value: Json, key: str = "") -> Json:
    """Return ``value`` with much longer texts, except for names, times and words from a list."""
    if isinstance(value, dict):
        return {name: with_long_texts(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_long_texts(item, key) for item in value]
    named = key in ("name", "uid", "type", "holders", "kind", *ENUMS) or key.lower().endswith("time")
    return value * 3000 if isinstance(value, str) and not named else value


def with_large_numbers(value: Json, key: str = "") -> Json:
    """Return ``value`` with much larger numbers, except for numbers of attempts, indexes of pods and the active
    seconds."""
    if isinstance(value, dict):
        return {name: with_large_numbers(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_large_numbers(item, key) for item in value]
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value * 10**7 if is_count and key not in ("number", "index", "started", "activeSeconds") else value


def with_times(time: str, value: Json, key: str = "") -> Json:
    """Return ``value`` with ``time`` in place of each time, except for the time at which the job ended."""
    if isinstance(value, dict):
        return {name: with_times(time, inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_times(time, item, key) for item in value]
    is_time = isinstance(value, str) and key.lower().endswith("time") and key != "completionTime"
    return time if is_time else value


SKEWS: dict[str, Callable[[Json], Json]] = {
    "every list is twice as long": with_doubled_lists,
    "every word is new": with_new_words,
    "every object has a new field": with_new_fields,
    "every optional field is gone": without_optional_fields,
    "every required field is gone": without_required_fields,
    "every text is long": with_long_texts,
    "every number is large": with_large_numbers,
    "every time is the last one": lambda value: with_times("9999-12-31T23:59:59Z", value),
    "every time is the first one": lambda value: with_times("0001-01-01T00:00:00Z", value),
    "all at once": lambda value: with_doubled_lists(with_new_words(with_new_fields(value))),
}


def leaves(value: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of all values in ``value``, also of objects and lists."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from leaves(item, (*path, number))


def value_at(value: Json, path: tuple[str | int, ...]) -> Json:
    """Return the value at ``path`` in ``value``."""
    for step in path:
        value = value[step]
    return value


def replaced(value: Json, path: tuple[str | int, ...], new: Json) -> Json:
    """Return a copy of ``value`` with ``new`` at ``path``."""
    result = copy.deepcopy(value)
    value_at(result, path[:-1])[path[-1]] = new
    return result
