"""`make study`: runs the jobs of the study one after the other on this machine, and compares them.

Everything lies in one folder (default: out/study): the model, the rows, the runs (`store/`), the comparison
(`study.html`), and `study.json`, which says where the rows come from and how long the jobs took. Ctrl-C saves the job
that runs, and the same command goes on from there: jobs with an artifact are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from examples.demo.base_model import base_model
from examples.study.rows import digest_of, write_rows
from examples.study.study_jobs import (
    CLAIM,
    StudyJob,
    chosen,
    document_of,
    is_finished,
    minutes_of,
    run_folder,
)
from finetune_cli.terminal import say
from finetune_core.errors import UserError
from tests.cluster import ClusterError

INTERRUPTED = 130
"""Exit status of `finetune run` after Ctrl-C, and of this program."""
TERMINATED = 143
"""Exit status of `finetune run` after SIGTERM."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
FINETUNE = [sys.executable, "-m", "finetune_cli"]
HELP = """\
examples:
  python -m examples.study
  python -m examples.study --data FOLDER              published rows of ViGGO, GSM8K and SQL
  python -m examples.study --only sql-lora,sql-full   a part of the study
  python -m examples.study --steps 6 --output /tmp/try-study

exit code: 0 all jobs are finished and compared, 1 a job failed, 2 the study could not be made here, 130 interrupted
"""


@dataclass(frozen=True, slots=True)
class Study:
    """What is run, and where."""

    folder: Path
    jobs: Sequence[StudyJob]
    data: Path | None
    steps: int | None
    """Optimizer steps of each job, for a trial. None: as the job files say."""
    model: Path | None
    """Folder of the base model. None: SmolLM2-135M."""

    @property
    def store(self) -> Path:
        """The folder in place of an object store."""
        return self.folder / "store"

    @property
    def model_name(self) -> str:
        """What the record of the study says of the base model."""
        return "SmolLM2-135M-Instruct" if self.model is None else str(self.model.absolute())

    def documents(self) -> dict[str, dict[str, Any]]:
        """Return each job as it runs, by name."""
        return {job.name: document_of(job, self.steps) for job in self.jobs}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.study",
        description="LoRA or every parameter? The jobs of the study in small, one after the other, and compared.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("out/study"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="published rows (default: rows that are made)")
    parser.add_argument("--only", metavar="NAME,...", help="some of the jobs")
    parser.add_argument("--steps", type=int, metavar="N", help="so many steps a job, to try the study out")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="another base model (default: SmolLM2-135M)")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be at least 1")
    try:
        jobs = chosen(options.only.split(",") if options.only is not None else None)
        return run(Study(options.output, jobs, options.data, options.steps, options.model))
    except (UserError, ClusterError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def run(study: Study) -> int:
    """Prepare the study, run the jobs that are not finished, compare all, and return the exit code."""
    documents = study.documents()
    say(outlook(study, documents))
    prepare(study)
    failed = []
    for job in study.jobs:
        if is_finished(run_folder(study.store, documents[job.name])):
            continue
        code = run_job(study, job, documents[job.name])
        if code in (INTERRUPTED, TERMINATED):
            say("interrupted; the same command goes on from here")
            return INTERRUPTED
        if code != 0:
            failed.append(job.name)
        say(outlook(study, documents))
    code = compare(study, documents)
    if failed:
        say(f"failed: {', '.join(failed)}; the same command tries again")
    return 1 if failed else code


def outlook(study: Study, documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one line: how long the study takes on two idle cores, what is finished and what is left."""
    left = [job for job in study.jobs if not is_finished(run_folder(study.store, documents[job.name]))]
    whole = f"study: {len(study.jobs)} job{'s' if len(study.jobs) > 1 else ''}"
    if study.steps is not None:
        return f"{whole} of {study.steps} steps, a trial; {len(left)} left"
    minutes = f"about {minutes_of(study.jobs):.0f} min on two idle cores"
    if not left:
        return f"{whole}, {minutes}; all are finished"
    return f"{whole}, {minutes}; {len(left)} left, about {minutes_of(left):.0f} min ({left[0].name} is next)"


def prepare(study: Study) -> None:
    """Put model and rows into the folder of the study. Raises UserError where the folder has the runs of another study:
    its runs could not be compared with new ones."""
    study.folder.mkdir(parents=True, exist_ok=True)
    model = study.folder / "model"
    if not model.exists():
        _copy(study.model if study.model is not None else base_model(), model)
    rows = study.folder / "rows"
    record = study.folder / "study.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    sources = write_rows(rows if known is None else study.folder / "rows.new", study.data)
    if known is None:
        about = {"steps": study.steps, "model": study.model_name, "rows": digest_of(rows)}
        _write(record, about | {"rowsFrom": {task.value: source for task, source in sources.items()}, "jobs": {}})
        return
    fresh = study.folder / "rows.new"
    same = (known["rows"], known["steps"], known["model"]) == (digest_of(fresh), study.steps, study.model_name)
    shutil.rmtree(fresh)
    if not same:
        raise UserError("--output", f"must name a new folder: {study.folder} has a study of other rows, steps or model")


def _copy(source: Path, target: Path) -> None:
    """Copy the folder of a model; where it can be, its files become a second name of the same file. No link is made,
    because the trainer refuses links that lead out of a volume."""
    partial = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(partial, ignore_errors=True)

    def link(first: str, second: str) -> None:
        try:
            os.link(first, second)
        except OSError:
            shutil.copy2(first, second)

    shutil.copytree(source, partial, copy_function=link)
    partial.rename(target)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    partial = file.with_suffix(".unfinished")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


def run_job(study: Study, job: StudyJob, document: Mapping[str, Any]) -> int:
    """Run `finetune run` for ``job``, and return its exit status."""
    file = job.file
    if study.steps is not None:
        # PyYAML writes the text 5e-6 without quotes, and other readers of YAML take it for a number.
        file = study.folder / "jobs" / f"{job.name}.json"
        file.parent.mkdir(exist_ok=True)
        _write(file, document)
    command = ["run", str(file), "--volume", f"{CLAIM}={study.folder}", "--store", str(study.store)]
    begun = time.monotonic()
    code = _finetune(command)
    record = study.folder / "study.json"
    known = json.loads(record.read_text(encoding="utf-8"))
    # A job that was interrupted has several parts.
    parts = known["jobs"].setdefault(job.name, [])
    parts.append({
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        "seconds": round(time.monotonic() - begun),
        "exitCode": code,
        "cores": os.cpu_count(),
        "loadAverage": [round(value, 1) for value in os.getloadavg()],
        "system": platform.platform(),
    })  # fmt: skip
    _write(record, known)
    return code


def _finetune(arguments: Sequence[str]) -> int:
    """Run the command line `finetune` with ``arguments``, show what it shows, and return its exit status. Where this
    program was told to stop, return INTERRUPTED. A Ctrl-C or SIGTERM reaches the command once, and this program waits
    until the command has ended."""
    say(f"\n$ finetune {shlex.join(arguments)}")
    with subprocess.Popen([*FINETUNE, *arguments], start_new_session=True) as process:
        told: list[int] = []

        def pass_on(number: int, frame: FrameType | None) -> None:
            told.append(number)
            process.send_signal(signal.SIGINT)

        former = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
        try:
            code = process.wait()
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
    # The command has an exit status of its own where the signal came before it could catch one.
    return INTERRUPTED if told else code


def compare(study: Study, documents: Mapping[str, Mapping[str, Any]]) -> int:
    """Compare all jobs that have begun, and return the exit status of `finetune compare`."""
    folders = [run_folder(study.store, document) for document in documents.values()]
    found = [f"{folder}/" for folder in folders if folder is not None]
    if not found:
        say("no job has a run that could be compared")
        return 1
    return _finetune(["compare", *found, "--html", str(study.folder / "study.html")])


if __name__ == "__main__":
    sys.exit(main())
