"""Loads and calls own graders: graders that users add to their trainer image, as entry points of the group
`finetune_trainer.graders`.

An entry point names an `OwnGrader`: the declaration of a task, and a function. Whatever that function returns becomes a
grade, and so does whatever it raises, except MemoryError and KeyboardInterrupt. So a fault of an own grader leaves rows
out and does not end the training.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from finetune_core.errors import UserError, valid_text
from finetune_core.task_declaration import UNGRADED_REASON_LENGTH, Task, Unit
from finetune_trainer.evaluation.graders.grades import Grade

GROUP = "finetune_trainer.graders"
"""Group of the entry points that name own graders."""

GRADE_SECONDS = 30.0
"""Longest time in seconds that a call of an own grader may take."""

_PASSED_ON = (MemoryError, KeyboardInterrupt)
"""Exceptions that do not show a fault of the grader. They are raised again."""

GradeFunction = Callable[[str, Mapping[str, object], Mapping[str, str]], object]
"""A function that grades an answer. Its arguments are the answer, the columns that the task declares (by the task's own
names, without those that a row lacks), and `dataset.task.arguments`. It returns a `Grade`, or the values of scores by
their names, or the value of the main score alone, or None where the row can't be used."""


@dataclass(frozen=True, kw_only=True)
class OwnGrader:
    """What an entry point of the group `finetune_trainer.graders` must name."""

    task: Task
    """The declaration: columns, scores, and which of them is `main`."""
    grade: GradeFunction
    check: Callable[[Mapping[str, str]], None] = field(default=lambda _arguments: None)
    """A function that raises ValueError where `dataset.task.arguments` can't be used. It is called whenever the grader
    is loaded, so the preflight check calls it before the first attempt."""


def names_of_own_graders() -> list[str]:
    """Return the names of all own graders in the image, sorted."""
    return sorted({found.name for found in entry_points(group=GROUP)})


def load_own_grader(name: str, arguments: Mapping[str, str]) -> OwnGrader:
    """Return the own grader ``name``.

    Raises UserError where the image has no entry point of this name or several different ones, where the entry point
    can't be loaded or is no `OwnGrader`, and where the grader refuses ``arguments``.
    """
    found: list[EntryPoint] = list(entry_points(group=GROUP, name=name))
    if len(named := sorted({entry.value for entry in found})) > 1:
        raise UserError(
            "dataset.task.entryPoint",
            f"the trainer image has {len(named)} entry points {name} of the group {GROUP}, where one can be meant:"
            f" {', '.join(named)}",
        )
    if not found:
        present = ", ".join(names_of_own_graders()) or "none"
        raise UserError(
            "dataset.task.entryPoint",
            f"the trainer image has no entry point {name} of the group {GROUP}; it has {present}",
        )
    try:
        loaded = found[0].load()
        problem = _declaration_problem(loaded)
    except _PASSED_ON:
        raise
    except BaseException as error:  # noqa: BLE001  (an import may raise anything)
        problem = f"can't be loaded: {_sentence(error)}"
    if problem:
        raise UserError("dataset.task.entryPoint", f"{found[0].value} of the entry point {name} {problem}")
    assert isinstance(loaded, OwnGrader)
    try:
        loaded.check(dict(arguments))
    except _PASSED_ON:
        raise
    except BaseException as error:  # noqa: BLE001  (the function of a user may raise anything)
        raise UserError("dataset.task.arguments", f"the grader {name} refuses them: {_sentence(error)}") from None
    return loaded


def _declaration_problem(loaded: object) -> str:
    """Return why ``loaded``, which an entry point names, is no own grader; empty where it is one."""
    if not isinstance(loaded, OwnGrader):
        return f"must be an OwnGrader, and is a {type(loaded).__name__}"
    if not isinstance(loaded.task, Task):
        return f"must have a Task as its `task`, and has a {type(loaded.task).__name__}"
    wrong = next((name for name in ("grade", "check") if not callable(getattr(loaded, name))), "")
    return f"must have a function as its `{wrong}`" if wrong else ""


def bounded(
    own: OwnGrader, arguments: Mapping[str, str], *, seconds: float = GRADE_SECONDS
) -> Callable[[str, Mapping[str, object]], Grade]:
    """Return a grader that calls the function of ``own`` with ``arguments``. If the function raises an exception, or
    returns anything that `GradeFunction` does not allow, the grade leaves the row out and says why. Only MemoryError
    and KeyboardInterrupt are raised again.

    If a call takes longer than ``seconds``, its row is left out, and so are all rows after it. The function is not
    called again, because the thread of that call can't be ended.
    """
    stuck = threading.Event()
    too_long = f"a call of the grader took longer than {seconds:g} s"

    def grade(answer: str, row: Mapping[str, object]) -> Grade:
        if stuck.is_set():
            return Grade.left_out(too_long)
        made: list[Grade | BaseException] = []
        thread = threading.Thread(target=lambda: made.append(_attempt(own, answer, row, arguments)), daemon=True)
        thread.start()
        thread.join(seconds)
        if not made:
            stuck.set()
            return Grade.left_out(too_long)
        if isinstance(made[0], BaseException):
            raise made[0]
        return made[0]

    return grade


def _attempt(
    own: OwnGrader, answer: str, row: Mapping[str, object], arguments: Mapping[str, str]
) -> Grade | BaseException:
    """Return the grade that the function of ``own`` gives. MemoryError and KeyboardInterrupt are returned, so that the
    calling thread can raise them.

    The function gets copies, because the row and the arguments are used again for the next evaluation.
    """
    try:
        return as_grade(own.task, own.grade(answer, deepcopy(dict(row)), dict(arguments)))
    except _PASSED_ON as error:
        return error
    except BaseException as error:  # noqa: BLE001  (the function of a user may raise anything)
        return Grade.left_out(f"the grader raised {_sentence(error)}"[:UNGRADED_REASON_LENGTH])


def as_grade(task: Task, returned: object) -> Grade:
    """Return a grade of ``task`` for ``returned``, the value that a grading function returned. If ``returned`` is not
    what `GradeFunction` allows, the grade leaves the row out and says why."""
    if returned is None:
        return Grade.left_out("the grader left the row out")
    if isinstance(returned, Grade):
        if not returned.is_graded:
            problem = _line(returned.problem)[:UNGRADED_REASON_LENGTH]
            return Grade.left_out(problem or "the grader left the row out")
        values: Mapping[Any, object] = returned.scores
        problem = _line(returned.problem)[:UNGRADED_REASON_LENGTH]
    else:
        values = returned if isinstance(returned, Mapping) else {task.main: returned}
        problem = ""
    scores: dict[str, bool | float] = {}
    for score in task.scores:
        if score.unit is Unit.VALUE and score.name not in values:
            return Grade.left_out(f"the grader returned no value of {score.name}")
        value = values.get(score.name, False if score.unit is Unit.RIGHT_OR_WRONG else 0.0)
        number = _number(value)
        if number is None or not _is_allowed(number, score.unit):
            return Grade.left_out(f"the grader returned no value of {score.name}, which must be {_ALLOWED[score.unit]}")
        scores[score.name] = bool(number) if score.unit is Unit.RIGHT_OR_WRONG else number
    if unknown := [str(name) for name in values if name not in task.score_names]:
        return Grade.left_out(_line(f"the grader returned a score {unknown[0][:60]}, which it does not declare"))
    return Grade.of(task, scores, problem=problem)


_ALLOWED = {
    Unit.RIGHT_OR_WRONG: "True or False",
    Unit.PARTIAL_CREDIT: "a number from 0 to 1",
    Unit.VALUE: "a finite number",
}


def _is_allowed(number: float, unit: Unit) -> bool:
    return unit is Unit.VALUE or (number in (0, 1) if unit is Unit.RIGHT_OR_WRONG else 0 <= number <= 1)


def _number(value: object) -> float | None:
    """Return ``value``, which a grading function returned, as a float. None where it is no number, or not finite."""
    if not isinstance(value, (bool, int, float)) and not hasattr(value, "__float__"):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _line(value: object) -> str:
    """Return the text of ``value`` as one line that a terminal can show. The job's status and the CLI show the line."""
    text = " ".join(valid_text(str(value)).split())
    return "".join(character if character.isprintable() else "?" for character in text)


def _sentence(error: BaseException) -> str:
    try:
        text = _line(error)[:100]
    except Exception:  # noqa: BLE001  (an exception of a user may raise anything when it is shown)
        text = "it can't be shown"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
