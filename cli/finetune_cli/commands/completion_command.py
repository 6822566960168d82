"""`finetune completion`: prints the script that completes commands, options and names of jobs in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import shtab

from finetune_cli.commands.options import Commands, add_command
from finetune_cli.terminal import say

SHELLS = ("bash", "zsh", "fish")
EXAMPLES = """\
examples:
  source <(finetune completion bash)                              this shell
  finetune completion bash > ~/.local/share/bash-completion/completions/finetune
  finetune completion zsh > ~/.zfunc/_finetune                    a folder of $fpath, before compinit
  finetune completion fish > ~/.config/fish/completions/finetune.fish

The names of jobs are asked of the current namespace of the cluster.
"""


def add_completion(commands: Commands, parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Add `finetune completion` to the command line. ``parser`` returns the whole command line, under the name
    `finetune`."""
    command = add_command(
        commands, "completion", "print the script that completes commands in a shell", EXAMPLES, print_completion
    )
    command.add_argument("shell", choices=SHELLS, help="the shell that runs the script")
    command.set_defaults(parser=parser)


def print_completion(options: argparse.Namespace) -> int:
    """Print the script, and return 0."""
    for line in shtab.complete(options.parser(), options.shell).splitlines():
        say(line)
    return 0
