"""docs/traps.md names a test for each trap of training, or the reason why there is none, and every test that it names
exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "traps.md"
LAST = 30
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def rows() -> dict[int, str]:
    """Return, by the number of the trap, the cell of the page's table that names the tests of the trap, or says why
    there are none."""
    found = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    return {int(number): tests for number, tests in found}


def test_every_trap_has_a_test_or_a_reason() -> None:
    table = rows()
    assert list(table) == list(range(1, LAST + 1))
    without = {number: reason for number, reason in table.items() if not NAMED.search(reason)}
    assert list(without) == [30]
    assert without[30].startswith("none: ")


def test_every_test_that_is_named_exists_and_every_trap_test_is_named() -> None:
    defined = {
        (file.name, name)
        for file in TESTS.rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", file.read_text(), re.MULTILINE)
    }
    named = set(NAMED.findall(PAGE.read_text()))
    assert named - defined == set()
    assert {pair for pair in defined if pair[1].startswith("test_trap_")} - named == set()
