"""Every declared task has a grader, which reads the columns and gives the scores that the task declares. No grader has
one of the known holes.

A hole is a wrong answer that a grader accepts, or a right answer that it rejects. Each hole is tested with one answer.
The other files `test_tasks_*.py` test each grader in depth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.api.dataset import DatasetSpec
from finetune_core.api.sources import DataSource
from finetune_core.api.task import TaskSpec
from finetune_core.errors import UserError, valid_text
from finetune_core.row_templates import Piece
from finetune_core.task_declaration import Aggregation, Score, Task, Unit
from finetune_core.tasks import GSM8K, TASKS, VIGGO
from finetune_trainer.data.dataset import GRADED_FIELDS, columns_read
from finetune_trainer.data.files.row import NamedColumn
from finetune_trainer.evaluation.graders import GRADERS, Grade, Grader, Grading, load_grading
from finetune_trainer.evaluation.graders.grades import GradeList
from finetune_trainer.storage.evaluation_file import AnswerRecord, stored_row

MEANING = {"mr": "inform(name[Portal], genres[puzzle, shooter], rating[good])"}
NUMBER = {"answer": "12 x 80 = 960, and 40 more make 1,000.\n#### 1,000"}
TABLES = "CREATE TABLE boat (name VARCHAR, harbour VARCHAR, length INTEGER)"
FOUND = {"context": TABLES, "answer": "SELECT name FROM boat WHERE harbour = 'Quay'"}
TOWN = {"answer": "Lyon"}
SORTED = {"context": TABLES, "answer": "SELECT name FROM boat ORDER BY length DESC"}


def grade(task: str, answer: str, gold: dict[str, str]) -> Grade:
    return GRADERS[task](TaskSpec.model_validate({"name": task}))(answer, gold)


def example_grader(task: Task) -> Grader:
    """Return the grader of ``task`` with the arguments of the task's example."""
    spec = TaskSpec.model_validate({"name": task.name, **(task.example_arguments or {})})
    return GRADERS[task.name](spec)


SOURCE = {"s3": {"uri": "s3://bucket/rows.jsonl"}}


def dataset(task: dict[str, object] | None, **form: str) -> DatasetSpec:
    return DatasetSpec.model_validate({"train": SOURCE, "format": {"promptCompletion": form}, "task": task})


class ReadColumns(Mapping[str, object]):
    """A row that records which columns a grader reads, by their names."""

    def __init__(self, columns: dict[str, object]) -> None:
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


def test_a_task_without_a_grader_ends_the_job_instead_of_scoring_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_grading(dataset(None)) is None
    monkeypatch.delitem(GRADERS, "GSM8K")
    with pytest.raises(UserError, match=r"dataset\.task\.name: must be one of .* no grader for GSM8K"):
        load_grading(dataset({"name": "GSM8K"}))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_a_grader_reads_the_declared_columns_and_gives_the_example_answer_every_score(task: Task) -> None:
    row = example_row(task)
    grade = example_grader(task)(task.example_answer, row)
    assert grade.problem == ""
    assert {name: float(value) for name, value in grade.scores.items()} == dict.fromkeys(task.score_names, 1.0)
    assert row.read == {column.name for column in task.columns}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_an_empty_answer_gets_no_score_and_an_empty_row_is_left_out(task: Task) -> None:
    assert not any(example_grader(task)("", example_row(task)).scores.values())
    assert not example_grader(task)(task.example_answer, {}).is_graded
    for column in task.columns:
        if not column.optional:
            row = {other.name: None if other is column else other.example for other in task.columns}
            assert not example_grader(task)("None", row).is_graded, f"{column.name} is null"


def test_a_grader_reads_the_completion_unless_the_job_names_another_column() -> None:
    rows = {"solution": "so 5\n#### 5", "other": "#### 7", "answer": "#### 9"}
    by_default = load_grading(dataset({"name": "GSM8K"}, completionField="solution"))
    named = load_grading(dataset({"name": "GSM8K", "fields": {"answer": "other"}}, completionField="solution"))
    assert by_default is not None
    assert named is not None
    assert by_default.grade("#### 5", rows).scores == {"exact": True}
    assert named.grade("#### 7", rows).scores == {"exact": True}
    assert by_default.required_columns == [NamedColumn("dataset.task.fields.answer", "solution")]


def test_a_column_with_tables_keeps_its_own_name_and_an_optional_one_is_not_demanded() -> None:
    sql = load_grading(dataset({"name": "SQL"}, completionField="query"))
    choice = load_grading(dataset({"name": "Choice"}))
    listed = load_grading(dataset({"name": "Choice", "fields": {"choices": "options"}}))
    assert [sql.columns, choice.columns] == [  # type: ignore[union-attr]
        {"context": "context", "answer": "query"},
        {"answer": "completion", "choices": "choices"},
    ]
    found = [grading.required_columns for grading in (sql, choice, listed) if grading is not None]
    assert [[column.name for column in columns] for columns in found] == [
        ["context", "query"],
        ["completion"],
        ["completion", "options"],
    ]


def graded(task: dict[str, object], **form: str) -> Grading:
    found = load_grading(dataset(task, **form))
    assert found is not None
    return found


def test_the_right_answer_of_a_completion_template_is_its_text() -> None:
    row = {"reasoning": "2 + 3", "value": 5, "answer": "#### 9", "completion": "#### 9"}
    found = graded({"name": "GSM8K"}, completion="{reasoning} = {value}\n#### {value}", completionSuffix="<END>")
    assert found.grade("so it is\n#### 5", row).scores == {"exact": True}
    assert not found.required_columns, "the format demands the columns of the template"
    whole = graded({"name": "ExactMatch"}, completion="{reasoning} = {value}", completionSuffix="<END>")
    assert whole.grade("2 + 3 = 5", row).scores == {"exact": True}
    assert whole.grade("2 + 3 = 5<END>", row).scores == {"exact": False}


def test_a_completion_template_of_one_column_is_that_column() -> None:
    """The grader gets the value as it is in the row, for example a number that is no text."""
    found = graded({"name": "ExactMatch"}, completion="{solution}")
    assert (found.columns, found.rendered) == ({"answer": "solution"}, [])
    assert found.required_columns == [NamedColumn("dataset.task.fields.answer", "solution")]
    assert graded({"name": "ExactMatch"}, completion="{completion}", completionField="x").columns == {"answer": "x"}


def test_a_column_that_the_job_names_holds_the_right_answer_also_beside_a_completion_template() -> None:
    found = graded({"name": "Number", "fields": {"answer": "value"}}, completion="{reasoning} = {value}")
    assert found.grade("5", {"reasoning": "2 + 3", "value": 5}).scores == {"exact": True}
    assert found.required_columns == [NamedColumn("dataset.task.fields.answer", "value")]


def test_the_completion_of_a_row_is_what_shows_whether_the_row_can_be_graded() -> None:
    found = graded({"name": "Number"}, completion="It is {value}.")
    assert found.why_left_out({"value": "5"}) == ""
    assert "number" in found.why_left_out({"value": "five or six"})
    assert found.why_left_out({"value": None}), "a row that can't be rendered is a bad row, and never graded"


def test_a_rendered_completion_is_read_like_a_generated_answer() -> None:
    def without_end(completion: Iterable[Piece]) -> str:
        return "".join(piece.text for piece in completion).removesuffix("</s>")

    found = graded({"name": "ExactMatch"}, completion="{value}</s>").reading(without_end)
    assert found.grade("5", {"value": 5}).scores == {"exact": True}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("completion", [None, "{one} and {two}{#three} or {three}{/three}"])
@pytest.mark.parametrize("field", GRADED_FIELDS)
def test_a_grader_gets_every_column_that_it_reads_although_others_are_not_read(
    name: str, completion: str | None, field: str
) -> None:
    """Rows are read with the columns of `columns_read` only. The grade must be that of the whole row."""
    task = TASKS[name]
    row = {"one": "x", "two": "y", "three": "z", "prompt": "q", "further": "w"} | {
        column.name: column.example for column in task.columns
    }
    row["completion"] = next((row[column.name] for column in task.columns if column.is_completion), "x")
    arguments: dict[str, object] = {"pattern": "x"} if "pattern" in task.required_arguments else {}
    renamed = {column.name: f"my {column.name}" for column in task.columns}
    every = row | {renamed[column.name]: column.example for column in task.columns}
    form = {"completion": completion} if completion else {}
    for fields in ({}, renamed):
        spec = dataset({"name": name, "fields": fields, **arguments}, **form)
        grading = load_grading(spec)
        assert grading is not None
        read = columns_read(spec, field, None, grading.columns_read)
        assert "further" not in read
        part = {column: value for column, value in every.items() if column in read}
        assert grading.grade(task.example_answer, part) == grading.grade(task.example_answer, every)
        assert grading.why_left_out(part) == grading.why_left_out(every)


def test_only_the_rows_that_are_scored_are_read_with_the_columns_of_graders_and_of_the_base_prompt() -> None:
    spec = dataset({"name": "SQL"}).model_copy(update={"test": DataSource.model_validate(SOURCE)})
    read = {
        field: columns_read(spec, field, "{shots}{prompt}", {"context"})
        for field in ("dataset.train", "dataset.train.mix[0]", "dataset.validation", "dataset.test")
    }
    assert read == {
        "dataset.train": {"prompt", "completion"},
        "dataset.train.mix[0]": {"prompt", "completion"},
        "dataset.validation": {"prompt", "completion", "context"},
        "dataset.test": {"prompt", "completion", "context", "shots"},
    }


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
    found = GradeList.of(PARTIAL, grades)
    twice = GradeList.joined(PARTIAL, [found, GradeList.from_json(found.to_json())])
    assert twice.reported(PARTIAL) == found.reported(PARTIAL)
    assert (found.graded, found.reported(PARTIAL)) == (3, {"words": 0.5, "all": pytest.approx(1 / 3)})
    assert (twice.graded, twice.not_graded, twice.main_reasons) == (6, 2, {"the row is empty": 2})
    records = [AnswerRecord(answer="", gold={}, scores=grade.scores) for grade in grades]
    assert [record.to_json().split('"scores":')[1].split("}")[0] + "}" for record in records] == [
        '{"words":0.5,"all":false}',
        '{"words":1.0,"all":true}',
        "{}",
        '{"words":0.0,"all":false}',
    ]
    assert [AnswerRecord.model_validate_json(record.to_json()) for record in records] == records


rows: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.text(st.characters(), max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.dates(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@given(rows)
def test_any_row_is_stored_in_a_form_that_can_be_read_again(row: dict[str, Any]) -> None:
    assert_stored(row)


def test_a_row_that_is_deep_or_long_is_cut_off_where_it_is_stored() -> None:
    assert_stored({"deep": json.loads("[" * 700 + "]" * 700)})
    assert_stored({"long": ["x" * 1000] * 1000, "short": 1, "text": "y" * 100_000})


def assert_stored(row: dict[str, Any]) -> None:
    stored = AnswerRecord(answer="a", gold=stored_row(row), scores={}).to_json()
    assert len(stored) < 100_000
    assert AnswerRecord.model_validate_json(stored).gold.keys() == {valid_text(name) for name in row}


def test_reasons_beyond_the_limit_are_counted_together() -> None:
    grades = [Grade.left_out(f"reason {number}") for number in range(6) for _ in range(6 - number)]
    reasons = GradeList.of(PARTIAL, grades).main_reasons
    assert reasons == {"reason 0": 6, "reason 1": 5, "reason 2": 4, "other reasons": 6}
    grades += [Grade.left_out("other reasons")] * 9
    assert GradeList.of(PARTIAL, grades).main_reasons == {"reason 0": 6, "reason 1": 5, "other reasons": 19}


@pytest.mark.parametrize(
    ("aggregation", "value"),
    [(Aggregation.MEAN, 4.0), (Aggregation.MEDIAN, 2.0), (Aggregation.MINIMUM, -1.0), (Aggregation.MAXIMUM, 11.0)],
)
def test_a_score_is_aggregated_as_it_declares(aggregation: Aggregation, value: float) -> None:
    length = Score(name="length", unit=Unit.VALUE, aggregation=aggregation)
    task = Task(name="Length", scores=(length,), main="length")
    grades = [Grade.of(task, {"length": number}) for number in (-1.0, 2.0, 11.0)]
    assert GradeList.of(task, grades).reported(task) == {"length": value}


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
        # ViGGO: attributes in another order are right for the score orderFree, but wrong for the score strict. An
        # answer that lacks a value, or has a second representation behind the first, is wrong for both scores.
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
        (
            "SQL",
            FOUND,
            "SELECT name FROM boat WHERE harbour = 'Quay' UNION ALL SELECT name FROM boat WHERE harbour = 'Quay'",
            set(),
        ),
        ("SQL", FOUND, "SELECT name FROM boat WHERE harbour = 'Quay' ORDER BY name DESC", {"execution"}),
        ("SQL", SORTED, "SELECT name FROM boat ORDER BY length", set()),
        ("SQL", SORTED, "SELECT name FROM boat", set()),
        # ExactMatch compares the whole answer, except white space at its ends. Contains does not find the right answer
        # inside of a longer word.
        ("ExactMatch", TOWN, " Lyon\n", {"exact"}),
        ("ExactMatch", TOWN, "Lyon, France", set()),
        ("ExactMatch", TOWN, "lyon", set()),
        ("Contains", {"answer": "72"}, "There are 172.", set()),
        ("Contains", TOWN, "It is Lyon.", {"contains", "found"}),
        # The answer must state the right number and no other number.
        ("Number", {"answer": "1,000"}, "It costs $1000.", {"exact"}),
        ("Number", {"answer": "1,000"}, "10 or 1000", set()),
        # JSON is compared as values and not as text. Nothing may follow the value, and no key may come twice in an
        # object.
        ("JSON", {"answer": '{"a": 1, "b": [1, 2]}'}, '{"b": [1.0, 2], "a": 1}', {"equal", "keys"}),
        ("JSON", {"answer": '{"a": 1}'}, '{"a": true}', set()),
        ("JSON", {"answer": '{"a": 1}'}, '{"a": 1} {"a": 1}', set()),
        ("JSON", {"answer": '{"a": 1}'}, '{"a": 2, "a": 1}', set()),
        # A letter that begins a sentence names no option.
        ("Choice", {"answer": "A"}, "A good question.", set()),
        ("Choice", {"answer": "A"}, "(A)", {"exact"}),
    ],
)
def test_trap_25_holes_of_the_graders(task: str, gold: dict[str, str], answer: str, right: set[str]) -> None:
    scores = {name for name, value in grade(task, answer, gold).scores.items() if value}
    # The scores `function`, `attributes` and `values` of ViGGO grade parts of an answer, so a wrong answer may have
    # them.
    assert scores - {"function", "attributes", "values"} == right
