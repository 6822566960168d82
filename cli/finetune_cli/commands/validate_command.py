"""The options of `finetune validate`. `jobfiles/validate.py` does the work."""

from __future__ import annotations

import shtab

from finetune_cli.commands.options import Commands, add_command
from finetune_cli.jobfiles.validate import validate_files

EXAMPLES = """\
examples:
  finetune validate job.yaml jobs/
  helm template my-jobs | finetune validate -
  finetune validate -o json job.yaml | jq -r '.problems[].message'

exit code: 0 every job is valid, 1 one is not
"""


def add_validate(commands: Commands) -> None:
    """Add `finetune validate` to the command line."""
    command = add_command(
        commands,
        "validate",
        "check job files without a server",
        EXAMPLES,
        validate_files,
        description="Say of job files what the API server and the operator will say of them. Needs neither.",
    )
    files = command.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="YAML or JSON file with any number of documents, or a folder of such files; - for standard input",
    )
    files.complete = shtab.FILE  # type: ignore[attr-defined]
    command.add_argument("-o", "--output", choices=("text", "json"), default="text", help="json for pipelines")
