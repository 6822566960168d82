"""Functions that make a job's status with a value in every field, and that change a status as an operator of another
version might have written it.

`test_version_skew.py` and `tests/faults/test_fleet.py` store the changed statuses. The operator must be able to read
each of them and to manage the job.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from finetune_core.api.status import FineTuneJobStatus

Json = Any
ENUMS = ("status", "reason", "verdict", "kind", "action", "rows")
"""Names of status fields whose values are words from a list; only the `reason` of ungraded answers is a free text. Of
`status` and `rows` the schema allows only the listed words, of the other fields also further words."""


def plain(annotation: Any) -> Any:
    """Return the type in ``annotation`` without bounds and without None, for example `int` for
    ``Annotated[int, Ge(0)] | None``."""
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
    """Return ``known`` with a sample value in every field of ``model`` that is missing, empty or 0 in ``known``.
    Objects in ``known`` are filled in the same way, but not the items of its lists."""
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


def with_each_value(change: Callable[[str, Json], Json], value: Json, key: str = "") -> Json:
    """Return a copy of ``value`` in which every inner value that is neither an object nor a list is replaced by the
    result of ``change``. ``change`` gets the key of the inner value, and the inner value. Items of a list have the key
    of the list."""
    if isinstance(value, dict):
        return {name: with_each_value(change, inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_each_value(change, item, key) for item in value]
    return change(key, value)


def new_word(key: str, value: Json) -> Json:
    """Return a word that no version knows if `ENUMS` contains ``key``. Otherwise return ``value``."""
    return "Novel7: x" if key in ENUMS else value


def long_text(key: str, value: Json) -> Json:
    """Return a text that is 3000 times as long as the text ``value``. Names, uids, times, types of conditions, words
    from a list and values that are no text are returned unchanged."""
    named = key in ("name", "uid", "type", "holders", "kind", *ENUMS) or key.lower().endswith("time")
    return value * 3000 if isinstance(value, str) and not named else value


def large_number(key: str, value: Json) -> Json:
    """Return a number that is 10 million times as large as the integer ``value``. The numbers of attempts, the count of
    started attempts, the indexes of pods, the active seconds and values that are no integer are returned unchanged."""
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value * 10**7 if is_count and key not in ("number", "index", "started", "activeSeconds") else value


def other_time(time: str, key: str, value: Json) -> Json:
    """Return ``time`` if ``value`` is a time, but not if it is the time at which the job ended. Otherwise return
    ``value``."""
    is_time = isinstance(value, str) and key.lower().endswith("time") and key != "completionTime"
    return time if is_time else value


def with_each_time(time: str) -> Callable[[Json], Json]:
    """Return a function that gets a status, and returns it with ``time`` in place of its times (see `other_time`)."""
    return partial(with_each_value, partial(other_time, time))


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

    The numbers of attempts stay, because no operator can do without the number of the current attempt.
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


SKEWS: dict[str, Callable[[Json], Json]] = {
    "every list is twice as long": with_doubled_lists,
    "every word is new": partial(with_each_value, new_word),
    "every object has a new field": with_new_fields,
    "every optional field is gone": without_optional_fields,
    "every required field is gone": without_required_fields,
    "every text is long": partial(with_each_value, long_text),
    "every number is large": partial(with_each_value, large_number),
    "every time is the last one": with_each_time("9999-12-31T23:59:59Z"),
    "every time is the first one": with_each_time("0001-01-01T00:00:00Z"),
    "every time is the last one, in the west": with_each_time("9999-12-31T23:59:59-14:00"),
    "every time is the first one, in the east": with_each_time("0001-01-01T00:00:00+14:00"),
    "all at once": lambda value: with_doubled_lists(with_each_value(new_word, with_new_fields(value))),
}


def leaves(value: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every value in ``value``, also of objects and lists, for example ``("conditions", 0, "type")``.
    A path is the keys and indexes that lead to the value. ``path`` is the path of ``value`` itself. It is yielded too
    unless it is empty."""
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
