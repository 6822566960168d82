"""The program `finetune`: parses the command line, runs the command, and prints one sentence for an error that a user
can correct.

Exit codes: 0 success; 1 the job did not succeed, a job file is not valid, a job does not fit its GPUs, or a checkpoint
is damaged; 2 the command line is wrong, or the command could not do its work, for example because the API server can't
be reached; 130 interrupted. `finetune watch` also has the exit code 3: the model was trained, but did not reach a score
of `evaluation.require`.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.text import Text

from finetune_cli import __version__
from finetune_cli.checkpoints import DAMAGED, as_json, as_table, inspect_checkpoints, root_of
from finetune_cli.compare.command import add_command as add_compare
from finetune_cli.download import artifact_of, download
from finetune_cli.formatting import size
from finetune_cli.job_client import ConnectionLostError, JobClient, load_client
from finetune_cli.object_store import ObjectStoreReader, access_key_from
from finetune_cli.plan import plan_file
from finetune_cli.terminal import SafeConsole, TerminalHandler, complain, say, say_json
from finetune_cli.validate import validate_files
from finetune_cli.watch import show_until_ended, view_for
from finetune_core.api.conditions import Reason
from finetune_core.api.job import FineTuneJob
from finetune_core.contract.pod import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from finetune_core.errors import UserError

GATE_FAILED_CODE = 3
"""Exit code of `finetune watch` for a job whose model is trained, but did not reach a score of `evaluation.require`."""

LARGEST_PRICE = 1_000_000_000
"""Largest price of a GPU for an hour that `finetune plan` takes. A cost that is no finite number is no JSON."""
MOST_ROWS = 10**15
"""Largest number of rows that `finetune plan` takes."""

EXAMPLES = """\
examples:
  finetune validate job.yaml
  finetune plan job.yaml --model-config config.json
  finetune watch quickstart
  finetune watch quickstart -n research
  finetune checkpoints quickstart
  finetune download quickstart -o ./adapter
  finetune compare lora full
"""
VALIDATE_EXAMPLES = """\
examples:
  finetune validate job.yaml jobs/
  helm template my-jobs | finetune validate -
  finetune validate -o json job.yaml | jq -r '.problems[].message'

exit code: 0 every job is valid, 1 one is not
"""
PLAN_EXAMPLES = """\
examples:
  finetune plan job.yaml --model-config config.json
  finetune plan job.yaml --model-config config.json --gpu H100-80GB --rows 7473 --price 2.5
  finetune plan cpu-job.yaml --model-config config.json --gpu L4
  finetune plan job.yaml --model-config config.json --gpu-table gpus.yaml --gpu MI300X
  finetune plan job.yaml --model-config config.json -o json | jq -r '.changes[].lines[]'
  kubectl get ftj my-job -o yaml | finetune plan - --model-config config.json

The configuration of the base model comes from --model-config, a file or the folder of a model. Where the model is in
the job's bucket, the command reads it there, with the access key in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
The plan shows choices and changes as YAML: merge these lines into the job. With -o json, each line has the path of its
field, such as `spec.training.microBatchSize: 2`.
A --gpu-table is a list of objects with name, memoryGibibytes, teraFlops, memoryBandwidth and linkBandwidth (GB/s).

exit code: 0 the job fits, 1 it does not, 2 it cannot be planned
"""
WATCH_EXAMPLES = """\
examples:
  finetune watch quickstart                   until it has ended; Ctrl-C leaves the job alone
  finetune watch quickstart -n research | tee job.log
  finetune watch quickstart && finetune download quickstart

exit code: 0 the job succeeded, 1 it did not, 2 it cannot be watched,
           3 the model is trained, but did not reach a score of evaluation.require
"""
DOWNLOAD_EXAMPLES = """\
examples:
  finetune download quickstart                into ./quickstart
  finetune download quickstart -o ./adapter
  kubectl port-forward -n storage service/minio 9000 &
  finetune download quickstart --endpoint http://127.0.0.1:9000

The access key comes from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY where both are set, else from the Secret that
the job names. Every file is compared with the sha256 in the manifest.
"""
CHECKPOINTS_EXAMPLES = """\
examples:
  finetune checkpoints quickstart
  finetune checkpoints quickstart --verify            read all of them; says which object is damaged
  finetune checkpoints quickstart -o json | jq '.checkpoints[] | select(.last).uri'
  kubectl port-forward -n storage service/minio 9000 &
  finetune checkpoints quickstart --endpoint http://127.0.0.1:9000

Without --verify sizes, manifest and COMMIT are compared. Credentials are found as for `finetune download`.

exit code: 0 nothing is damaged, 1 a checkpoint is, 2 it cannot be looked at
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    # Without this handler, Python itself would write the warnings of libraries to the standard error output, and would
    # not remove control characters.
    logging.lastResort = TerminalHandler(logging.WARNING)
    logging.captureWarnings(capture=True)
    try:
        code: int = options.run(options)
        return code
    except UserError as error:
        complain(f"finetune: {error}")
        return 2
    except ConnectionLostError as error:
        complain(f"finetune: API server: cannot be reached ({error})")
        return 2
    except TimeoutError:
        complain(f"finetune: {options.name}: has not ended after {options.timeout:g} s")
        return 2
    except KeyboardInterrupt:
        return 130


def watch_job(options: argparse.Namespace) -> int:
    """Show a job until it has ended. Return 0 when the job succeeded. Otherwise print the reason, and return 3 where
    only a required score was not reached, else 1."""
    api, namespace = load_client()
    jobs = JobClient(api, options.namespace or namespace)
    with view_for(SafeConsole()) as view:
        end = show_until_ended(jobs.follow(options.name, view.show_notice, give_up_after=options.timeout), view)
    if not end.succeeded:
        complain(f"finetune: {options.name}: {end.reason}: {end.message}")
    if end.succeeded:
        return 0
    return GATE_FAILED_CODE if end.reason == Reason.GATE_FAILED else 1


def download_artifact(options: argparse.Namespace) -> int:
    """Download a job's artifact into a new folder and return 0."""
    api, namespace = load_client()
    jobs = JobClient(api, options.namespace or namespace)
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


def list_checkpoints(options: argparse.Namespace) -> int:
    """Print the checkpoints in a job's bucket. Return 0 when no checkpoint is damaged, else 1."""
    api, namespace = load_client()
    jobs = JobClient(api, options.namespace or namespace)
    job = jobs.get(options.name)
    store, root, console = store_of(job, jobs, options.endpoint), root_of(job), SafeConsole()
    with SafeConsole(stderr=True).status("looking at the bucket") as status:
        found = inspect_checkpoints(
            store, root, verify=options.verify, progress=lambda folder: status.update(Text(folder))
        )
    if options.output == "json":
        say_json(as_json(root, found))
    elif found:
        console.print(as_table(root, found))
    else:
        say(f"{root.uri()}: no checkpoint yet")
    return 1 if any(item.state == DAMAGED for item in found) else 0


def store_of(job: FineTuneJob, jobs: JobClient, endpoint: str | None = None) -> ObjectStoreReader:
    """Return a reader of the job's object store. The access key is that of the environment variables or, where these
    hold no key, that of the Secret that the job names. ``endpoint``, where it is given, replaces the address of the
    store. Raises UserError where no access key is found, and where the CA certificates that the job names are
    missing."""
    storage = job.spec.storage
    keys = access_key_from(os.environ)
    if keys is None:
        if storage.credentials_secret_ref is None:
            raise UserError(
                "environment", f"must have {ACCESS_KEY_ID} and {SECRET_ACCESS_KEY}: the job names no Secret"
            )
        name = storage.credentials_secret_ref.name
        keys = access_key_from(jobs.secret(name))
        if keys is None:
            raise UserError(
                f"Secret {job.metadata.namespace}/{name}", f"must have the keys {ACCESS_KEY_ID} and {SECRET_ACCESS_KEY}"
            )
    reference = storage.ca_config_map_ref
    certificates = jobs.config_map(reference.name).get(reference.key) if reference else None
    if reference and not certificates:
        raise UserError(f"ConfigMap {job.metadata.namespace}/{reference.name}", f"must have the key {reference.key}")
    return ObjectStoreReader(storage, keys, endpoint, certificates)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="Check and plan job files, watch FineTuneJobs, and fetch what they made.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"finetune {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    validate = commands.add_parser(
        "validate",
        help="check job files without a server",
        description="Say of job files what the API server and the operator will say of them. Needs neither.",
        epilog=VALIDATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    validate.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="YAML or JSON file with any number of documents, or a folder of such files; - for standard input",
    )
    validate.add_argument("-o", "--output", choices=("text", "json"), default="text", help="json for pipelines")
    validate.set_defaults(run=validate_files)
    plan = commands.add_parser(
        "plan",
        help="say whether a job fits its GPUs, how fast it is, and what to change",
        description="Plan the memory, the speed and the cost of a job. Needs neither a cluster nor a GPU.",
        epilog=PLAN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("file", metavar="FILE", help="YAML or JSON file with one job; - for standard input")
    plan.add_argument("--model-config", type=Path, metavar="PATH", help="config.json of the base model, or its folder")
    plan.add_argument("--gpu", metavar="TYPE", help="type of GPU, such as H100-80GB (default: resources.gpuProduct)")
    plan.add_argument("--gpu-table", type=Path, metavar="FILE", help="YAML or JSON file with more types of GPUs")
    plan.add_argument(
        "--price",
        type=_positive,
        metavar="PRICE",
        help="price of one GPU for one hour, in any currency; the plan shows the cost",
    )
    plan.add_argument("--rows", type=_count, metavar="N", help="number of training rows, for hours and cost")
    plan.add_argument("--endpoint", metavar="URL", help="address of the object store as seen from here")
    plan.add_argument("-o", "--output", choices=("text", "json", "yaml"), default="text", help="json for pipelines")
    plan.set_defaults(run=plan_file)
    watch = _command(commands, "watch", "show a job live until it has ended", WATCH_EXAMPLES)
    watch.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up watching after so long (default: never)"
    )
    watch.set_defaults(run=watch_job)
    fetch = _command(commands, "download", "fetch the adapter or the model of a job, verified", DOWNLOAD_EXAMPLES)
    fetch.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="folder to create (default: the job's name)")
    fetch.add_argument("--endpoint", metavar="URL", help="address of the object store as seen from here")
    fetch.set_defaults(run=download_artifact)
    listing = _command(commands, "checkpoints", "list a job's checkpoints as the bucket has them", CHECKPOINTS_EXAMPLES)
    listing.add_argument("-o", "--output", choices=("text", "json"), default="text", help="json for pipelines")
    listing.add_argument("--verify", action="store_true", help="read every byte and compare it with the manifest")
    listing.add_argument("--endpoint", metavar="URL", help="address of the object store as seen from here")
    listing.set_defaults(run=list_checkpoints)
    add_compare(commands, store_of, _positive)
    return parser


def _positive(text: str) -> float:
    """Return the number above 0 that ``text`` is. argparse shows the error of this function to the user."""
    value = float(text)
    if not 0 < value <= LARGEST_PRICE:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most {LARGEST_PRICE:,}, and is {text}")
    return value


def _count(text: str) -> int:
    """Return the whole number of at least 1 that ``text`` is."""
    value = int(text)
    if not 1 <= value <= MOST_ROWS:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MOST_ROWS:,}, and is {text[:40]}")
    return value


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    """Add the command ``name``, which takes the name of one job, to the command line. Return the command's parser."""
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("name", metavar="NAME", help="name of the FineTuneJob")
    command.add_argument("-n", "--namespace", metavar="NAMESPACE", help="default: that of the current context")
    return command
