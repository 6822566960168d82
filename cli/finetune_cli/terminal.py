"""Writes what the program shows to the terminal, without control characters.

Messages, names and addresses come from the cluster and from the bucket, where other people can write them. A terminal
obeys control characters, so a text with such characters could clear the screen, forge a line of the output, or set the
clipboard. tests/cli/test_terminal.py checks that no other module prints.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
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


_SEQUENCES: Final = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours and cursor (CSI)
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]{0,4096}(?:\x07|\x1b\\|\x9c)"  # title, clipboard, links (OSC)
    r"|\x1b[PX^_][^\x1b]{0,4096}\x1b\\"  # device control and other strings
)
"""Matches whole escape sequences of ECMA-48, as programs write them into their logs for colours."""


def without_sequences(text: str) -> str:
    """Return ``text``, a line of a program's log, without whole escape sequences, so that `printable` leaves no remains
    of them, such as `[31m`. The result may still contain control characters."""
    return _SEQUENCES.sub("", text)


def printable(text: str) -> str:
    """Return ``text`` as one line without control characters, and without invisible characters."""
    return _UNPRINTABLE.sub("", _BLANKS.sub(" ", text))


def printable_values(value: Any) -> Any:
    """Return ``value``, parsed JSON, with each text in it as `printable` returns it. A view that breaks texts into
    lines itself needs such values, because a line end in a text would begin a line that looks like one of the
    program."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(name)): printable_values(item) for name, item in value.items()}
    return [printable_values(item) for item in value] if isinstance(value, list) else value


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


def say_yaml(value: Any, *, first: bool = True) -> None:
    """Write ``value`` as a YAML document to the standard output. Characters that are not ASCII are written as escape
    sequences. ``first`` is False for each document after the first one."""
    separator = "" if first else "---\n"
    print(separator + yaml.safe_dump(value, sort_keys=False, allow_unicode=False), end="", flush=True)


def quiet_libraries(*, verbose: bool) -> None:
    """Keep the warnings of libraries from the terminal, because the program says itself what a user can do. With
    ``verbose`` they are shown, without control characters."""
    # Without a handler, Python itself would write the warnings to the standard error output.
    logging.getLogger().addHandler(TerminalHandler(logging.WARNING) if verbose else logging.NullHandler())
    logging.captureWarnings(capture=True)


def forget_output() -> None:
    """Write to nowhere from now on. After the reader of a pipe has ended, as `head` does, Python would otherwise fail
    once more when it flushes the output at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


class TerminalHandler(logging.Handler):
    """Writes warnings of libraries to the standard error output, where a user asks for them."""

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


PIPE_WIDTH = 160
"""Width of a page in characters where the output is no terminal and COLUMNS does not say the width."""


def print_page(page: RenderableType) -> None:
    """Print ``page``, which has tables, to the standard output. In a pipe it is wider than a terminal, so that few
    texts are broken, and no line ends with blanks."""
    console = SafeConsole()
    if console.is_terminal:
        console.print(page)
        return
    if "COLUMNS" not in os.environ:
        console = SafeConsole(width=PIPE_WIDTH)
    with console.capture() as capture:
        console.print(page)
    for line in capture.get().splitlines():
        say(line.rstrip())
