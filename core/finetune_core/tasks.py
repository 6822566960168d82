"""Declares the tasks whose generated answers can be graded. Each value of `dataset.task.name` has one declaration.

The declarations in `TASKS` determine the allowed values of `dataset.task.name`, the columns and arguments that
`dataset.task` may name, the descriptions of API fields, the names of the scores, the label of the main score in the
CLI, and docs/tasks.md. The trainer has a grading function for each task
(`finetune_trainer/evaluation/graders/__init__.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import GetPydanticSchema
from pydantic_core import core_schema

from finetune_core.task_declaration import Column, Score, Task, Unit

VIGGO = Task(
    name="ViGGO",
    grading="compares functional representations",
    description="A sentence about a video game is turned into a functional representation: a function, then attributes,"
    " each with its value or values in square brackets (Juraska et al. 2019). White space says nothing. Of an answer"
    " that is not one functional representation and nothing else, only the function's name can be right. A row whose"
    " own representation does not parse, or has a function or an attribute that the data set does not know, is left"
    " out.",
    columns=(
        Column(
            name="mr",
            is_completion=True,
            meaning="The functional representation that is right.",
            example="inform(name[Dirt: Showdown], genres[driving/racing, sport])",
        ),
    ),
    scores=(
        Score(name="strict", meaning="Function, attributes and values are right, in the order of the row's own."),
        Score(
            name="orderFree",
            meaning="Function, attributes and values are right, whatever the order of attributes, and of values in a"
            " list.",
        ),
        Score(name="function", meaning="The function's name is right."),
        Score(
            name="attributes",
            meaning="The names of the attributes are right, whatever their order; a name too many or twice is wrong.",
        ),
        Score(
            name="values",
            meaning="The attributes with their values are right, whatever their order and the function's name.",
        ),
    ),
    main="strict",
    example_answer="inform(name[Dirt: Showdown], genres[driving/racing, sport])",
    one_line=True,
)

GSM8K = Task(
    name="GSM8K",
    grading="compares the number after `####`",
    description="A word problem is answered step by step, and only the first number after `####` counts (Cobbe et al."
    " 2021). Commas, currency signs, a unit behind the number and the markup of Markdown or LaTeX are ignored, and"
    " words such as `million` multiply. Several numbers in one statement (`72, 73`, `5 hours and 30 minutes`) are no"
    " number. An answer without a number is wrong, a row without one is left out.",
    columns=(
        Column(
            name="answer",
            is_completion=True,
            meaning="An answer that ends in `####` and the number that is right.",
            example="Natalia sold 48/2 = 24 clips in May, and 48+24 = 72 clips altogether.\n#### 72",
        ),
    ),
    scores=(Score(name="exact", meaning="The number is the row's own, compared as decimals (5 = 5.00)."),),
    main="exact",
    example_answer="48+24 = 72 clips.\n#### 72",
)

SQL = Task(
    name="SQL",
    grading="runs the query",
    description="A question about tables is answered by a query. The answer and the row's own query run in sqlite on"
    " the same databases, whose rows are generated so that queries of different meaning return different rows (Zhong"
    " et al. 2020). Rows are compared in their order only where the row's own query orders them, columns by place and"
    " not by name. A row whose tables or query sqlite can't run, or whose query returns nothing on generated rows, is"
    " left out.",
    columns=(
        Column(
            name="context",
            meaning="The tables as 1 to 20 CREATE TABLE statements.",
            example="CREATE TABLE head (age INTEGER)",
        ),
        Column(
            name="answer",
            is_completion=True,
            meaning="A query that is right.",
            example="SELECT COUNT(*) FROM head WHERE age > 56",
        ),
    ),
    scores=(
        Score(
            name="execution",
            meaning="On every generated database the query returns the same rows as the row's own query.",
        ),
    ),
    main="execution",
    example_answer="SELECT COUNT(age) FROM head WHERE age > 56",
    one_line=True,
)

EXACT_MATCH = Task(
    name="ExactMatch",
    grading="compares whole answers",
    description="The whole answer must be the right text. White space around the answer never counts, and `ignore`"
    " names what else does not: `Case`, `WhiteSpace` (every run of it counts as one space), `Punctuation` (except"
    " for the sign and the decimal point of a number: 3.5 is not 35), and `UnicodeForm` (other spellings of the same"
    " characters, such as full-width letters or ligatures, and invisible characters). Where a row holds a list of"
    " texts, each of them is right. Numbers and dates are compared as the text that a template shows. A row whose"
    " column holds no text, or nothing but what is ignored, is left out.",
    columns=(
        Column(
            name="answer",
            is_completion=True,
            meaning="The right answer: a text, a number, or a list of texts of which each is right.",
            example="Paris",
        ),
    ),
    scores=(Score(name="exact", meaning="The answer is the right text, or one of the right texts."),),
    main="exact",
    example_answer=" paris.",
    example_arguments={"ignore": ["Case", "Punctuation"]},
    arguments=("ignore",),
)

CONTAINS = Task(
    name="Contains",
    grading="looks for texts in the answer",
    description="The answer may be any text that contains the right text, or all texts of a list. A text that begins or"
    " ends with a letter or a digit must not be a part of a longer word or number: `72` is not in `172`, `-72` or"
    " `72.5`. `ignore` is as with ExactMatch. A row whose column holds no text, or nothing but what is ignored, is left"
    " out.",
    columns=(
        Column(
            name="answer",
            is_completion=True,
            meaning="The text that the answer must contain: a text, a number, or a list of texts.",
            example="Paris",
        ),
    ),
    scores=(
        Score(name="contains", meaning="The answer contains every text of the row."),
        Score(name="found", meaning="The share of the row's texts that the answer contains.", unit=Unit.PARTIAL_CREDIT),
    ),
    main="contains",
    example_answer="The capital of France is Paris.",
    arguments=("ignore",),
)

REGEX = Task(
    name="Regex",
    grading="compares what a regular expression finds",
    description="`pattern` is a regular expression in the syntax of RE2, which has no back references and searches"
    " every text in time proportional to its length. What its first match in the answer finds (its first group, or the"
    " whole match where the pattern has no group) is compared with what the pattern finds in the row's own text, or"
    " with that whole text where it finds nothing there. Where the pattern finds nothing in a text, or"
    " only an empty part, the text is searched again without the white space at its ends. `ignore` is as with"
    " ExactMatch. A row whose column holds no text, or in whose text the pattern finds only an empty part, is left"
    " out.",
    columns=(
        Column(
            name="answer",
            is_completion=True,
            meaning="The right answer: a text, a number, or a list of texts of which each is right.",
            example="Of the two, B is older.\nAnswer: B",
        ),
    ),
    scores=(
        Score(name="exact", meaning="What the pattern finds in the answer is what it finds in the row's own."),
        Score(name="found", meaning="The pattern finds something in the answer."),
    ),
    main="exact",
    example_answer="Answer: B",
    example_arguments={"pattern": "Answer: *(.)"},
    arguments=("pattern", "ignore"),
    required_arguments=("pattern",),
)

NUMBER = Task(
    name="Number",
    grading="compares numbers",
    description="The answer must state exactly one number, with or without words around it; with `marker` the number is"
    " the first one behind that text, as behind the `####` of GSM8K. Separators of thousands, currency signs, units"
    " and the markup of Markdown or LaTeX are ignored, and words such as `million` multiply. Digits may be those of"
    " any script, and powers of ten belong to the number (`1e5`, `2.4 × 10^5`). A fraction, a root and a multiple of π"
    " are no number, and a comma is never a decimal point. The number is right where it differs from"
    " the row's by at most `tolerance`, or by at most `relativeTolerance` times the row's. An answer without a number,"
    " or with several, is wrong; such a row is left out.",
    columns=(
        Column(
            name="answer",
            is_completion=True,
            meaning="The right number, as a number or in a text as an answer would state it.",
            example="3.14",
        ),
    ),
    scores=(Score(name="exact", meaning="The number is the row's own, within the tolerance."),),
    main="exact",
    example_answer="It is about 3.1416.",
    example_arguments={"tolerance": "0.01"},
    arguments=("tolerance", "relativeTolerance", "marker"),
)

JSON = Task(
    name="JSON",
    grading="compares JSON values",
    description="The answer must be JSON and nothing else; a Markdown fence around it, of several lines or of"
    " one, is ignored. Values are compared, not texts: the order of keys, white space and the spelling of a number"
    " (`1`, `1.0`) make no difference, the order of a list does. An answer with the same key twice is no JSON. A row"
    " whose column holds no JSON is left out.",
    columns=(
        Column(
            name="answer",
            is_completion=True,
            meaning="The right value: JSON as text, or an object or a list.",
            example='{"city": "Paris", "people": 2100000}',
        ),
    ),
    scores=(
        Score(name="equal", meaning="The value is the row's own."),
        Score(
            name="keys",
            meaning="The share of keys, of those in the row's value or the answer's, that are in both with equal"
            " values. Keys inside of objects count, each with its path. Values that are no objects count as a whole.",
            unit=Unit.PARTIAL_CREDIT,
        ),
    ),
    main="equal",
    example_answer='{"people": 2.1e6, "city": "Paris"}',
)

CHOICE = Task(
    name="Choice",
    grading="compares chosen options",
    description="The answer names one option, by its letter (`B`, `(B)`, `B.`, `Answer: B`), by its text, or by both"
    " (`B) Paris`), which must then agree. Upper and lower case, words such as `the answer is` or `is correct`, and a"
    " box of LaTeX make no difference. If an answer of several lines names no option, its first line counts, unless a"
    " later line names another option. Without texts of options, any text may follow `B.` or `(B)`, but a sentence such"
    " as `the answer is C`, `it is C` or, behind another sentence, `C is right` makes the answer wrong. A row is left"
    " out whose own answer names no option, or in which the text of an option is the letter or the text of another"
    " one.",
    columns=(
        Column(
            name="answer",
            is_completion=True,
            meaning="The right option: its letter, its text, or its place in the list, counted from 0, as a number.",
            example="B",
        ),
        Column(
            name="choices",
            optional=True,
            meaning="The texts of the options: a list, an object of letters and texts, an object with the lists `text`"
            " and `label`, or one of these as JSON text. Without the column only letters count.",
            example=["London", "Paris", "Rome"],
        ),
    ),
    scores=(Score(name="exact", meaning="The answer names the right option."),),
    main="exact",
    example_answer="(B) Paris",
)

TASKS: Mapping[str, Task] = {
    task.name: task for task in (VIGGO, GSM8K, SQL, EXACT_MATCH, CONTAINS, REGEX, NUMBER, JSON, CHOICE)
}
"""Every task that `dataset.task.name` can name, by its name, in the order in which the API lists the names."""

TaskName = Annotated[str, GetPydanticSchema(lambda _type, _handler: core_schema.literal_schema(list(TASKS)))]
"""Type of `dataset.task.name`, which behaves as a Literal of the names of all tasks."""


def task_name_text() -> str:
    """Return the description of the field `dataset.task.name` in the API."""
    graded = ", ".join(f"{task.name} {task.grading}" for task in TASKS.values())
    return f"What grades generated answers: {graded}. docs/tasks.md describes each of them."


def tasks_with(argument: str) -> list[str]:
    """Return the names of the tasks that take ``argument``, a field of `dataset.task` in camelCase."""
    return [task.name for task in TASKS.values() if argument in task.arguments]


def score_names_text() -> str:
    """Return the description of the API field that holds a score's name. The description lists the names of each task's
    scores."""
    named = [f"{', '.join(task.score_names)} ({task.name})" for task in TASKS.values()]
    return f"Such as {', '.join(named)}."


def main_score_text(task: str | None, value: float, *, answers: int | None = None) -> str:
    """Return the main score of ``task`` as part of a sentence, for example ``90.0% of 50 answers right``.

    ``task`` is the name of a task, or of the entry point of an own grader. None means a task of right and wrong
    answers. ``value`` is the value over the graded answers. ``answers`` is the number of graded answers. Where
    ``answers`` is None, the text does not say how many answers there are.
    """
    declared = TASKS.get(task) if task is not None else None
    graded = f"{answers} answers" if answers is not None else "the answers"
    if declared is None and task is not None:
        return f"{task} {value:.4g}" + (f" (over {graded})" if answers is not None else "")
    if declared is None or declared.main_score.unit is Unit.RIGHT_OR_WRONG:
        return f"{value:.1%} of {'the' if answers is None else answers} answers right"
    name = declared.main_score.name
    return f"{name} {value:.1%}" + (f" (mean of {graded})" if answers is not None else "")


def main_value_text(task: str | None, value: float) -> str:
    """Return ``value``, a value of the main score of ``task``, without the name of the score, for example ``90.0%``.
    ``task`` is as for `main_score_text`."""
    return f"{value:.4g}" if task is not None and task not in TASKS else f"{value:.1%}"


def main_score_label(task: str | None) -> str | None:
    """Return the label under which a table of scores shows the main score of ``task``, for example ``right answers``.
    ``task`` is as for `main_score_text`.

    Returns None for an own grader, and where an answer can be more than right or wrong for the main score. Tables then
    show that score only under its own name.
    """
    declared = TASKS.get(task) if task is not None else None
    if declared is None:
        return None if task is not None else "right answers"
    return "right answers" if declared.main_score.unit is Unit.RIGHT_OR_WRONG else None
