"""The commands of the README's first block say in their first line how long they take and what is left to do."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.core.test_docs import ROOT, text_of

BLOCK = re.compile(r"^\$ make (\w+) ", re.MULTILINE)


def first_line(command: str, folder: Path) -> str:
    """Return the first line that `make COMMAND` prints in a clone in ``folder``, without running the rest."""
    (folder / "Makefile").write_text(text_of(ROOT / "Makefile"))
    # The tests run below a make themselves, whose options must not reach this one.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    done = subprocess.run(
        ["make", "--dry-run", command],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    said = re.fullmatch(r'echo "(.*)"', done.stdout.partition("\n")[0])
    assert said is not None, done.stdout + done.stderr
    return said[1]


def test_the_readme_shows_the_commands_that_say_it() -> None:
    assert BLOCK.findall(text_of(ROOT / "README.md")) == ["try", "demo", "test"]


@pytest.mark.parametrize("command", ["try", "demo", "test"])
def test_a_command_says_how_long_it_takes_and_what_is_left_to_do(command: str, tmp_path: Path) -> None:
    assert re.match(rf"make {command} takes about \d+ minutes.* on two processors", first_line(command, tmp_path))
    assert "3 GB are downloaded" in first_line(command, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    assert first_line(command, tmp_path).endswith("The packages are installed.")
