"""The one way from the program to the terminal: every text is written here, without control characters.

Messages, names and addresses come from the cluster and from the bucket, so other people write them. A terminal obeys
control characters: such a text could clear the screen, forge a line of the output, or set the clipboard. A test holds
that no other module prints.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_UNPRINTABLE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0, DEL and C1
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # direction, invisible, and breaks of lines
    "\ud800-\udfff"  # half characters, which can't be encoded
    "\U000e0000-\U000e007f]"  # invisible tags
)
"""Characters that a terminal obeys or hides, instead of showing them."""
_BLANKS: Final = re.compile("[\t\n\r\x0b\x0c\x85\u2028\u2029]+")
"""Characters that end a line or a column. They become one blank, so that words stay apart."""


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
    """Write ``value`` as indented JSON to the standard output. JSON escapes control characters, and loses none."""
    print(json.dumps(value, indent=2, ensure_ascii=True), flush=True)


class TerminalHandler(logging.Handler):
    """Writes the warnings that a library logs without a handler of its own to the standard error output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write ``record`` as one line."""
        complain(self.format(record))


def _encodable(text: str, encoding: str | None) -> str:
    """Return ``text`` with a question mark for each character that the output's encoding does not have."""
    used = encoding or "utf-8"
    return text.encode(used, errors="replace").decode(used)


class SafeConsole(Console):
    """A rich console that removes control characters from every shown text, and understands no markup in it.

    rich itself passes escape characters on, and would read `[red]` in a message as a colour and `[/]` as an error.
    """

    def __init__(self, **options: Any) -> None:
        """Pass ``options`` to rich's Console. Markup and emoji codes are off."""
        super().__init__(**options, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of ``renderable``; the texts among them are printable. rich's own control codes stay."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text == "\n":
                yield segment
            else:
                yield Segment("\n".join(map(printable, segment.text.split("\n"))), segment.style)
