"""`dataset.task`: what grades generated answers, which columns of the rows the grader reads, and the grader's
arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ENTRIES, SET, UNIQUE, ApiModel, DecimalString, cel, exactly_one_of, join
from finetune_core.task_declaration import COLUMN_LIMIT
from finetune_core.tasks import TASKS, TaskName, task_name_text, tasks_with

Ignorable = Literal["Case", "WhiteSpace", "Punctuation", "UnicodeForm"]
"""A kind of difference between an answer and the right text that a grader can ignore."""

PATTERN_LENGTH = 1024
"""Largest number of characters of `dataset.task.pattern`."""
ARGUMENT_LIMIT = 16
"""Largest number of entries of `dataset.task.arguments`."""

ENTRY_POINT_PATTERN = "^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
"""Regular expression for the name of an entry point."""

FIELDS_RULE_BEGINNING = "`fields` must only have the keys"
"""Beginning of the messages of the rules about the keys of `dataset.task.fields`."""

_ARGUMENTS = ("ignore", "pattern", "tolerance", "relativeTolerance", "marker")
"""The fields of `dataset.task` that only some of the tasks take."""


def _or(values: list[str]) -> str:
    return " or ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)


def _quoted(values: Iterable[str]) -> str:
    return ", ".join(f"'{value}'" for value in values)


def _task_rules() -> Iterator[tuple[str, str]]:
    """Yield the CEL rules of `dataset.task`: which fields each declared task takes, which fields it needs, which
    columns its grader reads, and two rules about `entryPoint`."""
    for argument in _ARGUMENTS:
        names = tasks_with(argument)
        yield (
            f"!has(self.{argument}) || has(self.name) && self.name in [{_quoted(names)}]",
            f"`{argument}` must be absent unless `name` is {_or(names)}",
        )
    for task in TASKS.values():
        for argument in task.required_arguments:
            yield (
                f"!has(self.name) || self.name != '{task.name}' || has(self.{argument})",
                f"`{argument}` must be set, because `name` is {task.name}",
            )
    readers: dict[tuple[str, ...], list[str]] = {}
    for task in TASKS.values():
        readers.setdefault(tuple(column.name for column in task.columns), []).append(task.name)
    for columns, names in readers.items():
        yield (
            f"!has(self.fields) || !has(self.name) || !(self.name in [{_quoted(names)}])"
            f" || self.fields.all(column, column in [{_quoted(columns)}])",
            f"{FIELDS_RULE_BEGINNING} {', '.join(columns)} where `name` is {_or(names)}",
        )
    yield (
        "!has(self.arguments) || has(self.entryPoint)",
        "`arguments` must be absent unless `entryPoint` is set",
    )
    # Status, CLI and docs show only the name of a task or of an entry point. So an entry point must not have the name
    # of a task.
    yield (
        f"!has(self.entryPoint) || !(self.entryPoint in [{_quoted(TASKS)}])",
        "`entryPoint` must not be the name of a task of this project, which `name` chooses",
    )


class TaskSpec(ApiModel):
    """What grades generated answers. `name` chooses a grader of the project, `entryPoint` chooses a grader in your
    trainer image."""

    model_config = ConfigDict(json_schema_extra=join(exactly_one_of("name", "entryPoint"), cel(*_task_rules())))

    name: Annotated[TaskName, Field(description=task_name_text())] | None = None
    entry_point: Annotated[str, Field(min_length=1, max_length=64, pattern=ENTRY_POINT_PATTERN)] | None = None
    """Name of your own grader: the name of an entry point in the group `finetune_trainer.graders` of the trainer
    image."""
    fields: (
        Annotated[
            dict[str, Annotated[str, Field(min_length=1, max_length=128)]],
            Field(max_length=COLUMN_LIMIT),
            ENTRIES,
        ]
        | None
    ) = None
    """The columns of your rows that the grader reads. A key is the grader's own name of a column, and its value is the
    name of the column in your rows, for example `{answer: solution}`. Where a column with the right answer is not named
    here, the grader reads the completion of `format`: the column `completionField`, or the text of the template
    `completion`, without `completionSuffix`. Where any other column is not named here, the grader reads the column of
    your rows that has the grader's own name."""
    one_line: bool | None = None
    """Whether right answers are one line, so that only the first line of the base model's answer counts. Absent: true
    for ViGGO and SQL, false for the other values of `name`, and what an own grader declares."""
    ignore: Annotated[list[Ignorable], Field(max_length=4, json_schema_extra=SET), UNIQUE] | None = None
    """Differences between the answer and the right text that are ignored. Absent: only white space around the answer is
    ignored."""
    pattern: Annotated[str, Field(min_length=1, max_length=PATTERN_LENGTH)] | None = None
    """Regular expression in the syntax of RE2. What the expression finds in the answer is compared with what it finds
    in the right text, or with the whole right text where it finds nothing there. The expression finds its first group
    or, where it has no group, the whole match."""
    tolerance: DecimalString | None = None
    """Largest difference between the number of the answer and the right one. Where `relativeTolerance` is set too, an
    answer within one of the two limits is right. Absent: 0."""
    relative_tolerance: DecimalString | None = None
    """Largest difference between the number of the answer and the right one, as a multiple of the right one. Absent:
    0."""
    marker: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Text behind which the number of the answer stands, for example `####`. Absent: the answer must state exactly one
    number."""
    arguments: (
        Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=ARGUMENT_LIMIT), ENTRIES] | None
    ) = None
    """Arguments of an own grader, by their names."""

    @property
    def label(self) -> str:
        """Name of the task, or of the entry point of an own grader."""
        return self.name or self.entry_point or ""

    @property
    def named_columns(self) -> Mapping[str, str]:
        """The entries of `fields`. Empty where `fields` is absent."""
        return self.fields or {}
