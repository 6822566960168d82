"""Reads sections of a stored FineTuneJob that the models of this version may refuse, because another version of the
operator wrote them or another version of the CRD allowed them.

The bounds of the models apply when a section is written. When a section is read here, bounds and closed lists of values
do not apply, unknown fields are ignored, and a value of the wrong type is left out while all other values are kept.
Because of this, an operator that is set back to an older version can still manage the jobs that the newer version has
started.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from finetune_core.api.base import ApiModel

Section = TypeVar("Section", bound=ApiModel)
_EMPTY: dict[type, Any] = {str: "", int: 0, bool: False, list: []}
"""For each of these four types, the value that replaces a required field that is absent or can't be read.
`_Reader.absent` makes the values of other types. This version always writes required fields, so only another version
can have left out a required field."""


class _UnreadableError(ValueError):
    """A value does not have the type that this version expects."""


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one section, and collects the paths of the values that it can't read."""

    now: datetime
    unread: list[str] = field(default_factory=list)
    """Paths of the values that were left out, for example `plan.zeroStage` or `metrics[2]`."""

    @contextmanager
    def leaving_out(self, path: str) -> Iterator[None]:
        """Return a context manager. Where its `with` block can't read the value at ``path``, the value is left out and
        ``path`` is added to `unread`."""
        try:
            yield
        except _UnreadableError:
            self.unread.append(path)

    def section(self, model: type[BaseModel], value: Any, path: str) -> Any:
        """Return the object ``value`` as ``model``, without the fields that can't be read. A required field that is
        absent or can't be read gets the value that `absent` returns."""
        if not isinstance(value, dict):
            raise _UnreadableError
        values: dict[str, Any] = {}
        for name, info in model.model_fields.items():
            key = info.alias or name
            inner = f"{path}.{key}" if path else key
            if value.get(key) is not None:
                with self.leaving_out(inner):
                    values[name] = self.value(info.annotation, value[key], inner)
            if name not in values and info.is_required():
                values[name] = self.absent(info.annotation, inner)
        return model.model_construct(**values)

    def absent(self, annotation: Any, path: str) -> Any:
        """Return the value that replaces a required field of the type ``annotation`` that is absent or can't be read:
        zero, an empty value or, for a time, `now`."""
        kind = _plain(annotation)
        if kind is datetime:
            return self.now
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return self.section(kind, {}, path)
        if get_origin(kind) is Literal:
            return ""
        return _EMPTY.get(get_origin(kind) or kind)

    def value(self, annotation: Any, value: Any, path: str) -> Any:
        """Return ``value`` as a value of the type ``annotation``. The bounds and the closed list of values in
        ``annotation`` are not checked."""
        kind = _plain(annotation)
        origin = get_origin(kind)
        if origin is list:
            return self.items(get_args(kind)[0], value, path)
        if origin in (Union, types.UnionType):
            return self.first_that_fits(get_args(kind), value, path)
        if origin is Literal:
            kind = type(get_args(kind)[0])
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return self.section(kind, value, path)
        if kind is datetime:
            return _time(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise _UnreadableError
        return value

    def items(self, annotation: Any, values: Any, path: str) -> list[Any]:
        """Return the items of the list ``values`` that can be read."""
        if not isinstance(values, list):
            raise _UnreadableError
        found: list[Any] = []
        for number, item in enumerate(values):
            with self.leaving_out(f"{path}[{number}]"):
                found.append(self.value(annotation, item, f"{path}[{number}]"))
        return found

    def first_that_fits(self, annotations: tuple[Any, ...], value: Any, path: str) -> Any:
        """Return ``value`` as a value of the first type in ``annotations`` that ``value`` has. Raises
        `_UnreadableError` where ``value`` has none of these types."""
        for annotation in annotations:
            try:
                return self.value(annotation, value, path)
            except _UnreadableError:
                continue
        raise _UnreadableError


def _plain(annotation: Any) -> Any:
    """Return the type in ``annotation`` without its bounds, and without None where None is allowed too."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
        return _plain(kinds[0]) if len(kinds) == 1 else Union[tuple(kinds)]  # noqa: UP007  (made at run time)
    return annotation


def _time(value: Any) -> datetime:
    """Return ``value``, a text such as ``"2026-01-31T12:00:00Z"``, as a time. Raises `_UnreadableError` where ``value``
    is not a time with a time zone."""
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise _UnreadableError from error
    if time.tzinfo is None:
        raise _UnreadableError
    return time


def read_section(model: type[Section], stored: Any, now: datetime) -> tuple[Section, list[str]]:
    """Return the section ``stored``, as the API server holds it, as an object of ``model``, and the paths of the values
    that could not be read.

    A field that could not be read has its default. A required field has no default. Where a required field is absent or
    could not be read, it is zero or empty or, for a time, ``now``. Where ``stored`` is not an object at all, the result
    is the section of an empty object, and one of the paths is the empty text, which means the whole section.
    """
    try:
        return model.model_validate(stored, extra="ignore"), []
    except ValidationError:
        pass  # The slow reading below is rare, because this version wrote most of the sections that it reads.
    reader = _Reader(now)
    try:
        return reader.section(model, stored, ""), reader.unread
    except _UnreadableError:
        return reader.section(model, {}, ""), ["", *reader.unread]
