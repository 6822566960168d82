"""`make try`: tunes a small model on this machine, shows its answers before and after, and writes a page about the run.

The job is examples/tryout/try.yaml, with rows from examples/trails. `finetune run` trains, and `finetune compare` makes
the page. Everything that is written lies in out/try. A second call goes on where the first one was interrupted, or
shows the finished run again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.table import Table
from rich.text import Text

from examples.demo.base_model import NAME, base_model
from examples.trails.generate import generate, write
from finetune_cli.compare.compared_run import read_run
from finetune_cli.compare.folders import LocalFolder
from finetune_cli.terminal import SafeConsole, complain, say
from finetune_core.layout import ARTIFACT_POINTER
from tests.cluster import ClusterError

JOB = Path(__file__).with_name("try.yaml")
FOLDER = Path("out/try")
STORE = FOLDER / "runs"
PAGE = FOLDER / "report.html"
SEED = 7
TRAIN, VALIDATION, HELDOUT = 800, 16, 24
"""Numbers of rows."""
SHOWN = 3
INTERRUPTED = 130


def main() -> int:
    """Do everything, and return the exit code of the command that failed, or 0."""
    try:
        volumes = prepare()
        folders = [f"--volume={name}={folder}" for name, folder in volumes.items()]
        ended = finetune("run", os.path.relpath(JOB), f"--store={STORE}", *folders)
        if ended != 0:
            return ended
        folder = run_folder()
        ended = finetune("compare", f"./{folder}", f"--html={PAGE}")
        if ended != 0:
            return ended
        show(folder)
    except ClusterError as error:
        complain(f"make try: {error}")
        return 1
    except KeyboardInterrupt:
        complain("make try: interrupted; `make try` goes on from the last checkpoint")
        return INTERRUPTED
    return 0


def prepare() -> dict[str, Path]:
    """Return the folders of the base model and of the rows by the names of the job's volumes. Make what is missing."""
    models, rows = FOLDER / "models", FOLDER / "rows"
    for folder in (models, rows):
        folder.mkdir(parents=True, exist_ok=True)
    if not (models / NAME).exists():
        made = models / f".{NAME}"
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(base_model(), made)
        made.rename(models / NAME)
    write(generate(SEED, train=TRAIN, validation=VALIDATION, heldout=HELDOUT), rows)
    return {"models": models, "rows": rows}


def finetune(*arguments: str) -> int:
    """Run a command of the command line with the terminal of this program, and return its exit code."""
    say(f"$ finetune {shlex.join(arguments)}")
    # Ctrl-C reaches the command too, which saves a checkpoint. Its end is awaited, so that nothing runs on.
    with subprocess.Popen([sys.executable, "-m", "finetune_cli", *arguments]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def run_folder() -> Path:
    """Return the folder of all runs of the job."""
    (pointer,) = STORE.rglob(ARTIFACT_POINTER)
    return pointer.parent


def show(folder: Path) -> None:
    """Print some answers before and after, and what can be done next."""
    scores = read_run(LocalFolder(folder), "try").scores
    assert scores is not None
    table = Table("sentence", "base model", "tuned model", title="answers to sentences that were not trained")
    for row in scores.answers[:SHOWN]:
        answers = [answer.text if answer is not None else "" for answer in (row.base, row.tuned)]
        table.add_row(*map(Text, [dict(row.columns)["sentence"], *answers]))
    SafeConsole().print(table)
    artifact = json.loads((folder / ARTIFACT_POINTER).read_bytes())["folder"]
    say(f"adapter: {folder / artifact}")
    say(f"page:    {PAGE}; open it in a browser")
    say("next:    docs/run.md has your own model and rows; docs/README.md lists all pages")


if __name__ == "__main__":
    sys.exit(main())
