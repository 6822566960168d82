"""What the commands have in common: the options about the cluster, and how a command is added to the command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

import shtab

from finetune_cli.apiserver.connection import load_client
from finetune_cli.apiserver.job_client import JobClient
from finetune_cli.apiserver.selection import Selection
from finetune_cli.terminal import printable
from finetune_core.api.job import (
    GROUP,
    KIND,
    NAME_MAX_LENGTH,
    NAME_PATTERN,
    NAMESPACE_PATTERN,
    PLURAL,
    SHORT_NAME,
    SINGULAR,
)
from finetune_core.errors import UserError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int]


def asked(command: str, function: str) -> Mapping[str, object]:
    """Return how shells complete a word by the output of ``command``, as `shtab.cmd` does. But zsh asks only when the
    user presses the key, by the shell function ``function``: with `shtab.cmd` it would ask once for each option, when
    it loads the script."""
    found: dict[str, object] = dict(shtab.cmd(command))
    preamble = found["preamble"]
    assert isinstance(preamble, dict)
    body = f"{function}() {{ compadd -- $({command}) }}"
    return {**found, "zsh": function, "preamble": {**preamble, "zsh": body}}


JOB_NAMES = asked("finetune list -o name 2>/dev/null | sed 's:.*/::'", "_finetune_jobs")
"""Completes the name of a job: the shell asks the cluster for the jobs of the current namespace."""
CONTEXTS = asked("kubectl config get-contexts -o name 2>/dev/null", "_finetune_contexts")
RESOURCE = f"{SINGULAR}.{GROUP}"
"""What stands before the slash in the output of `-o name`, as in kubectl."""
KINDS = (RESOURCE, f"{PLURAL}.{GROUP}", PLURAL, SINGULAR, SHORT_NAME)
"""What may stand before the slash of a name."""
LARGEST_SECONDS = 31_536_000
"""Longest time of an option in seconds: a year."""
LARGEST_PRICE = 1_000_000_000
"""Largest price of a GPU for an hour. A cost that is no finite number is no JSON."""


def add_command(
    commands: Commands, name: str, summary: str, examples: str, run: Run, *, description: str | None = None
) -> argparse.ArgumentParser:
    """Add the command ``name`` to the command line, and return its parser. ``examples`` follow the options in the
    help."""
    command = commands.add_parser(
        name,
        help=summary,
        description=description or f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def add_place(command: argparse.ArgumentParser) -> None:
    """Add the options that say which cluster and which namespace."""
    command.add_argument(
        "-n", "--namespace", metavar="NAMESPACE", type=namespace, help="default: that of the current context"
    )
    context = command.add_argument(
        "--context", metavar="CONTEXT", help="context of the kubeconfig (default: the current one)"
    )
    context.complete = CONTEXTS  # type: ignore[attr-defined]  # shtab reads this attribute.


def add_selector(command: argparse.ArgumentParser, *, all_namespaces: bool = True) -> None:
    """Add the options that select several jobs."""
    if all_namespaces:
        command.add_argument("-A", "--all-namespaces", action="store_true", help="jobs of all namespaces")
    command.add_argument("-l", "--selector", metavar="LABELS", help="labels of the jobs, such as team=nlp,stage!=test")


def add_job(command: argparse.ArgumentParser) -> None:
    """Add the name of one job."""
    found = command.add_argument("name", metavar="NAME", type=job_name, help=f"name of the {KIND}")
    found.complete = JOB_NAMES  # type: ignore[attr-defined]


def add_jobs(command: argparse.ArgumentParser, nargs: str, summary: str) -> None:
    """Add the names of several jobs."""
    found = command.add_argument("names", metavar="NAME", nargs=nargs, type=job_name, help=summary)
    found.complete = JOB_NAMES  # type: ignore[attr-defined]


def add_endpoint(command: argparse.ArgumentParser) -> None:
    """Add the address of the object store."""
    command.add_argument("--endpoint", metavar="URL", help="address of the object store as seen from here")


def jobs_of(options: argparse.Namespace) -> JobClient:
    """Return a client for the jobs of the cluster and the namespace that the command line names."""
    api, default = load_client(options.context)
    return JobClient(api, options.namespace or default)


def selection_of(options: argparse.Namespace, jobs: JobClient) -> Selection:
    """Return which jobs the command line names. Raises UserError for names of jobs together with `-A` or `-l`."""
    everywhere = getattr(options, "all_namespaces", False)
    if options.names and everywhere:
        raise UserError("-A", "must not be used together with names of jobs; name their namespace with `-n`")
    if options.names and options.selector:
        raise UserError("-l", "must not be used together with names of jobs; leave one of them out")
    return Selection(None if everywhere else jobs.namespace, tuple(dict.fromkeys(options.names)), options.selector)


def job_name(text: str) -> str:
    """Return the name of a job in ``text``, which may be what `-o name` prints. argparse shows the error of this
    function to the user."""
    kind, slash, name = text.rpartition("/")
    if slash and kind.lower() not in KINDS:
        raise argparse.ArgumentTypeError(f"must be the name of a {KIND}, and is {_shown(text)}")
    if re.fullmatch(NAME_PATTERN, name) is None or len(name) > NAME_MAX_LENGTH:
        raise argparse.ArgumentTypeError(
            f"must be the name of a {KIND}, which has at most {NAME_MAX_LENGTH} small letters, digits and '-', and is"
            f" {_shown(text)}"
        )
    return name


def namespace(text: str) -> str:
    """Return ``text`` as the name of a namespace."""
    if re.fullmatch(NAMESPACE_PATTERN, text) is None:
        raise argparse.ArgumentTypeError(f"must be the name of a namespace, and is {_shown(text)}")
    return text


def seconds(text: str) -> float:
    """Return ``text`` as a number of seconds above 0."""
    value = float(text)
    if not 0 < value <= LARGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0 and at most {LARGEST_SECONDS:,}")
    return value


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a function that reads a whole number from ``least`` to ``most``."""

    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {least:,} to {most:,}, and is {_shown(text)}"
            )
        return value

    # argparse names the function where the text is no number at all.
    number.__name__ = "whole number"
    return number


def _shown(text: str) -> str:
    shown = printable(text)
    return repr(shown if len(shown) <= 60 else f"{shown[:60]}…")


def price(text: str) -> float:
    """Return the number above 0 that ``text`` is. argparse shows the error of this function to the user."""
    value = float(text)
    if not 0 < value <= LARGEST_PRICE:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most {LARGEST_PRICE:,}, and is {text}")
    return value
