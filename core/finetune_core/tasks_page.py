"""Writes docs/tasks.md, the page about tasks and their scores, from the declarations in `tasks.py`.

`make docs` runs this program. `tests/core/test_tasks_page.py` fails where the committed page differs from the generated
page.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

from finetune_core.task_declaration import SCORE_LIMIT, SCORE_NAME_LENGTH, Task
from finetune_core.tasks import TASKS

TASKS_PAGE = "tasks.md"

_INTRODUCTION = """\
# Tasks: how generated answers are graded

<!-- Generated from core/finetune_core/tasks.py by `make docs`; do not edit. -->

With `dataset.task` the trainer generates an answer to the prompt of every row of the evaluation set, and a grader gives
the answer scores. The evaluation set is `dataset.test`, else `dataset.validation`. Base model and tuned model answer
the same rows, and `status.evaluation` shows both. Without `dataset.task` only perplexity is measured. A task without an
evaluation set is refused, and so is a task without `format.promptCompletion`: answers in conversations are not graded.

- A grader reads the answer and the columns of its row that are listed here. The column with the right answer is the
  completion of `format.promptCompletion`, any other column has the name that is listed here. `dataset.task.fields`
  names other columns of your rows: `task: {name: GSM8K, fields: {answer: solution}}`. A column that the file does not
  have is found before a GPU is asked for. `evaluation.generation.maxExamples` bounds the number of answers.
- Where `format.promptCompletion.completion` puts the completion together from several columns or other text, the right
  answer is that text, as a generated answer of the same tokens would be read: without `completionSuffix`, control
  tokens and what follows a token that ends an answer.
- Every score has a value for each answer, and the reported value is their mean. Where an answer is right or wrong, the
  mean is the *share of right answers*. Own graders may report the median, the least or the greatest value instead.
- Of the base model's answer only the first line counts where the task says that right answers are one line, because a
  base model often goes on with another example. `dataset.task.oneLine` says so for your rows.
- The **main** score is `taskScore` in the status. `evaluation.bestBy: TaskScore` chooses checkpoints by it.
- A row that a grader can't use, for example because its reference answer can't be parsed, is left out. The answer to
  such a row counts neither as right nor as wrong. `graded` in the status is the number of answers that counted,
  `notGraded` the number of the others, `ungraded` says why, and a notice says so too. A job that needs a score of the
  task, for `evaluation.bestBy` or `evaluation.require`, ends with exit code 64 before its first step where no row can
  be graded.
- `evaluation.require` makes a score a condition of success: see [pipelines.md](pipelines.md).
- `evaluation/<run>.json` in the bucket has the first answers of both models with their scores and problems.
"""

_RECIPE = f"""\
## Own graders, without a change of this repository

A Python package in your trainer image can bring graders along, as entry points of the group `finetune_trainer.graders`.
The job names one: `task: {{entryPoint: overlap, fields: {{reference: solution}}, arguments: {{enough: "0.6"}}}}`.

The folder of the package, here my_graders, holds two files side by side: my_graders.py and pyproject.toml.

```python
# the module my_graders
from finetune_core.task_declaration import Column, Score, Task, Unit
from finetune_trainer.evaluation.graders import OwnGrader

TASK = Task(
    name="overlap",
    columns=(Column(name="reference", is_completion=True),),
    scores=(Score(name="overlap", unit=Unit.PARTIAL_CREDIT), Score(name="enough")),
    main="overlap",
)


def grade(answer, row, arguments):
    right, said = set(row["reference"].split()), set(answer.split())
    if not right:
        return None  # the row can't be used
    share = len(right & said) / len(right)
    return {{"overlap": share, "enough": share >= float(arguments.get("enough", 0.5))}}


overlap = OwnGrader(task=TASK, grade=grade)
```

```toml
# pyproject.toml
[project]
name = "my-graders"
version = "1.0"

[project.entry-points."finetune_trainer.graders"]
overlap = "my_graders:overlap"
```

```dockerfile
FROM TRAINER_IMAGE
USER root
COPY my_graders /tmp/my_graders
RUN python3 -m venv /tmp/pip \\
 && /tmp/pip/bin/pip --python /opt/venv/bin/python install --no-deps --no-build-isolation /tmp/my_graders \\
 && rm -r /tmp/pip /tmp/my_graders
USER 65532:65532
```

The trainer runs in `/opt/venv`. That environment has no pip of its own, but setuptools, so that the package is built
without an index of packages. What else the grader imports must be installed there too.

Set `podTemplate.image` to that image. The check before the first attempt loads the grader: a name that the image does
not have is refused with the list of those that it has, and so are a name that two packages use, columns that the data
lacks, and arguments that the optional function `check` of `OwnGrader` refuses with a ValueError. A name of this page
can't be used. The module must not import torch, because the check runs without it. A score may be any finite number
(`unit=Unit.VALUE`), higher is better, and `aggregation` says what is reported over all answers. Whatever the function
raises, or returns that the declaration does not allow, leaves the row out and is counted with its reason; no exception
of it ends a training. A call that takes longer than 30 s leaves its row and all later ones out. `grade` is called on
every rank, for the answers of that rank, with copies of the row's columns and of the arguments.

## Add a task

Copy the task that is nearest to yours. [GSM8K](#gsm8k) is the smallest one with answers that are right or wrong. For
a share between 0 and 1 copy the score `found` of [Contains](#contains) or `keys` of [JSON](#json), and return
`Grade.of(TASK, {{"f1": 0.5}})`. [extending.md](extending.md#1-a-grader) has the complete list of files.

1. `core/finetune_core/tasks.py`: declare the task and add it to `TASKS`. The declaration has the name, the columns that
   the grader reads, an example of each column, an answer that is right for these examples, 1 to {SCORE_LIMIT} scores
   with names of at most {SCORE_NAME_LENGTH} characters, and which of them is `main`. The grader gives True or False for
   a score, or a number from 0 to 1 where the declaration says `unit=Unit.PARTIAL_CREDIT`.
2. `trainer_image/finetune_trainer/evaluation/graders/<task>.py`: write `grade(answer, row) -> Grade`, a pure function
   without torch. It returns `Grade.of(TASK, {{score: value}})`, with a `problem` if the answer can't be read, or
   `Grade.left_out(problem)` if the row can't be used. A task with arguments has a function that makes the grader from
   `TaskSpec` (`regex_grader`), and its fields stand in `core/finetune_core/api/task.py`. It never raises because of the
   answer or the row: a model may write any text, and a data file may hold any value, so leave a row out whose column is
   null or no text.
3. `trainer_image/finetune_trainer/evaluation/graders/__init__.py`: add the grader to `GRADERS`.
4. `tests/trainer/test_tasks_<task>.py`: test the grader with right answers, with each way of being wrong, and with rows
   that can't be used. `tests/trainer/test_tasks.py` checks by itself that the task has a grader, that the grader reads
   the declared columns only, that the example answer gets every score, and that a row without a value is left out. Add
   answers that look right and are wrong to `test_trap_25_holes_of_the_graders` there.
5. `make crds docs`: generate `crds/finetune.dev_finetunejobs.yaml`, the chart's copy of the CRD, `docs/api.md` and this
   page. `tests/core/test_crd.py`, `tests/core/test_reference.py`, `tests/core/test_tasks_page.py` and
   `tests/chart/test_chart.py` fail until the committed files are the generated ones.
6. `CHANGELOG.md`: say what can be graded now.

`finetune watch`, the status, the reports and `evaluation.bestBy` need no change, because they use the declared names.
Run `make unit ROOM=graders` while you write, and in the end
`.venv/bin/python -m pytest tests/core tests/chart tests/trainer/test_tasks*.py`.
"""


def tasks_page() -> str:
    """Return the text of docs/tasks.md: an introduction, a section for each task, and how to add a grader or a task."""
    parts = [_INTRODUCTION]
    for task in TASKS.values():
        parts += _section(task)
    return "\n".join([*parts, _RECIPE])


def _section(task: Task) -> Iterator[str]:
    """Yield the lines of the section about ``task``."""
    yield f"## {task.name}\n"
    yield textwrap.fill(task.description, width=120) + "\n"
    yield "| column | default | holds |"
    yield "|---|---|---|"
    for column in task.columns:
        default = "the completion" if column.is_completion else "the column of this name"
        may_lack = "; may be absent" if column.optional else ""
        yield f"| `{column.name}` | {default}{may_lack} | {column.meaning} |"
    yield "\n| score | | reported value |"
    yield "|---|---|---|"
    for score in task.scores:
        name = f"`{score.name}` (main)" if score.name == task.main else f"`{score.name}`"
        yield f"| {name} | {score.meaning} | {score.reported} |"
    row = {column.name: column.example for column in task.columns}
    yield "\nA row, and an answer that gets every score in full:\n"
    yield "```"
    if task.example_arguments:
        yield f"task    {json.dumps({'name': task.name, **task.example_arguments}, ensure_ascii=False)}"
    yield f"row     {json.dumps(row, ensure_ascii=False)}"
    yield f"answer  {json.dumps(task.example_answer, ensure_ascii=False)}"
    yield "```\n"


def main() -> None:
    """Write the page into the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description="Write the page about the tasks of FineTuneJob.",
        epilog="example: python -m finetune_core.tasks_page docs",
    )
    parser.add_argument("folder", type=Path, help=f"folder for {TASKS_PAGE}")
    folder: Path = parser.parse_args().folder
    (folder / TASKS_PAGE).write_text(tasks_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
