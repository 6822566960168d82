"""Writes what the program shows to the terminal, without control characters.

Messages, names and addresses come from the cluster and from the bucket, where other people can write them. A terminal
obeys control characters, so a text with such characters could clear the screen, forge a line of the output, or set the
clipboard. tests/cli/test_terminal.py checks that no other module prints.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable
from typing import Any, Final

import yaml
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_UNPRINTABLE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters: C0, DEL and C1
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # text direction, invisible, line breaks
    "\ud800-\udfff"  # surrogates, which can't be encoded
    "\U000e0000-\U000e007f]"  # tag characters, which are invisible
)
"""Matches a character that must not reach the terminal: one that the terminal obeys, one that is invisible, or one that
can't be encoded."""
_BLANKS: Final = re.compile("[\t\n\r\x0b\x0c\x85\u2028\u2029]+")
"""Matches a sequence of line ends, tabs and similar characters. Each sequence is replaced by one blank, so that words
stay apart."""


def printable(text: str) -> str:
    """Return ``text`` as one line without control characters, and without invisible characters."""
    return _UNPRINTABLE.sub("", _BLANKS.sub(" ", text))


def say(text: str) -> None:
    """Write ``text`` as one line to the standard output."""
    print(_encodable(printable(text), sys.stdout.encoding), flush=True)


def complain(text: str) -> None:
    """Write ``text`` as one line to the standard error output."""
    print(_encodable(printable(text), sys.stderr.encoding), file=sys.stderr, flush=True)


def say_json(value: Any) -> None:
    """Write ``value`` as indented JSON to the standard output. Control characters in texts are not removed, but written
    as escape sequences. `json.dumps` escapes all control characters except DEL, which is escaped here."""
    print(json.dumps(value, indent=2, ensure_ascii=True).replace("\x7f", "\\u007f"), flush=True)


def say_yaml(value: Any) -> None:
    """Write ``value`` as YAML to the standard output. Characters that are not ASCII are written as escape sequences."""
    print(yaml.safe_dump(value, sort_keys=False, allow_unicode=False), end="", flush=True)


class TerminalHandler(logging.Handler):
    """Writes warnings of libraries to the standard error output. `main.py` registers this handler for loggers that have
    no other handler."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write ``record`` as one line."""
        complain(self.format(record))


def _encodable(text: str, encoding: str | None) -> str:
    """Return ``text`` with a question mark for each character that the output's encoding does not have."""
    used = encoding or "utf-8"
    return text.encode(used, errors="replace").decode(used)


class SafeConsole(Console):
    """A console of the library rich that removes control characters from every shown text, and does not interpret
    markup in the text.

    Without these changes, rich would write escape characters to the terminal, show a message with `[red]` in red, and
    fail at a message with `[/]`.
    """

    def __init__(self, **options: Any) -> None:
        """Pass ``options`` to rich's Console. Markup and emoji codes are off."""
        super().__init__(**options, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of ``renderable`` without the control characters in their texts. Segments with control
        codes of rich itself, for example for the cursor, stay as they are."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text == "\n":
                yield segment
            else:
                yield Segment("\n".join(map(printable, segment.text.split("\n"))), segment.style)
