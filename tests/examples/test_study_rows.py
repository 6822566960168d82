"""The rows of the study: made rows are rows that the graders can use, published rows are converted, and no held-out row
is a training row."""

from __future__ import annotations

import csv
import json
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from examples.study import made_gsm8k, made_sql, made_viggo
from examples.study.rows import COLUMNS, LIMITS, SETS, SIZES, Sizes, Task, digest_of, write_rows
from finetune_core.errors import UserError
from finetune_trainer.evaluation.graders import gsm8k, sql, viggo

SMALL = dict.fromkeys(Task, Sizes(6, 3, 2))


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_made_rows_have_the_asked_sizes_and_are_the_same_each_time(tmp_path: Path) -> None:
    assert set(write_rows(tmp_path / "a", None).values()) == {"made by examples/study"}
    write_rows(tmp_path / "b", None)
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b")
    for task in Task:
        prompt, completion = COLUMNS[task]
        prompts = []
        for name in SETS:
            rows = read(tmp_path / "a" / task / f"{name}.jsonl")
            assert len(rows) == getattr(SIZES[task], name)
            assert all(len(row[prompt]) + len(row[completion]) <= LIMITS[task] for row in rows)
            prompts += [row[prompt] for row in rows]
        assert len(set(prompts)) == len(prompts)


def test_the_grader_reads_each_made_meaning() -> None:
    for row in islice(made_viggo.rows(Random(1)), 300):
        perfect = viggo.grade(row["meaning"], {"mr": row["meaning"]})
        assert (perfect.problem, set(map(float, perfect.scores.values()))) == ("", {1.0}), row
    used = {row["meaning"].partition("(")[0] for row in islice(made_viggo.rows(Random(1)), 300)}
    assert used == set(viggo.FUNCTIONS) - {"request_explanation"}


def test_the_attributes_of_a_made_meaning_are_in_the_order_of_the_data_set() -> None:
    for row in islice(made_viggo.rows(Random(2)), 300):
        names = [part.partition("[")[0] for part in row["meaning"].partition("(")[2].split("], ")]
        assert names == sorted(names, key=viggo.ATTRIBUTES.index), row


def test_the_steps_of_a_made_solution_are_right_and_end_in_the_number() -> None:
    for row in islice(made_gsm8k.rows(Random(1)), 300):
        *steps, last = row["answer"].splitlines()
        assert gsm8k.grade(row["answer"], {"answer": row["answer"]}).problem == ""
        results = []
        for step in steps:
            left, _, right = step.partition(" = ")
            numbers = [word for word in left.split() if word.isdigit() or word in "*+-/"]
            # The calculation is the end of the left side: everything before it is words.
            calculation = " ".join(numbers[-3:])
            results.append(int("".join(filter(str.isdigit, right.split()[0]))))
            assert eval(calculation) == results[-1], step  # noqa: S307  only digits and the four operators
        assert last == f"#### {results[-1]}"


def test_the_queries_of_made_rows_return_rows_and_are_right() -> None:
    try:
        for row in islice(made_sql.rows(Random(1)), 120):
            grade = sql.grade(row["query"], {"context": row["context"], "answer": row["query"]})
            assert (grade.problem, float(grade.scores["execution"])) == ("", 1.0), row
            assert row["question"].endswith(row["context"])
    finally:
        sql.close()


def publish(folder: Path) -> Path:
    """Write rows in the forms of the published files."""
    for name in ("viggo", "gsm8k", "sql"):
        (folder / name).mkdir(parents=True)
    for file, count in (("viggo-train.csv", 9), ("viggo-valid.csv", 6)):
        with (folder / "viggo" / file).open("w", newline="") as target:
            writer = csv.DictWriter(target, ["mr", "ref"])
            writer.writeheader()
            # Two rows of the held-out file stand in the training file too.
            writer.writerows({"mr": f"inform(name[G{n}])", "ref": f"A sentence,\n{n}."} for n in range(count))
    notes = [
        {"question": f"How many are {n} and {n}?", "answer": f"{n}+{n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n in range(12)
    ]
    (folder / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in notes))
    for file, first in (("sql-context-train.jsonl", 0), ("sql-context-dev.jsonl", 50)):
        rows = [
            {
                "question": f"Who is {n}?",
                "context": "CREATE TABLE t (a VARCHAR)",
                "answer": f"SELECT a FROM t LIMIT {n}",  # noqa: S608
            }
            for n in range(first, first + 9)
        ]
        (folder / "sql" / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_published_rows_get_the_columns_of_the_job_files(tmp_path: Path) -> None:
    sizes = SMALL | {Task.VIGGO: Sizes(3, 3, 2)}
    told = write_rows(tmp_path / "rows", publish(tmp_path / "data"), sizes)
    assert all(source.startswith("chosen from") for source in told.values())
    for task in Task:
        rows = [read(tmp_path / "rows" / task / f"{name}.jsonl") for name in SETS]
        assert [len(found) for found in rows] == [sizes[task].train, 3, 2]
        prompts = [row[COLUMNS[task][0]] for found in rows for row in found]
        assert len(set(prompts)) == len(prompts), "a held-out row is a training row"
    solution = read(tmp_path / "rows" / "gsm8k" / "test.jsonl")[0]
    assert "<<" not in solution["answer"]
    question = read(tmp_path / "rows" / "sql" / "train.jsonl")[0]
    assert question.keys() == {"question", "context", "query"}
    assert question["question"].endswith("CREATE TABLE t (a VARCHAR)")
    assert {row["query"].split()[-1] for row in read(tmp_path / "rows" / "sql" / "test.jsonl")} <= set(
        map(str, range(50, 59))
    )


def test_tasks_without_published_files_get_made_rows(tmp_path: Path) -> None:
    data = publish(tmp_path / "data")
    (data / "viggo" / "viggo-valid.csv").unlink()
    told = write_rows(tmp_path / "rows", data, SMALL)
    assert {task for task, source in told.items() if source == "made by examples/study"} == {Task.VIGGO}


def test_too_few_or_broken_published_rows_are_told(tmp_path: Path) -> None:
    data = publish(tmp_path / "data")
    with pytest.raises(UserError, match="more rows of gsm8k: there are too few for train"):
        write_rows(tmp_path / "rows", data, SMALL | {Task.VIGGO: Sizes(3, 3, 2), Task.GSM8K: Sizes(99, 3, 2)})
    (data / "sql" / "sql-context-dev.jsonl").write_text('{"question": "no query"}\n')
    with pytest.raises(UserError, match="sql, in which a row lacks the column 'context'"):
        write_rows(tmp_path / "rows", data, SMALL | {Task.VIGGO: Sizes(3, 3, 2)})


def test_a_file_with_the_same_rows_is_not_written_again(tmp_path: Path) -> None:
    write_rows(tmp_path, None, SMALL)
    file = tmp_path / "sql" / "train.jsonl"
    before = file.stat().st_mtime_ns
    write_rows(tmp_path, None, SMALL)
    assert file.stat().st_mtime_ns == before
    write_rows(tmp_path, None, SMALL | {Task.SQL: Sizes(7, 3, 2)})
    assert len(read(file)) == 7
