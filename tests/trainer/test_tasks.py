"""Every declared task has a grader, which reads the columns and gives the scores that the task declares. No grader has
one of the known holes.

A hole is a wrong answer that a grader accepts, or a right answer that it rejects. Each hole is tested by one mutation
of a right answer. `test_tasks_viggo.py` and its neighbours test each grader in depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from finetune_core.errors import UserError
from finetune_core.tasks import GSM8K, NO_TASK, TASKS, VIGGO, Score, Task, Unit
from finetune_trainer.evaluation.graders import GRADERS, Grade, grader_of
from finetune_trainer.evaluation.graders.grades import ScoreSums
from finetune_trainer.storage.evaluation_file import AnswerRecord

MEANING = {"mr": "inform(name[Portal], genres[puzzle, shooter], rating[good])"}
NUMBER = {"answer": "12 x 80 = 960, and 40 more make 1,000.\n#### 1,000"}
TABLES = "CREATE TABLE boat (name VARCHAR, harbour VARCHAR, length INTEGER)"
FOUND = {"context": TABLES, "answer": "SELECT name FROM boat WHERE harbour = 'Quay'"}
SORTED = {"context": TABLES, "answer": "SELECT name FROM boat ORDER BY length DESC"}


def grade(task: str, answer: str, gold: dict[str, str]) -> Grade:
    return GRADERS[task](answer, gold)


class ReadColumns(Mapping[str, object]):
    """A row that records which columns a grader reads, by their names."""

    def __init__(self, columns: dict[str, str]) -> None:
        self._columns = columns
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> object:
        self.read.add(name)
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def example_row(task: Task) -> ReadColumns:
    return ReadColumns({column.name: column.example for column in task.columns})


def test_every_declared_task_has_a_grader_and_every_grader_a_declaration() -> None:
    assert set(GRADERS) == set(TASKS), "declare the task in finetune_core/tasks.py and add its grader to GRADERS"


def test_a_task_without_a_grader_ends_the_job_instead_of_scoring_nothing() -> None:
    assert grader_of(NO_TASK) is None
    with pytest.raises(UserError, match=r"dataset\.task: must be one of .* no grader for Haiku"):
        grader_of("Haiku")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_a_grader_reads_the_declared_columns_and_gives_the_example_answer_every_score(task: Task) -> None:
    row = example_row(task)
    grade = GRADERS[task.name](task.example_answer, row)
    assert grade.problem == ""
    assert {name: float(value) for name, value in grade.scores.items()} == dict.fromkeys(task.score_names, 1.0)
    assert row.read == {column.name for column in task.columns}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_an_empty_answer_gets_no_score_and_an_empty_row_is_left_out(task: Task) -> None:
    assert not any(GRADERS[task.name]("", example_row(task)).scores.values())
    assert not GRADERS[task.name](task.example_answer, {}).is_graded
    for column in task.columns:
        row = {other.name: None if other is column else other.example for other in task.columns}
        assert not GRADERS[task.name]("None", row).is_graded, f"{column.name} is null"


WORDS = Score(name="words", meaning="The share of words that are right.", unit=Unit.PARTIAL_CREDIT)
PARTIAL = Task(
    name="Words",
    grading="compares words",
    description="",
    columns=(),
    scores=(WORDS, Score(name="all", meaning="All words are right.")),
    main="words",
    example_answer="",
)


def test_a_share_goes_from_the_grader_into_the_mean_and_into_the_file() -> None:
    grades = [
        Grade.of(PARTIAL, {"words": 0.5}),
        Grade.of(PARTIAL, {"words": 1, "all": True}),
        Grade.left_out("the row is empty"),
        Grade.of(PARTIAL, {}, problem="the answer is empty"),
    ]
    sums = ScoreSums.of(PARTIAL, grades)
    assert sums.with_vector(2 * value for value in sums.as_vector()).means == sums.means
    assert (sums.graded, sums.means) == (3, {"words": 0.5, "all": pytest.approx(1 / 3)})
    records = [AnswerRecord(answer="", gold={}, scores=grade.scores) for grade in grades]
    assert [record.to_json().split('"scores":')[1].split("}")[0] + "}" for record in records] == [
        '{"words":0.5,"all":false}',
        '{"words":1.0,"all":true}',
        "{}",
        '{"words":0.0,"all":false}',
    ]
    assert [AnswerRecord.model_validate_json(record.to_json()) for record in records] == records


@pytest.mark.parametrize(
    ("task", "scores"),
    [
        (GSM8K, {"exact": 0.5}),
        (GSM8K, {"exact": 1}),
        (GSM8K, {"other": True}),
        (PARTIAL, {"words": True}),
        (PARTIAL, {"words": 1.5}),
        (PARTIAL, {"words": float("nan")}),
    ],
)
def test_a_value_that_the_task_does_not_declare_is_refused(task: Task, scores: dict[str, bool | float]) -> None:
    with pytest.raises(ValueError, match=task.name):
        Grade.of(task, scores)


def test_scores_of_an_answer_that_is_right_or_wrong_are_written_as_true_and_false() -> None:
    record = AnswerRecord(answer="", gold={}, scores=Grade.of(VIGGO, {"function": True}).scores)
    expected = '{"strict":false,"orderFree":false,"function":true,"attributes":false,"values":false}'
    assert f'"scores":{expected}' in record.to_json()


@pytest.mark.parametrize(
    ("task", "gold", "answer", "right"),
    [
        # Attributes in another order are right for the score orderFree, but wrong for the score strict.
        ("ViGGO", MEANING, "inform(rating[good], name[Portal], genres[puzzle, shooter])", {"orderFree"}),
        ("ViGGO", MEANING, "inform(name[Portal], genres[puzzle, shooter], rating[good])", {"strict", "orderFree"}),
        ("ViGGO", MEANING, "inform(name[Portal], genres[puzzle], rating[good])", set()),
        ("ViGGO", MEANING, "inform(name[Portal], genres[puzzle, shooter], rating[good]) inform(name[Portal])", set()),
        # The number after #### counts, also with commas inside or text behind it. A number without #### does not count.
        ("GSM8K", NUMBER, "#### 1000", {"exact"}),
        ("GSM8K", NUMBER, "so #### $1,000. That is what is left.", {"exact"}),
        ("GSM8K", NUMBER, "#### 1,000,000", set()),
        ("GSM8K", NUMBER, "#### 10 or 1000", set()),
        ("GSM8K", NUMBER, "The answer is 1000", set()),
        # A wrong query must not count as right only because both results are empty. So the generated rows contain the
        # literal of the reference query, here 'Quay'.
        ("SQL", FOUND, "SELECT name FROM boat WHERE harbour = 'Nowhere'", set()),
        ("SQL", FOUND, "SELECT name FROM boat WHERE 1 = 0", set()),
        ("SQL", FOUND, "SELECT b.name FROM boat AS b WHERE b.harbour = 'Quay'", {"execution"}),
        # Duplicate rows count. The order of rows counts only where the reference query has an ORDER BY.
        ("SQL", FOUND, "SELECT name FROM boat WHERE harbour = 'Quay' UNION ALL SELECT name FROM boat", set()),
        ("SQL", FOUND, "SELECT name FROM boat WHERE harbour = 'Quay' ORDER BY name DESC", {"execution"}),
        ("SQL", SORTED, "SELECT name FROM boat ORDER BY length", set()),
        ("SQL", SORTED, "SELECT name FROM boat", set()),
    ],
)
def test_trap_25_holes_of_the_graders(task: str, gold: dict[str, str], answer: str, right: set[str]) -> None:
    scores = {name for name, value in grade(task, answer, gold).scores.items() if value}
    # The scores `function`, `attributes` and `values` of ViGGO grade parts of an answer, so a wrong answer may have
    # them.
    assert scores - {"function", "attributes", "values"} == right
