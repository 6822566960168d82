"""`finetune download`: fetches the artifact of a job. `bucket/download.py` does the work."""

from __future__ import annotations

import argparse
from pathlib import Path

import shtab
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from finetune_cli.bucket.download import artifact_of, download
from finetune_cli.commands.job_store import store_of
from finetune_cli.commands.options import Commands, add_command, add_endpoint, add_job, add_place, jobs_of
from finetune_cli.formatting import size
from finetune_cli.terminal import SafeConsole, say

EXAMPLES = """\
examples:
  finetune download quickstart                into ./quickstart
  finetune download quickstart -o ./adapter
  kubectl port-forward -n storage service/minio 9000 &
  finetune download quickstart --endpoint http://127.0.0.1:9000

The access key comes from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY where both are set, else from the Secret that
the job names. Every file is compared with the sha256 in the manifest.
"""


def add_download(commands: Commands) -> None:
    """Add `finetune download` to the command line."""
    command = add_command(
        commands, "download", "fetch the adapter or the model of a job, verified", EXAMPLES, download_artifact
    )
    add_job(command)
    add_place(command)
    folder = command.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="folder to create (default: the job's name)"
    )
    folder.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    add_endpoint(command)


def download_artifact(options: argparse.Namespace) -> int:
    """Download a job's artifact into a new folder and return 0."""
    jobs = jobs_of(options)
    job = jobs.get(options.name)
    artifact = artifact_of(job)
    store = store_of(job, jobs, options.endpoint)
    folder: Path = options.output or Path(options.name)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = SafeConsole()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"artifact of step {artifact.step}", total=artifact.bytes)
        manifest = download(artifact, store, folder, lambda count: progress.advance(task, count))
    say(f"{folder}: {len(manifest.files)} files, {size(manifest.total_bytes)}, step {manifest.step}, all verified")
    return 0
