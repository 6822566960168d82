"""Parses YAML as kubectl does, and records the line of every key and list item. `validate.py` calls `load`.

The result is dicts, lists and scalars, the line of each, and the problems of the YAML itself, such as syntax errors,
duplicate keys, and aliases that expand to too many values. The module processes the parser's events with a list as a
stack, because recursion would overflow Python's call stack on deep nesting.

kubectl's parser and PyYAML both follow YAML 1.1, but with different exceptions. For example, kubectl's parser reads
`1e-4` as a number, and PyYAML reads it as a string. So this module, and not PyYAML, decides the value of a plain
(unquoted) scalar.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from finetune_core.validation.problems import FieldPath

DEPTH_LIMIT = 200
"""Largest number of nested levels that a YAML document may have."""
GIVE_UP_DEPTH = 2000
"""Largest number of nested levels of a refused value or key, the value or key itself included. Up to this number the
levels are skipped. Beyond this number parsing stops, because the time that the parser needs grows with the square of
the depth."""
NODE_LIMIT = 1_000_000
"""Largest number of values and keys in a document, checked at each alias. An alias adds the number of values and keys
that it stands for. A document without aliases is not checked, because it can't be larger than its file."""

_TRUE = frozenset({"y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"})
_FALSE = frozenset({"n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"})
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO]?[0-7]+|[1-9][0-9]*|0)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_PREFIX = "tag:yaml.org,2002:"
_MERGE = object()
"""Value of `_Frame.key` for the merge key `<<`. For any other key, `_Frame.key` is the text of the key, or None if the
key is refused."""
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class YamlProblem:
    """A problem of the YAML itself, such as a duplicate key, with its line and the path of the field."""

    line: int
    path: FieldPath
    message: str


@dataclass(slots=True)
class Document:
    """One YAML document of the file: its parsed value, the line number of each field path, and the problems of the YAML
    itself, such as duplicate keys."""

    line: int
    value: Any = None
    lines: dict[FieldPath, int] = field(default_factory=dict)
    problems: list[YamlProblem] = field(default_factory=list)

    def line_of(self, path: FieldPath) -> int:
        """Return the line of ``path``. Where the document has no such path, return the line of the nearest section
        above it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, self.line)


def load(text: str) -> tuple[list[Document], list[YamlProblem]]:
    """Return the YAML documents of ``text``, and the syntax error at which the parser stopped, if any. Empty documents
    are left out, unless the parser stopped at an error."""
    documents: list[Document] = []
    builder: _Builder | None = None
    try:
        for event in yaml.parse(text, Loader=_PARSER):
            if isinstance(event, yaml.DocumentStartEvent):
                builder = _Builder(Document(_line(event)))
            elif isinstance(event, yaml.DocumentEndEvent) and builder is not None:
                documents.append(builder.document)
                builder = None
            elif builder is not None:
                builder.take(event)
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark or error.context_mark
        sentence = " ".join(part for part in (error.context, error.problem) if part)
        return documents, [YamlProblem(mark.line + 1 if mark else 1, (), f"must be YAML: {sentence}")]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position if isinstance(error.position, int) else 0) + 1
        return documents, [YamlProblem(line, (), f"must be YAML: {error.reason}")]
    return [document for document in documents if document.value is not None or document.problems], []


@dataclass(slots=True)
class _Frame:
    """A mapping or list whose end has not been parsed yet."""

    value: Any
    path: FieldPath
    anchor: str | None
    nodes_before: int
    key: Any = None
    has_key: bool = False
    merged: list[dict[str, Any]] = field(default_factory=list)


class _Builder:
    """Builds one `Document` from the events of PyYAML's parser."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._frames: list[_Frame] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._nodes = 0
        self._skipping = 0

    def take(self, event: Any) -> None:
        """Add the content of ``event``, the parser's next event, to the document."""
        if isinstance(event, yaml.CollectionStartEvent):
            self._start(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._end(event)
        elif self._skipping == 0:
            if isinstance(event, yaml.ScalarEvent):
                self._scalar(event)
            elif isinstance(event, yaml.AliasEvent):
                self._alias(event)

    def _start(self, event: Any) -> None:
        frame = self._frames[-1] if self._frames else None
        is_key = frame is not None and isinstance(frame.value, dict) and not frame.has_key
        if self._skipping:
            if self._skipping >= GIVE_UP_DEPTH:
                raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
            self._skipping += 1
            return
        if is_key and frame is not None:
            self._add_problem(event, "must have a string as key")
            frame.has_key, frame.key, self._skipping = True, None, 1
            return
        if len(self._frames) >= DEPTH_LIMIT:
            self._add_problem(event, f"must not be nested deeper than {DEPTH_LIMIT} levels")
            self._put(event, None)
            self._skipping = 1
            return
        value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
        path = self._place(event)
        self._nodes += 1
        self._frames.append(_Frame(value, path, event.anchor, self._nodes))

    def _end(self, event: Any) -> None:
        if self._skipping:
            self._skipping -= 1
            return
        frame = self._frames.pop()
        for merged in frame.merged:
            for key, value in merged.items():
                frame.value.setdefault(key, value)
        if frame.anchor:
            self._anchors[frame.anchor] = (frame.value, self._nodes - frame.nodes_before + 1)
        self._attach(event, frame.value)

    def _scalar(self, event: Any) -> None:
        self._nodes += 1
        try:
            value = _resolve(event)
        except ValueError as error:
            self._add_problem(event, str(error))
            value = None
        if event.anchor:
            self._anchors[event.anchor] = (value, 1)
        self._put(event, value)

    def _alias(self, event: Any) -> None:
        value, nodes = self._anchors.get(event.anchor, (None, 0))
        if nodes == 0:
            self._add_problem(event, f"must not refer to the anchor {event.anchor}, which is not complete here")
        elif self._nodes + nodes > NODE_LIMIT:
            self._add_problem(event, f"must not have more than {NODE_LIMIT} values, aliases counted")
            value = None
        else:
            self._nodes += nodes
        self._put(event, value)

    def _put(self, event: Any, value: Any) -> None:
        """Add ``value`` to the innermost open mapping or list: as the next key, as the value of the last key, or as the
        next item. ``value`` is that of a scalar or an alias, or None in place of a value that is nested too deeply."""
        frame = self._frames[-1] if self._frames else None
        if frame is not None and isinstance(frame.value, dict) and not frame.has_key:
            self._take_key(event, frame, value)
            return
        self._place(event)
        self._attach(event, value)

    def _take_key(self, event: Any, frame: _Frame, value: Any) -> None:
        frame.has_key = True
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and event.value == "<<":
            frame.key = _MERGE
            return
        key = _key(value)
        frame.key = key
        if key is None:
            self._add_problem(event, "must have a string as key")
            return
        path = (*frame.path, key)
        if key in frame.value:
            self._add_problem(
                event, f"must not stand twice; it stands on line {self.document.lines[path]} already", path
            )
        self.document.lines[path] = _line(event)

    def _place(self, event: Any) -> FieldPath:
        """Return the path of the value that ``event`` begins, and record the line of this path. For a value in a
        mapping no line is recorded here, because `_take_key` has recorded the line of the key for the same path."""
        if not self._frames:
            self.document.lines[()] = _line(event)
            return ()
        frame = self._frames[-1]
        if isinstance(frame.value, list):
            path: FieldPath = (*frame.path, len(frame.value))
            self.document.lines[path] = _line(event)
            return path
        return (*frame.path, frame.key) if isinstance(frame.key, str) else frame.path

    def _attach(self, event: Any, value: Any) -> None:
        """Add ``value``, which has been parsed to its end, to the innermost open mapping or list. Where none is open,
        ``value`` is the value of the document."""
        if not self._frames:
            self.document.value = value
            return
        frame = self._frames[-1]
        if isinstance(frame.value, list):
            frame.value.append(value)
            return
        if frame.key is _MERGE:
            merged = value if isinstance(value, list) else [value]
            if all(isinstance(item, dict) for item in merged):
                frame.merged += merged
            else:
                self._add_problem(event, "must be an alias of a mapping after <<")
        elif frame.key is not None:
            frame.value[frame.key] = value
        frame.has_key, frame.key = False, None

    def _add_problem(self, event: Any, message: str, path: FieldPath | None = None) -> None:
        frame = self._frames[-1] if self._frames else None
        here = frame.path if frame else ()
        if path is None and frame is not None and isinstance(frame.key, str):
            here = (*here, frame.key)
        self.document.problems.append(YamlProblem(_line(event), here if path is None else path, message))


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _key(value: Any) -> str | None:
    """Return ``value``, a key of a YAML mapping, as the text that this key has in JSON. Return None for a key that JSON
    can't express."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    return value if isinstance(value, str) else None


def _resolve(event: Any) -> Any:
    """Return the value of ``event``, a YAML scalar. Raises ValueError for a value or a tag that JSON can't express."""
    text: str = event.value
    tag = event.tag
    if tag is not None and tag != "!":
        name = tag.removeprefix(_PREFIX)
        if name == "str":
            return text
        if name not in ("int", "float", "bool", "null"):
            raise ValueError(f"must not have the tag {tag}")
        return _plain(text)
    return _plain(text) if event.implicit[0] else text


def _plain(text: str) -> Any:
    """Return the value of ``text``, a plain (unquoted) scalar, as kubectl reads it. Raises ValueError for a number that
    is not finite."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    number = text.replace("_", "")
    if text[0] not in "+-.0123456789":
        return text
    if _INTEGER.fullmatch(number):
        return _integer(number)
    if _FLOAT.fullmatch(number):
        return _number(float(number))
    if _SPECIAL_FLOAT.fullmatch(text):
        raise ValueError("must be a finite number")
    return text


def _number(value: float) -> int | float:
    """Return ``value`` as kubectl sends it to the API server. JSON has only one kind of number, so `2.0` is sent as 2.
    Raises ValueError for infinity."""
    if value in (math.inf, -math.inf):
        raise ValueError("must be a finite number")
    return int(value) if value.is_integer() and abs(value) < 1e21 else value


def _integer(number: str) -> int | float:
    """Return the value of ``number``, an integer in the notation of YAML 1.1: binary (0b), hexadecimal (0x), octal (0o
    or a leading 0) or decimal."""
    sign = -1 if number[0] == "-" else 1
    digits = number.lstrip("+-").lower()
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
        return sign * int(digits, 8)
    # Any other number with 100 or more characters after its sign becomes 1e308, even if it is negative, because int()
    # refuses numbers of thousands of digits. The exact value does not matter, because every number in the schema has
    # bounds, and both the number and 1e308 are outside of them.
    return sign * int(digits, 0) if len(digits) < 100 else float("1e308")
