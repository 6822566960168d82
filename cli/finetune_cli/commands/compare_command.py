"""`finetune compare`: compares runs in the terminal and in one HTML file. `compare/` reads them and computes.

A source is the name of a job in the cluster, the `s3://` address of the folder of all runs of a job, or such a folder
on this machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError
from rich.text import Text

from finetune_cli.apiserver.job_client import JobClient
from finetune_cli.bucket.object_store import ObjectStoreReader, access_key_from
from finetune_cli.commands.job_store import store_of
from finetune_cli.commands.options import Commands, add_command, add_endpoint, add_place, jobs_of, price
from finetune_cli.compare.claims.findings import Comparison
from finetune_cli.compare.claims.study import findings_of
from finetune_cli.compare.compared_run import ComparedRun, JobFacts, read_run
from finetune_cli.compare.folders import BucketFolder, LocalFolder, RunFolder
from finetune_cli.compare.sources import facts_of, is_folder, labels_of
from finetune_cli.compare.table import as_table
from finetune_cli.terminal import SafeConsole, say
from finetune_core.api.storage import StorageSpec
from finetune_core.contract.pod import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from finetune_core.errors import UserError
from finetune_core.layout import parse_uri, run_root_of

MARKER = "<!doctype html>\n<!-- made by finetune compare -->\n"
"""Begin of each page, by which the command knows that it may replace the file."""
MOST_SOURCES = 100
DEFAULT_PAGE = Path("comparison.html")
EXAMPLES = """\
examples:
  finetune compare lora full                          two jobs of the cluster, and comparison.html
  finetune compare lora full -n research --price 2.5 --html report.html
  finetune compare s3://finetune/runs/research/lora/RUN-ID s3://finetune/runs/research/full/RUN-ID
  finetune compare ./runs/lora ./runs/full            folders with the layout of docs/storage.md

A text with a slash is a folder, a text that begins with s3:// an address, and every other text the name of a job. For
an address the access key comes from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and --endpoint names the store where
it is not Amazon S3. For a job, credentials are found as for `finetune download`.

exit code: 0 the comparison was made, 2 a source cannot be read
"""


def add_compare(commands: Commands) -> None:
    """Add `finetune compare` to the command line."""
    command = add_command(
        commands,
        "compare",
        "compare runs: scores, curves, speed, memory, cost and settings",
        EXAMPLES,
        compare,
        description="Compare runs in the terminal and in one HTML file, which needs no network.",
    )
    command.add_argument("sources", metavar="SOURCE", nargs="+", help="job, s3:// address or local folder")
    add_place(command)
    add_endpoint(command)
    command.add_argument("--region", metavar="REGION", help="region of the object store of an s3:// address")
    command.add_argument(
        "--html",
        type=Path,
        default=DEFAULT_PAGE,
        metavar="FILE",
        help=f"file of the page (default: {DEFAULT_PAGE})",
    )
    command.add_argument(
        "--price", type=price, metavar="PRICE", help="price of one GPU for one hour, in any currency, for the cost"
    )


def compare(options: argparse.Namespace) -> int:
    """Print the comparison, write the page and return 0."""
    _check_page(options.html)
    if len(options.sources) > MOST_SOURCES:
        raise UserError("SOURCE", f"must be at most {MOST_SOURCES} runs, and there are {len(options.sources)}")
    # The libraries that draw the plots take longer to import than other commands take to run.
    from finetune_cli.compare.page import page

    comparison = Comparison.of(_read(options), options.price)
    findings = findings_of(comparison)
    SafeConsole().print(as_table(comparison, findings, options.price))
    _write_page(options.html, MARKER + page(comparison, findings, datetime.now(UTC), options.price))
    say(f"{options.html}: open it in a browser")
    return 0


def _read(options: argparse.Namespace) -> list[ComparedRun]:
    """Return the run of each source, in the order of the command line."""
    labels = labels_of(options.sources)
    jobs: JobClient | None = None
    runs = []
    with SafeConsole(stderr=True).status("reading") as status:

        def show(label: str) -> Callable[[str], None]:
            return lambda key: status.update(Text(f"{label}: {key}"))

        for source, label in zip(options.sources, labels, strict=True):
            facts: JobFacts | None = None
            folder: RunFolder
            if source.startswith("s3://"):
                folder = _bucket(source, options)
            elif is_folder(source):
                folder = LocalFolder(Path(source).expanduser())
            else:
                if jobs is None:
                    jobs = jobs_of(options)
                job = jobs.get(source)
                root = run_root_of(job, job.status.preflight if job.status is not None else None)
                folder = BucketFolder(store_of(job, jobs, options.endpoint), parse_uri(root))
                facts = facts_of(job)
            runs.append(read_run(folder, label, job=facts, progress=show(label)))
    return runs


def _bucket(source: str, options: argparse.Namespace) -> RunFolder:
    place = parse_uri(source)
    if not place.prefix:
        raise UserError(
            source, "must be the folder of all runs of a job, such as s3://bucket/runs/NAMESPACE/NAME/RUN-ID"
        )
    keys = access_key_from(os.environ)
    if keys is None:
        raise UserError("environment", f"must have {ACCESS_KEY_ID} and {SECRET_ACCESS_KEY} to read {source}")
    try:
        storage = StorageSpec.model_validate(
            {"uri": source.rstrip("/"), "endpoint": options.endpoint}
            | ({"region": options.region} if options.region is not None else {})
        )
    except ValidationError as error:
        first = error.errors()[0]
        option = {"endpoint": "--endpoint", "region": "--region"}.get(str(first["loc"][0]), source)
        raise UserError(option, f"is none that can be read ({first['msg']})") from None
    return BucketFolder(ObjectStoreReader(storage, keys, options.endpoint), place)


def _check_page(path: Path) -> None:
    """Raise UserError where the page can't be written to ``path``, before minutes are spent on reading."""
    if path.is_dir():
        raise UserError("--html", f"must name a file, and {path} is a folder")
    if not path.parent.is_dir():
        raise UserError("--html", f"must name a file in a folder that exists, and {path.parent} does not")
    if path.exists():
        try:
            with path.open("rb") as file:
                is_own = file.read(len(MARKER)).decode(errors="replace") == MARKER
        except OSError as error:
            raise UserError("--html", f"names {path}, which can't be read ({error.strerror or error})") from error
        if not is_own:
            raise UserError("--html", f"names {path}, which exists and is no page of this command; name another file")


def _write_page(path: Path, text: str) -> None:
    """Write the page, so that no half-written one replaces an older one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError("--html", f"names {path}, which can't be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)
