"""Makes the rows of the study's three tasks: `train.jsonl`, `validation.jsonl` and `test.jsonl` for each.

The rows come from published files where a folder has them (`FOLDER/viggo/viggo-train.csv`, `viggo-valid.csv`;
`FOLDER/gsm8k/train.jsonl`; `FOLDER/sql/sql-context-train.jsonl`, `sql-context-dev.jsonl`), and are made otherwise.
`python -m examples.study` calls `write_rows`. To write the files alone:

    python -m examples.study.rows --output /tmp/rows
    python -m examples.study.rows --output /tmp/rows --data FOLDER
    python -m examples.study.rows --output /tmp/rows --data FOLDER --whole
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path

from examples.study import made_gsm8k, made_sql, made_viggo
from finetune_core.errors import UserError

SEED = 42
SETS = ("train", "validation", "test")
CALCULATION = re.compile(r"<<[^<>]*>>")
"""A note for a calculator in a solution of GSM8K, such as `<<48/2=24>>`, which the rows do without."""

Row = dict[str, str]


class Task(StrEnum):
    """The tasks of the study, by the names of their folders."""

    VIGGO = "viggo"
    GSM8K = "gsm8k"
    SQL = "sql"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows a task has in each set."""

    train: int | None
    """None: all rows that are there."""
    validation: int
    test: int


LIMITS: Mapping[Task, int] = {Task.VIGGO: 320, Task.GSM8K: 440, Task.SQL: 300}
"""Most characters of a row's prompt and completion together. With them no row has more than 210 tokens of SmolLM2."""
SIZES: Mapping[Task, Sizes] = {
    Task.VIGGO: Sizes(320, 48, 48),
    Task.GSM8K: Sizes(240, 48, 32),
    Task.SQL: Sizes(320, 48, 48),
}
"""The sizes with which the study takes at most 70 minutes on two cores. GSM8K has fewer rows, because they are longer:
134 tokens with the description of the task, where those of SQL have 102 and those of ViGGO 82."""
WHOLE: Mapping[Task, Sizes] = dict.fromkeys(Task, Sizes(None, 300, 300))
"""The sizes for `examples/study/llama2`: all training rows of the published files."""


def write_rows(
    output: Path,
    data: Path | None,
    sizes: Mapping[Task, Sizes] = SIZES,
    limits: Mapping[Task, int] | None = LIMITS,
) -> dict[Task, str]:
    """Write the three files of each task into ``output``/<task>. ``data`` is the folder with published files; without a
    folder, or where the folder lacks the files of a task, the rows are made. ``limits`` are the most characters of a
    row, None for rows of any length. Return for each task where its rows come
    from, as a phrase. With the same files and sizes, the rows are the same on every machine. Raises UserError where a
    published file can't be read, or has too few rows."""
    if data is not None and not data.is_dir():
        raise UserError("--data", f"must name a folder, and {data} is none")
    told = {}
    for task in Task:
        files = _published(task, data)
        if files is None:
            found, told[task] = _made(task, sizes[task], (limits or {}).get(task)), "made by examples/study"
        else:
            found, told[task] = (
                _chosen(task, files, sizes[task], (limits or {}).get(task)),
                f"chosen from {', '.join(map(str, files))}",
            )
        folder = output / task
        folder.mkdir(parents=True, exist_ok=True)
        for name in SETS:
            _replace(folder / f"{name}.jsonl", found[name])
    return told


def _replace(file: Path, rows: Iterable[Row]) -> None:
    """Write ``rows``, unless they stand in the file already: a file that is not written keeps its time."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if file.exists() and file.read_text(encoding="utf-8") == text:
        return
    partial = file.with_suffix(".unfinished")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _published(task: Task, data: Path | None) -> tuple[Path, ...] | None:
    """Return the published files of a task, the training file first, or None where they are not there. GSM8K has one
    file, from which all three sets are taken."""
    if data is None:
        return None
    names = {
        Task.VIGGO: ("viggo/viggo-train.csv", "viggo/viggo-valid.csv"),
        Task.GSM8K: ("gsm8k/train.jsonl",),
        Task.SQL: ("sql/sql-context-train.jsonl", "sql/sql-context-dev.jsonl"),
    }[task]
    files = tuple(data / name for name in names)
    return files if all(file.is_file() for file in files) else None


def _made(task: Task, sizes: Sizes, limit: int | None) -> dict[str, list[Row]]:
    maker = {Task.VIGGO: made_viggo.rows, Task.GSM8K: made_gsm8k.rows, Task.SQL: made_sql.rows}[task]
    # A row that is repeated, or longer than the limit, is left out. The makers can make many more rows than are asked.
    return _split(_short(task, _different(maker(random.Random(f"{SEED}-{task}")), set()), limit), sizes)


def _chosen(task: Task, files: Sequence[Path], sizes: Sizes, limit: int | None) -> dict[str, list[Row]]:
    """Return the rows of each set from published ``files``. A second file has the validation and test rows."""
    sources = [[_row(task, raw, files[0]) for raw in _records(file)] for file in files]
    chance = random.Random(f"{SEED}-{task}")
    for source in sources:
        chance.shuffle(source)
    # The held-out rows are taken first, so that none of them is a training row too.
    seen: set[str] = set()
    last = _short(task, _different(sources[-1], seen), limit)
    found = _split(last, Sizes(0 if len(files) > 1 else sizes.train, sizes.validation, sizes.test))
    if len(files) > 1:
        found["train"] = list(islice(_short(task, _different(sources[0], seen), limit), sizes.train))
    for name in SETS:
        if len(found[name]) < (getattr(sizes, name) or 1):
            raise UserError("--data", f"must name a folder with more rows of {task}: there are too few for {name}")
    return found


def _split(rows: Iterator[Row], sizes: Sizes) -> dict[str, list[Row]]:
    """Return the sets. The held-out rows come first, so that they do not depend on the number of training rows."""
    test, validation = list(islice(rows, sizes.test)), list(islice(rows, sizes.validation))
    return {"test": test, "validation": validation, "train": list(islice(rows, sizes.train))}


def _different(rows: Iterable[Row], seen: set[str]) -> Iterator[Row]:
    """Yield the rows whose prompt is not in ``seen``, and add their prompts."""
    for row in rows:
        prompt = next(iter(row.values()))
        if prompt not in seen:
            seen.add(prompt)
            yield row


def _short(task: Task, rows: Iterable[Row], limit: int | None) -> Iterator[Row]:
    prompt, completion = COLUMNS[task]
    return (row for row in rows if limit is None or len(row[prompt]) + len(row[completion]) <= limit)


COLUMNS: Mapping[Task, tuple[str, str]] = {
    Task.VIGGO: ("text", "meaning"),
    Task.GSM8K: ("question", "answer"),
    Task.SQL: ("question", "query"),
}
"""The columns of prompt and completion, as in the job files."""


def _records(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            if file.suffix == ".csv":
                return list(csv.DictReader(lines))
            return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError("--data", f"names {file}, which can't be read ({error})") from error


def _row(task: Task, raw: Mapping[str, str], file: Path) -> Row:
    """Return a published row in the columns of the job files."""
    try:
        if task is Task.VIGGO:
            return {"text": raw["ref"], "meaning": raw["mr"]}
        if task is Task.GSM8K:
            return {"question": raw["question"], "answer": CALCULATION.sub("", raw["answer"])}
        return {
            "question": f"{raw['question']} {raw['context']}",
            "context": raw["context"],
            "query": raw["answer"],
        }
    except (KeyError, TypeError) as error:
        raise UserError("--data", f"names {file.parent}, in which a row lacks the column {error}") from error


def digest_of(folder: Path) -> str:
    """Return a digest of all rows below ``folder``, the same for the same rows."""
    found = hashlib.sha256()
    for task in Task:
        for name in SETS:
            found.update((folder / task / f"{name}.jsonl").read_bytes())
    return found.hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, and say where the rows of each task come from."""
    parser = argparse.ArgumentParser(prog="python -m examples.study.rows", description="Make the rows of the study.")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where the folders of the tasks go"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder with the published files")
    parser.add_argument("--whole", action="store_true", help="all published training rows, for examples/study/llama2")
    options = parser.parse_args(arguments)
    if options.whole and options.data is None:
        parser.error("--whole needs --data: made rows have no end")
    sizes = WHOLE if options.whole else SIZES
    for task, source in write_rows(options.output, options.data, sizes, None if options.whole else LIMITS).items():
        print(f"{task}: {source}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
