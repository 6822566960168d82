"""The program `finetune`: parses the command line, runs the command, and prints one sentence for an error that a user
can correct.

Exit codes: 0 success; 1 the job did not succeed, a job file is not valid, a job does not fit its GPUs, or a checkpoint
is damaged; 2 the command line is wrong, or the command could not do its work, for example because the API server can't
be reached; 130 interrupted; 141 the reader of a pipe ended. `finetune watch` also has the exit code 3: the model was
trained, but did not reach a score of `evaluation.require`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from finetune_cli.apiserver.refusals import OTHER_CLUSTER, ConnectionLostError
from finetune_cli.command_line import PROGRAM, command_line, program_of
from finetune_cli.terminal import complain, forget_output, quiet_libraries
from finetune_core.errors import UserError

INTERRUPTED = 130
NO_READER = 141
"""Exit codes of a shell for a program that SIGINT or SIGPIPE ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = command_line(program_of(sys.argv[0])).parse_args(arguments)
    quiet_libraries(verbose=options.verbose)
    try:
        code: int = options.run(options)
        return code
    except UserError as error:
        complain(f"{PROGRAM}: {error}")
        return 2
    except ConnectionLostError as error:
        complain(
            f"{PROGRAM}: API server: cannot be reached ({error}); `kubectl cluster-info` asks the same server; or"
            f" {OTHER_CLUSTER}"
        )
        return 2
    except BrokenPipeError:
        forget_output()
        return NO_READER
    except KeyboardInterrupt:
        return INTERRUPTED
