"""Tables as kubectl prints them: columns with headings in capitals, and no borders.

On a terminal a table fits the width: the columns that matter least are left out first. In a pipe nothing is left out,
and each row is one line, so that `grep` and `awk` work. The commands call `print_columns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from finetune_cli.terminal import SafeConsole, printable, say

GAP = "   "
"""What stands between two columns in a pipe, as in kubectl."""
TERMINAL_GAP = 2
"""Blanks between two columns on a terminal."""
LEAST_FOLDED = 24
"""Smallest width of a column whose cells go on in the next line."""
LONGEST_CELL = 2000
"""Largest number of characters of a cell in a pipe. No sentence of the operator is longer."""

Row = Sequence[str | Text]


@dataclass(frozen=True, slots=True)
class Column:
    """The heading of a column, and how it behaves on a terminal that is too narrow."""

    heading: str
    right: bool = False
    """Whether the cells are numbers, which stand at the right."""
    folds: bool = False
    """Whether long cells go on in the next line."""
    spare: int = 0
    """On a narrow terminal the columns with the largest number are left out first. A column with 0 is never left
    out."""


@dataclass(frozen=True, slots=True)
class ColumnTable:
    """A table for a terminal, which leaves out what does not fit."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    one_line: bool = False
    """Whether each row is one line. Then long cells are cut."""

    def __rich_console__(self, console: object, options: ConsoleOptions) -> RenderResult:
        widths = _widths(self.columns, self.rows)
        kept = fitting(self.columns, widths, options.max_width)
        others = sum(widths[index] for index in kept if not self.columns[index].folds)
        left = options.max_width - others - TERMINAL_GAP * len(kept)
        table = Table(box=None, padding=(0, TERMINAL_GAP, 0, 0), pad_edge=False, header_style="bold")
        for index in kept:
            column = self.columns[index]
            table.add_column(
                column.heading,
                justify="right" if column.right else "left",
                max_width=max(1, left) if column.folds else None,
                no_wrap=self.one_line or not column.folds,
                overflow="ellipsis" if self.one_line or not column.folds else "fold",
            )
        for row in self.rows:
            table.add_row(*(row[index] for index in kept))
        yield table


def _widths(columns: Sequence[Column], rows: Sequence[Row]) -> list[int]:
    """Return the width of the longest cell of each column."""
    return [
        max([cell_len(column.heading), *(cell_len(printable(str(row[index]))) for row in rows)])
        for index, column in enumerate(columns)
    ]


def fitting(columns: Sequence[Column], widths: Sequence[int], width: int) -> list[int]:
    """Return the indices of those columns that are shown in ``width`` characters. ``widths`` are the widths of the
    columns' longest cells. A table has at most one column that folds."""
    needed = [
        min(found, LEAST_FOLDED) if column.folds else found for found, column in zip(widths, columns, strict=True)
    ]
    kept = list(range(len(columns)))
    while sum(needed[index] + TERMINAL_GAP for index in kept) > width:
        spare = max(kept, key=lambda index: columns[index].spare)
        if columns[spare].spare == 0:
            break
        kept.remove(spare)
    return kept


def column_lines(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """Return the lines for a pipe: the headings, and one line for each row."""
    cells = [[column.heading for column in columns]]
    cells += [[_cell(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    return [GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def print_columns(columns: Sequence[Column], rows: Sequence[Row], *, whole: bool = False) -> None:
    """Print the table to the standard output. With ``whole`` nothing is left out on a terminal either, which breaks
    long lines then, as those of `kubectl get -o wide`."""
    console = SafeConsole()
    if console.is_terminal and not whole:
        console.print(ColumnTable(columns, rows))
        return
    for line in column_lines(columns, rows):
        say(line)


def _cell(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= LONGEST_CELL else f"{shown[: LONGEST_CELL - 1]}…"
