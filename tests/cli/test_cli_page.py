"""Every command that the pages, the README and the helps show is one that the program understands, and every command
of the program is on docs/cli.md."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from finetune_cli.command_line import command_line, program_of
from tests.core.test_docs import DOCS, PAGES, text_of

BLOCK = re.compile(r"^```(?:console|sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
END = re.compile(r"&&|\|\||[|;&>]")
"""What ends a command in a line of a shell."""


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command by the name of the command."""
    (action,) = (found for found in command_line()._actions if isinstance(found, argparse._SubParsersAction))
    return dict(action.choices)


def shown_in(text: str) -> list[list[str]]:
    """Return the arguments of each call of `finetune` in ``text``, lines of a shell."""
    calls = []
    for line in text.splitlines():
        words = re.sub(r"\s#.*|\s{3,}\S.*", "", line.strip().removeprefix("$ "))
        for part in END.split(words.replace("<(", "; ").replace(")", " ")):
            found = re.match(r"(?:xargs |source )?(?:kubectl )?finetune (.*)", part.strip())
            if found and "--help" not in found[1]:
                calls.append(shlex.split(found[1]))
    return calls


def parse(arguments: list[str]) -> None:
    """Parse ``arguments`` as the program does. What stands for a value in a page is replaced by one."""
    named = [re.sub(r"^(JOB|NAME|COMMAND)$", "quickstart", word).replace("NAMESPACE", "research") for word in arguments]
    # A name that `xargs` appends.
    commands = {"cancel", "suspend"}
    command_line().parse_args([*named, "quickstart"] if named[-1:] and named[-1] in commands else named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_of_a_page_is_understood(page: Path) -> None:
    for block in BLOCK.findall(text_of(page)):
        for arguments in shown_in(block):
            parse(arguments)


@pytest.mark.parametrize("name", sorted(subcommands()))
def test_each_help_has_examples_that_are_understood(name: str) -> None:
    help_text = subcommands()[name].format_help()
    examples = help_text.partition("examples:\n")[2]
    calls = [arguments for arguments in shown_in(examples) if arguments[0] == name]
    assert calls, help_text
    for arguments in shown_in(examples):
        parse(arguments)


def test_each_command_is_on_the_page_with_an_example() -> None:
    blocks = "\n".join(BLOCK.findall(text_of(DOCS / "cli.md")))
    assert {arguments[0] for arguments in shown_in(blocks)} == set(subcommands())


def test_each_output_of_the_page_is_that_of_the_command() -> None:
    rows = re.findall(r"^\| (`finetune .*?) \| (`.*?) \|$", text_of(DOCS / "cli.md"), re.MULTILINE)
    told: dict[str, set[str]] = {}
    for names, forms in rows:
        told |= {name: set(re.findall(r"`(\w+)`", forms)) for name in re.findall(r"finetune (\w+)", names)}
    outputs = {
        name: set(action.choices) - {"text"}
        for name, parser in subcommands().items()
        for action in parser._actions
        if action.dest == "output" and action.choices
    }
    assert told == outputs


def test_the_help_calls_the_program_as_the_user_did() -> None:
    assert [program_of(path) for path in ("/usr/bin/finetune", "kubectl-finetune", "/x/__main__.py")] == [
        "finetune",
        "kubectl finetune",
        "finetune",
    ]
    assert command_line("kubectl finetune").format_help().startswith("usage: kubectl finetune ")
