"""Graders: a module for each kind of comparison, and for SQL several modules. Each grader is a function that gets a
generated answer and the columns of its row, and returns a `Grade`. The columns have the names that the grader itself
gives them.

`finetune_core.tasks` declares the names, columns, arguments and scores of the tasks. The trainer and the preflight
check call `load_grading`. No module here imports torch. The graders of the tasks are pure functions, except for the SQL
grader, which runs queries in a child process (`sql_child.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from finetune_core.api.dataset import DatasetSpec, PromptCompletionFormat
from finetune_core.api.evaluation import LOWER_IS_BETTER, RequirementSpec
from finetune_core.api.task import TaskSpec
from finetune_core.errors import UserError
from finetune_core.row_templates import Piece, RowError, RowTemplate, TemplateError, parse
from finetune_core.task_declaration import Score, Task, Unit
from finetune_core.tasks import TASKS
from finetune_trainer.data.files.row import NamedColumn
from finetune_trainer.evaluation.graders import choice, gsm8k, json_value, sql, viggo
from finetune_trainer.evaluation.graders.grades import Grade
from finetune_trainer.evaluation.graders.number import number_grader
from finetune_trainer.evaluation.graders.own import OwnGrader, bounded, load_own_grader
from finetune_trainer.evaluation.graders.texts import contains_grader, exact_match_grader, regex_grader

__all__ = ["GRADERS", "Grade", "Grader", "Grading", "OwnGrader", "load_grading"]

Grader = Callable[[str, Mapping[str, object]], Grade]
"""A function that grades a generated answer. Its arguments are the answer and the row, whose columns have the names
that the grader itself gives them. The function raises no exception because of what the answer or the row contains."""

GRADERS: Mapping[str, Callable[[TaskSpec], Grader]] = {
    "ViGGO": lambda _: viggo.grade,
    "GSM8K": lambda _: gsm8k.grade,
    "SQL": lambda _: sql.grade,
    "ExactMatch": exact_match_grader,
    "Contains": contains_grader,
    "Regex": regex_grader,
    "Number": number_grader,
    "JSON": lambda _: json_value.grade,
    "Choice": lambda _: choice.grade,
}
"""For each task in `finetune_core.tasks.TASKS`, by its name, the function that makes its grader from the arguments in
`dataset.task`. The function raises UserError where it can't use the arguments."""


def text_of_pieces(pieces: Iterable[Piece]) -> str:
    """Return the text that consists of ``pieces``."""
    return "".join(piece.text for piece in pieces)


@dataclass(frozen=True)
class Grading:
    """How the answers of a job are graded: the declaration of its task, and the grader with the job's arguments."""

    task: Task
    columns: Mapping[str, str]
    """The names of the columns in the data file, by the names that the grader itself gives the columns. The columns in
    ``rendered`` are not among them."""
    rendered: Sequence[str]
    """Names of those columns of the grader that get the rendered template `completion` as the right answer. Empty where
    the template consists of one column only, or where `dataset.task.fields` names the column with the right answer. The
    grader then reads that column, which is in ``columns``."""
    required_columns: Sequence[NamedColumn]
    """The columns that rows must have. Each has the field of the spec that names the column, or in which a user can
    name another column."""
    one_line: bool
    """Whether only the first line of the base model's answer counts."""
    completion: RowTemplate
    """The template of the rows' completion."""
    grader: Grader
    read_completion: Callable[[Iterable[Piece]], str] = text_of_pieces
    """A function that returns the text which a generated answer with the tokens of a rendered completion would have."""

    @property
    def columns_read(self) -> frozenset[str]:
        """All columns of the rows that are read to grade an answer."""
        return frozenset({*self.columns.values(), *self.completion.columns})

    def reading(self, read_completion: Callable[[Iterable[Piece]], str]) -> Grading:
        """Return the same grading, but with ``read_completion`` as the function that reads rendered completions."""
        return replace(self, read_completion=read_completion)

    def grade(self, answer: str, row: Mapping[str, object]) -> Grade:
        """Return the grade of ``answer``. ``row`` is a row of the data file, by the names of the columns in this
        file."""
        given = {name: row.get(column) for name, column in self.columns.items() if column in row}
        if self.rendered and (completion := self._completion(row)) is not None:
            given |= dict.fromkeys(self.rendered, completion)
        return self.grader(answer, given)

    def why_left_out(self, row: Mapping[str, object]) -> str:
        """Return why an answer to ``row`` can't be graded. Empty if an answer can be graded. To find out, the row's own
        completion is graded."""
        grade = self.grade(self._completion(row) or "", row)
        return "" if grade.is_graded else grade.problem or "the grader left the row out"

    def _completion(self, row: Mapping[str, object]) -> str | None:
        """Return the text of the row's completion. None for a row that can't be rendered, which is a bad row."""
        try:
            return self.read_completion(self.completion.pieces(row))
        except RowError:
            return None


def load_grading(dataset: DatasetSpec, require: Sequence[RequirementSpec] | None = None) -> Grading | None:
    """Return how the answers of a job are graded. None where `dataset.task` is absent.

    Raises UserError with the field where the grader does not exist or can't be loaded, where it refuses its arguments,
    and where `dataset.task.fields` names a column that the grader does not read. Raises UserError also where the
    template `completion` is malformed, and for ``require``, which is `evaluation.require`, as `_check_required` does.
    """
    spec, form = dataset.task, dataset.format.prompt_completion
    if spec is None or form is None:
        _check_required(require, ())
        return None
    if spec.entry_point is not None:
        own = load_own_grader(spec.entry_point, spec.arguments or {})
        task, grader = own.task, bounded(own, spec.arguments or {})
    elif spec.name is not None and spec.name in GRADERS:
        task, grader = TASKS[spec.name], GRADERS[spec.name](spec)
    else:
        raise UserError(
            "dataset.task.name", f"must be one of {', '.join(GRADERS)}: this trainer has no grader for {spec.name}"
        )
    _check_required(require, task.scores)
    fields = spec.named_columns
    if unknown := sorted(fields.keys() - {column.name for column in task.columns}):
        known = ", ".join(column.name for column in task.columns) or "no columns"
        raise UserError("dataset.task.fields", f"names {unknown[0]}, and the grader of {task.name} reads {known}")
    completion = _completion(form)
    columns = task.columns_of_rows(fields, completion.only_column)
    return Grading(
        task=task,
        columns=columns,
        rendered=[column.name for column in task.columns if column.name not in columns],
        required_columns=[
            NamedColumn(f"dataset.task.fields.{column.name}", columns[column.name])
            for column in task.columns
            if column.name in columns and (not column.optional or column.name in fields)
        ],
        one_line=task.one_line if spec.one_line is None else spec.one_line,
        completion=completion,
        grader=grader,
    )


def _completion(form: PromptCompletionFormat) -> RowTemplate:
    """Return the completion of the rows as a template. Raises UserError if `completion` is malformed."""
    try:
        return parse("{completion}" if form.completion is None else form.completion, form.aliases)
    except TemplateError as error:
        raise UserError("dataset.format.promptCompletion.completion", str(error)) from error


def _check_required(require: Sequence[RequirementSpec] | None, scores: Sequence[Score]) -> None:
    """Raise UserError for a requirement whose score is neither in ``scores`` nor a perplexity, or whose limit no model
    can reach."""
    units = {score.name: score.unit for score in scores}
    known = (*LOWER_IS_BETTER, *units)
    for requirement in require or ():
        if requirement.score not in known:
            raise UserError(
                "evaluation.require", f"names the score {requirement.score}; the job has {', '.join(known)}"
            )
        if wrong := requirement.out_of_reach(is_share=units.get(requirement.score, Unit.VALUE) is not Unit.VALUE):
            raise UserError(f"evaluation.require.{wrong[0]}", wrong[1])
