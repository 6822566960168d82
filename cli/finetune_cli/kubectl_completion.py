"""The program `kubectl_complete-finetune`, which kubectl asks for the words that complete `kubectl finetune …`.

kubectl gives the words behind `finetune`, of which the last one is incomplete, and reads one completion a line and a
last line with a number that says what the shell may add (https://github.com/kubernetes/kubernetes, `kubectl help
plugin`). The script of `finetune completion bash` knows the completions, so the program lets bash run it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import shtab

from finetune_cli.command_line import PROGRAM, command_line
from finetune_cli.terminal import complain, say

ERROR, FILES, NO_FILES = ":1", ":0", ":4"
"""What the shell does behind the completions: nothing because of an error, offer files where there is no completion,
offer no files. The numbers are those of Cobra's `ShellCompDirective`."""
SECONDS = 20
"""Bound of a completion, which may ask the cluster for the names of jobs."""
ASK = """
_shtab_compgen_files() { :; }
_shtab_compgen_dirs() { :; }
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE} COMP_TYPE=9
function=$(complete -p finetune) && function=${function##*-F } && "${function%% *}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""Calls the function that the script registered, as bash does when the user presses the key. The shell itself completes
names of files better, because it does not add a space behind a folder."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the completions of the last word of ``arguments``, and return the exit code."""
    words = [PROGRAM, *(sys.argv[1:] if arguments is None else arguments)]
    script = shtab.complete(command_line(), "bash") + ASK
    try:
        # The script's `compopt` complains to the standard error output, because no key was pressed.
        offered = subprocess.check_output(
            ["bash", "--norc", "-c", script, "bash", *words],
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        complain(f"kubectl_complete-finetune: {error}")
        say(ERROR)
        return 1
    found = [line.strip() for line in offered.splitlines() if line.strip()]
    for word in found:
        say(word)
    say(NO_FILES if found else FILES)
    return 0
