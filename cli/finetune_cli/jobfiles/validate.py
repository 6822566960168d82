"""`finetune validate`: reports the problems in job files for which the API server, the operator or the check before the
first attempt would refuse a job. No cluster is needed.

The input is YAML or JSON files, or folders of them. The output has one line for each problem, `<file>:<line>: <path of
the field>: <what the field must be>`, and one line for each file without problems. With `--output json` the output is
JSON for programs.
`finetune_core.validation` checks the jobs against the schema and the rules.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune_cli.jobfiles.yaml_lines import Document, load
from finetune_cli.terminal import complain, say, say_json
from finetune_core.api.job import API_VERSION, GROUP, KIND
from finetune_core.validation.problems import FieldPath, Problem, Refusal, dotted
from finetune_core.validation.validate_job import is_job, validate_job

STDIN = "-"
"""File name that stands for standard input."""
SIZE_LIMIT = 32 << 20
"""Largest size of a file in bytes. A file may be larger than the 3 MB that the API server accepts in one request,
because a file may contain many jobs."""


ENDINGS = (".json", ".yaml", ".yml")
"""How the names of those files of a folder end that are read, as in `kubectl apply -f FOLDER`."""

_REFUSED_LATER = {
    Refusal.OPERATOR: " (accepted by the API server, refused by the operator)",
    Refusal.CHECK: " (accepted by the API server, refused by the check before the first attempt)",
}


@dataclass(frozen=True, slots=True)
class LocatedProblem:
    """A problem of a job or of a file, with the name of the file, the line and the name of the job."""

    file: str
    line: int
    job: str
    path: str
    message: str
    refused_by: Refusal

    def __str__(self) -> str:
        """Return the problem as a line for people."""
        path = f"{self.path}: " if self.path else ""
        return f"{self.file}:{self.line}: {path}{self.message}{_REFUSED_LATER.get(self.refused_by, '')}"


@dataclass(frozen=True, slots=True)
class FileReport:
    """The names of the jobs in one file, the problems of the file and its jobs, and the jobs themselves."""

    file: str
    jobs: list[str]
    problems: list[LocatedProblem]
    values: list[dict[str, Any]] = field(default_factory=list)
    """The jobs as documents, in the order of ``jobs``. A job may have problems."""


def validate_files(options: argparse.Namespace) -> int:
    """Check the files that the command line names. Return 0 when no file has a problem, else 1."""
    checked = [report for name in options.files for report in check_path(name)]
    if options.output == "json":
        say_json(json_report(checked))
    else:
        print_report(checked)
    return 1 if any(file.problems for file in checked) else 0


def json_report(checked: Sequence[FileReport]) -> dict[str, Any]:
    """Return the reports on all files as a JSON object for programs."""
    located = [problem for file in checked for problem in file.problems]
    problems = [
        {("refusedBy" if key == "refused_by" else key): value for key, value in asdict(problem).items()}
        for problem in located
    ]
    return {
        "valid": not located,
        "files": len(checked),
        "jobs": sum(len(file.jobs) for file in checked),
        "problems": problems,
    }


def print_report(checked: Sequence[FileReport]) -> None:
    """Print the reports on all files for people."""
    for file in checked:
        for problem in file.problems:
            say(str(problem))
        if not file.problems:
            names = ", ".join(file.jobs)
            say(f"{file.file}: {names} valid" if names else f"{file.file}: no {KIND} in it")
    count = sum(len(file.problems) for file in checked)
    if count:
        complain(f"{count} problem{'s' if count > 1 else ''}")


def check_path(name: str) -> list[FileReport]:
    """Check the file ``name``, or the files in the folder ``name``. As in `kubectl apply -f`, the files of a folder are
    those with one of `ENDINGS`, by name. Folders in the folder are not read, and neither are pipes, which may never
    end."""
    folder = Path(name)
    try:
        # The empty name, for example of a variable that is not set, is not the current folder.
        if name in ("", STDIN) or not folder.is_dir():
            return [check_file(name)]
        ending = [file for file in folder.iterdir() if file.name.endswith(ENDINGS)]
        # A link to nothing does not exist, and is reported.
        files = sorted(str(file) for file in ending if file.is_file() or not file.exists())
    except OSError as error:
        return [_unreadable(name, f"can't be read: {error.strerror or error}")]
    if not files:
        return [_unreadable(name, f"must hold a file that ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")]
    return [check_file(file) for file in files]


def check_file(name: str, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda job: job) -> FileReport:
    """Check the file ``name``, or the standard input where ``name`` is `-`. Return the jobs in the file with their
    names, and every problem of the file and the jobs. Objects that are not meant as FineTuneJobs are ignored. Each job
    is checked as ``change`` returns it."""
    try:
        raw = sys.stdin.buffer.read(SIZE_LIMIT + 1) if name == STDIN else _read(Path(name))
        if len(raw) > SIZE_LIMIT:
            return _unreadable(name, f"must be at most {SIZE_LIMIT >> 20} MB")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        return _unreadable(name, f"can't be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        return _unreadable(name, f"must be UTF-8: {error.reason}", raw.count(b"\n", 0, error.start) + 1)
    documents, broken = load(text)
    problems = [LocatedProblem(name, problem.line, "", "", problem.message, Refusal.SERVER) for problem in broken]
    jobs: list[str] = []
    values: list[dict[str, Any]] = []
    for document in documents:
        for prefix, written in _jobs(document.value):
            job = change(written)
            title = _name(job)
            jobs.append(title)
            values.append(job)
            problems += _yaml_problems(name, document, title, prefix)
            problems += [_locate(name, document, title, prefix, problem) for problem in _job_problems(job)]
    problems.sort(key=lambda problem: problem.line)
    return FileReport(name, jobs, problems, values)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(SIZE_LIMIT + 1)


def _unreadable(name: str, message: str, line: int = 1) -> FileReport:
    return FileReport(name, [], [LocatedProblem(name, line, "", "", message, Refusal.SERVER)])


def _jobs(value: Any) -> Iterator[tuple[FieldPath, dict[str, Any]]]:
    """Yield each job in ``value``, a YAML document, and the path of the job in the document. The document is a single
    object or a List of objects."""
    if not isinstance(value, dict):
        return
    if value.get("kind") == "List" and isinstance(value.get("items"), list):
        for index, item in enumerate(value["items"]):
            if isinstance(item, dict) and _is_meant_as_job(item):
                yield ("items", index), item
    elif _is_meant_as_job(value):
        yield (), value


def _is_meant_as_job(document: dict[str, Any]) -> bool:
    """Return whether ``document`` is probably meant as a FineTuneJob, because its kind or its API group is that of a
    FineTuneJob. Upper and lower case make no difference."""
    kind, group = str(document.get("kind", "")), str(document.get("apiVersion", "")).split("/", maxsplit=1)[0]
    return kind.casefold() == KIND.casefold() or group.casefold() == GROUP


def _job_problems(job: dict[str, Any]) -> list[Problem]:
    if is_job(job):
        return validate_job(job).problems
    fields = (("apiVersion", API_VERSION), ("kind", KIND))
    return [Problem((field,), f"must be {must}") for field, must in fields if job.get(field) != must]


def _yaml_problems(file: str, document: Document, job: str, prefix: FieldPath) -> Iterator[LocatedProblem]:
    for problem in document.problems:
        if problem.path[: len(prefix)] == prefix:
            path = dotted(problem.path[len(prefix) :]) if len(problem.path) > len(prefix) else ""
            yield LocatedProblem(file, problem.line, job, path, problem.message, Refusal.SERVER)


def _locate(file: str, document: Document, job: str, prefix: FieldPath, problem: Problem) -> LocatedProblem:
    line = document.line_of((*prefix, *problem.path))
    return LocatedProblem(file, line, job, dotted(problem.path), problem.message, problem.refused_by)


def _name(job: dict[str, Any]) -> str:
    metadata = job.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return name if isinstance(name, str) else ""
