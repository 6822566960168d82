"""`finetune checkpoints`: lists a job's checkpoints as the bucket has them. `bucket/checkpoints.py` inspects them."""

from __future__ import annotations

import argparse

from rich.text import Text

from finetune_cli.bucket.checkpoints import DAMAGED, as_json, as_table, inspect_checkpoints, root_of
from finetune_cli.commands.job_store import store_of
from finetune_cli.commands.options import Commands, add_command, add_endpoint, add_job, add_place, jobs_of
from finetune_cli.terminal import SafeConsole, say, say_json, say_yaml

EXAMPLES = """\
examples:
  finetune checkpoints quickstart
  finetune checkpoints quickstart --verify            read all of them; says which object is damaged
  finetune checkpoints quickstart -o json | jq '.checkpoints[] | select(.last).uri'
  kubectl port-forward -n storage service/minio 9000 &
  finetune checkpoints quickstart --endpoint http://127.0.0.1:9000

Without --verify sizes, manifest and COMMIT are compared. Credentials are found as for `finetune download`.

exit code: 0 nothing is damaged, 1 a checkpoint is, 2 it cannot be looked at
"""


def add_checkpoints(commands: Commands) -> None:
    """Add `finetune checkpoints` to the command line."""
    command = add_command(
        commands, "checkpoints", "list a job's checkpoints as the bucket has them", EXAMPLES, list_checkpoints
    )
    add_job(command)
    add_place(command)
    command.add_argument("-o", "--output", choices=("text", "json", "yaml"), default="text", help="json for pipelines")
    command.add_argument("--verify", action="store_true", help="read every byte and compare it with the manifest")
    add_endpoint(command)


def list_checkpoints(options: argparse.Namespace) -> int:
    """Print the checkpoints in a job's bucket. Return 0 when no checkpoint is damaged, else 1."""
    jobs = jobs_of(options)
    job = jobs.get(options.name)
    store, root, console = store_of(job, jobs, options.endpoint), root_of(job), SafeConsole()
    with SafeConsole(stderr=True).status("looking at the bucket") as status:
        found = inspect_checkpoints(
            store, root, verify=options.verify, progress=lambda folder: status.update(Text(folder))
        )
    if options.output != "text":
        (say_json if options.output == "json" else say_yaml)(as_json(root, found))
    elif found:
        console.print(as_table(root, found))
    else:
        say(f"{root.uri()}: no checkpoint yet")
    return 1 if any(item.state == DAMAGED for item in found) else 0
