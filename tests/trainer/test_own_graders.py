"""Own graders are entry points of the trainer image. Whatever an own grader returns or raises becomes a grade,
except for MemoryError and KeyboardInterrupt, which pass through."""

from __future__ import annotations

import math
import random
import sys
import threading
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_core.api.dataset import DatasetSpec
from finetune_core.api.evaluation import RequirementSpec
from finetune_core.errors import UserError
from finetune_core.task_declaration import Aggregation, Column, Score, Task, Unit
from finetune_trainer.evaluation.graders import Grade, Grading, OwnGrader, load_grading
from finetune_trainer.evaluation.graders.grades import GradeList
from finetune_trainer.evaluation.graders.own import bounded

SOURCE = """
from finetune_core.task_declaration import Column, Score, Task, Unit
from finetune_trainer.evaluation.graders import OwnGrader

TASK = Task(
    name="overlap",
    columns=(Column(name="reference", is_completion=True), Column(name="weight", optional=True)),
    scores=(Score(name="overlap", unit=Unit.PARTIAL_CREDIT), Score(name="enough")),
    main="overlap",
    one_line=True,
)


def grade(answer, row, arguments):
    right, said = set(row["reference"].split()), set(answer.split())
    share = len(right & said) / len(right)
    return {"overlap": share, "enough": share >= float(arguments.get("enough", 0.5))}


def check(arguments):
    float(arguments.get("enough", 0.5))


overlap = OwnGrader(task=TASK, grade=grade, check=check)
nothing = 5
unfinished = OwnGrader(task="overlap", grade=grade)
idle = OwnGrader(task=TASK, grade=None)
"""
ENTRY_POINTS = """[finetune_trainer.graders]
overlap = own_graders_of_a_user:overlap
wrong = own_graders_of_a_user:nothing
absent = own_graders_of_a_user:none
broken = own_graders_that_fail:overlap
leaving = own_graders_that_leave:overlap
cancelled = own_graders_that_are_cancelled:overlap
unfinished = own_graders_of_a_user:unfinished
idle = own_graders_of_a_user:idle
twice = own_graders_of_a_user:overlap
"""
OTHER_ENTRY_POINTS = """[finetune_trainer.graders]
overlap = own_graders_of_a_user:overlap
twice = own_graders_of_a_user:nothing
"""


@pytest.fixture(scope="module", autouse=True)
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Install two packages with own graders into a folder, which is on the module search path while the tests of this
    file run."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "own_graders_of_a_user.py").write_text(SOURCE)
    (folder / "own_graders_that_fail.py").write_text("1 / 0")
    (folder / "own_graders_that_leave.py").write_text("raise SystemExit(3)")
    (folder / "own_graders_that_are_cancelled.py").write_text("import asyncio\nraise asyncio.CancelledError")
    for name, entry_points in {"own_graders": ENTRY_POINTS, "other_graders": OTHER_ENTRY_POINTS}.items():
        metadata = folder / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(entry_points)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def grading(require: list[RequirementSpec] | None = None, form: dict[str, str] | None = None, **task: Any) -> Grading:
    dataset = {
        "train": {"s3": {"uri": "s3://bucket/rows.jsonl"}},
        "format": {"promptCompletion": form or {"completionField": "reply"}},
        "task": task,
    }
    found = load_grading(DatasetSpec.model_validate(dataset), require)
    assert found is not None
    return found


def test_an_own_grader_gets_the_text_of_a_completion_template_under_its_own_name() -> None:
    found = grading(entryPoint="overlap", form={"completion": "{a} {b}"})
    assert found.grade("a b", {"a": "a", "b": "c"}).scores == {"overlap": 0.5, "enough": True}
    assert found.columns_read == {"a", "b", "weight"}


def test_an_own_grader_reads_the_columns_that_the_job_names_and_its_arguments() -> None:
    found = grading(entryPoint="overlap", arguments={"enough": "0.6"})
    assert (found.one_line, found.required_columns) == (True, [("dataset.task.fields.reference", "reply")])
    assert found.grade("a b", {"reply": "a c"}).scores == {"overlap": 0.5, "enough": False}
    assert found.grade("a b", {}).problem == "the grader raised KeyError: 'reference'"
    other = grading(entryPoint="overlap", fields={"reference": "other"}, oneLine=False)
    assert (other.one_line, other.grade("a b", {"other": "a c"}).scores) == (False, {"overlap": 0.5, "enough": True})
    assert grading([RequirementSpec(score="enough", at_least="0.5")], entryPoint="overlap").task.name == "overlap"


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (
            {"entryPoint": "overlaps"},
            "dataset.task.entryPoint: the trainer image has no entry point overlaps of the group"
            " finetune_trainer.graders; it has absent, broken, cancelled, idle, leaving, overlap, twice, unfinished,"
            " wrong",
        ),
        (
            {"entryPoint": "wrong"},
            "dataset.task.entryPoint: own_graders_of_a_user:nothing of the entry point wrong must be an OwnGrader, and"
            " is a int",
        ),
        ({"entryPoint": "absent"}, "can't be loaded: AttributeError: "),
        ({"entryPoint": "broken"}, "can't be loaded: ZeroDivisionError: "),
        ({"entryPoint": "leaving"}, "can't be loaded: SystemExit: 3"),
        ({"entryPoint": "cancelled"}, "can't be loaded: CancelledError"),
        ({"entryPoint": "unfinished"}, "must have a Task as its `task`, and has a str"),
        ({"entryPoint": "idle"}, "must have a function as its `grade`"),
        (
            {"entryPoint": "twice"},
            "dataset.task.entryPoint: the trainer image has 2 entry points twice of the group finetune_trainer.graders,"
            " where one can be meant: own_graders_of_a_user:nothing, own_graders_of_a_user:overlap",
        ),
        (
            {"entryPoint": "overlap", "arguments": {"enough": "much"}},
            "dataset.task.arguments: the grader overlap refuses them: ValueError: could not convert",
        ),
        (
            {"entryPoint": "overlap", "fields": {"gold": "x"}},
            "dataset.task.fields: names gold, and the grader of overlap reads reference, weight",
        ),
    ],
)
def test_a_grader_that_can_not_be_used_is_named_with_what_the_image_has(task: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        grading(**task)
    assert sentence in str(raised.value)


def test_a_required_score_that_the_grader_does_not_have_is_named() -> None:
    with pytest.raises(UserError, match=r"evaluation\.require: names the score exact; the job has .*, overlap, enough"):
        grading([RequirementSpec(score="exact", at_least="0.5")], entryPoint="overlap")


def test_a_share_of_an_own_grader_that_no_model_can_reach_is_named() -> None:
    with pytest.raises(UserError, match=r"evaluation\.require\.atLeast: must be at most 1: overlap is a share"):
        grading([RequirementSpec(score="overlap", at_least="80")], entryPoint="overlap")


TASK = Task(
    name="own",
    columns=(Column(name="answer", is_completion=True),),
    scores=(
        Score(name="main", unit=Unit.VALUE, aggregation=Aggregation.MEDIAN),
        Score(name="right"),
        Score(name="share", unit=Unit.PARTIAL_CREDIT),
    ),
    main="main",
)


def graded(function: Callable[..., object]) -> Grade:
    return bounded(OwnGrader(task=TASK, grade=function), {})("an answer", {"answer": "x"})


@pytest.mark.parametrize(
    ("returned", "scores"),
    [
        (2.5, {"main": 2.5, "right": False, "share": 0.0}),
        (True, {"main": 1.0, "right": False, "share": 0.0}),
        ({"main": -3, "right": 1, "share": 0.25}, {"main": -3.0, "right": True, "share": 0.25}),
        (Grade.of(TASK, {"main": 7.0}, problem="hm"), {"main": 7.0, "right": False, "share": 0.0}),
        (None, {}),
        (Grade.left_out("no"), {}),
        (float("nan"), {}),
        (float("inf"), {}),
        ("2.5", {}),
        ([1], {}),
        ({"main": "x"}, {}),
        ({"right": True}, {}),
        ({}, {}),
        ({"main": 1.0, "right": 0.5}, {}),
        ({"main": 1.0, "share": 1.5}, {}),
        ({"main": 1.0, "other": 1.0}, {}),
        ({3: 1.0}, {}),
        (10**400, {}),
    ],
    ids=str,
)
def test_what_an_own_grader_returns_becomes_a_grade(returned: object, scores: Mapping[str, float]) -> None:
    found = graded(lambda *_: returned)
    assert found.scores == scores
    assert found.is_graded or found.problem


class OddError(Exception):
    """An exception that can't be printed, because its message can't be made."""

    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x" * 10_000),
        ValueError("\ud800"),
        RecursionError(),
        SystemExit(0),
        OddError(),
        StopIteration(),
        CancelledError(),
        BaseExceptionGroup("several", [ValueError()]),
    ],
)
def test_what_an_own_grader_raises_becomes_a_reason_of_bounded_length(error: BaseException) -> None:
    def fail(*_: object) -> object:
        raise error

    found = graded(fail)
    assert not found.is_graded
    assert found.problem.startswith(f"the grader raised {type(error).__name__}")
    assert len(found.problem) <= 160
    assert found.problem.encode()


@pytest.mark.parametrize("reason", ["two\nlines \x1b[2J", "\ud800 \x00 \r", "x" * 5000])
def test_the_reason_of_an_own_grader_is_one_line_that_a_terminal_can_show(reason: str) -> None:
    def fail(*_: object) -> object:
        raise ValueError(reason)

    other = {"main": 1.0, reason: 1.0}
    for function in (fail, lambda *_: Grade.left_out(reason), lambda *_: other):
        problem = graded(function).problem
        assert problem.isprintable()
        assert 0 < len(problem) <= 160


def test_lack_of_memory_and_an_interrupt_pass_through_an_own_grader() -> None:
    for error in (MemoryError(), KeyboardInterrupt()):

        def fail(*_: object, error: BaseException = error) -> object:
            raise error

        with pytest.raises(type(error)):
            graded(fail)


def test_a_call_that_does_not_return_leaves_out_its_row_and_all_others() -> None:
    never, calls = threading.Event(), []

    def wait(answer: str, *_: object) -> object:
        calls.append(answer)
        return never.wait() if answer == "hang" else 1.0

    grade = bounded(OwnGrader(task=TASK, grade=wait), {}, seconds=0.2)
    assert grade("first", {}).is_graded
    reasons = {grade(answer, {}).problem for answer in ("hang", "third")}
    assert reasons == {"a call of the grader took longer than 0.2 s"}
    assert calls == ["first", "hang"]
    never.set()


def test_a_grader_that_changes_its_row_and_arguments_changes_no_later_grade() -> None:
    def grade(answer: str, row: dict[str, Any], arguments: dict[str, str]) -> object:
        row["answer"].remove(arguments.pop("wanted"))
        return float(len(row["answer"]))

    graded = bounded(OwnGrader(task=TASK, grade=grade), {"wanted": "x"})  # type: ignore[arg-type]
    row = {"answer": ["x", "y"]}
    assert [graded("", row).scores["main"] for _ in range(2)] == [1.0, 1.0]
    assert row == {"answer": ["x", "y"]}


def test_a_declaration_may_hold_the_texts_of_units_and_aggregations_and_refuses_other_texts() -> None:
    score = Score(name="s", unit="value", aggregation="Median")  # type: ignore[arg-type]
    assert (score.unit, score.aggregation) == (Unit.VALUE, Aggregation.MEDIAN)
    for wrong in ({"unit": "share"}, {"aggregation": "Average"}):
        with pytest.raises(ValueError, match="is not a valid"):
            Score(name="s", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["allTokenPerplexity", "perplexity", "", "two words", "a\x1b[2J", "line\nline"])
def test_a_score_has_a_name_of_its_own_that_every_table_can_show(name: str) -> None:
    with pytest.raises(ValueError, match="score"):
        Task(name="own", scores=(Score(name=name),), main=name)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6), st.randoms())
@example([1.7976931348623157e308] * 3, random.Random(0))
@example([-1.7976931348623157e308, -1.7976931348623157e308], random.Random(0))
def test_a_reported_value_is_finite_and_depends_on_no_order(values: list[float], chance: random.Random) -> None:
    other = list(values)
    chance.shuffle(other)
    for aggregation in Aggregation:
        found = aggregation.of(values)
        assert math.isfinite(found)
        assert found == aggregation.of(other)
        assert min(values) <= found <= max(values) or math.isclose(found, values[0])


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just(object()),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["main", "right", "share"]) | st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.lists(anything, max_size=4))
def test_no_returned_value_makes_an_evaluation_fail(returned: list[object]) -> None:
    left = list(returned)
    grades = [graded(lambda *_: left.pop()) for _ in returned]
    found = GradeList.of(TASK, grades)
    assert found.graded + found.not_graded == len(returned)
    assert set(found.reported(TASK)) == (set(TASK.score_names) if found.graded else set())
    assert GradeList.joined(TASK, [GradeList.from_json(found.to_json())]) == found


def test_a_file_system_path_is_no_entry_point(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="entryPoint"):
        grading(entryPoint=f"{tmp_path}/x")
