"""What `finetune validate` and the API server refuse of `dataset.task` and `evaluation.require`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_core.validation.validate_job import validate_job

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"


def problems(task: dict[str, Any] | None, require: list[dict[str, Any]] | None = None, **dataset: Any) -> list[str]:
    """Return the problems of the quickstart job with a task and required scores. ``dataset`` sets further fields of the
    section `dataset`. A field whose value is None counts as absent."""
    job = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    spec = job["spec"]
    spec["dataset"] |= {"task": task, **dataset}
    spec["evaluation"] = {**spec.get("evaluation", {}), "require": require}
    spec["evaluation"].pop("artifactFrom", None)
    return [str(problem) for problem in validate_job(job).problems]


@pytest.mark.parametrize(
    "task",
    [
        {"name": "GSM8K"},
        {"name": "GSM8K", "fields": {"answer": "solution"}},
        {"name": "SQL", "fields": {"answer": "query", "context": "tables"}},
        {"name": "ExactMatch", "ignore": ["Case", "WhiteSpace", "Punctuation", "UnicodeForm"]},
        {"name": "Contains", "oneLine": True},
        {"name": "Regex", "pattern": "Answer: (.)", "ignore": ["Case"]},
        {"name": "Number", "tolerance": "0.01", "relativeTolerance": "1e-3", "marker": "####"},
        {"name": "JSON"},
        {"name": "Choice", "fields": {"choices": "options"}},
        {"entryPoint": "overlap", "fields": {"anything": "x"}, "arguments": {"enough": "0.5"}},
        None,
    ],
    ids=str,
)
def test_a_task_with_its_own_columns_and_arguments_is_valid(task: dict[str, Any] | None) -> None:
    assert problems(task) == []


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({}, "exactly one of `name`, `entryPoint` must be set"),
        ({"name": "GSM8K", "entryPoint": "x"}, "exactly one of `name`, `entryPoint` must be set"),
        ({"name": "GMS8K"}, "must be one of ViGGO, GSM8K, SQL"),
        ({"name": "GSM8K", "fields": {"gold": "x"}}, "`fields` must only have the keys answer where `name` is GSM8K"),
        ({"name": "ViGGO", "fields": {"answer": "x"}}, "`fields` must only have the keys mr where `name` is ViGGO"),
        ({"name": "Regex"}, "`pattern` must be set, because `name` is Regex"),
        ({"name": "GSM8K", "pattern": "x"}, "`pattern` must be absent unless `name` is Regex"),
        (
            {"name": "JSON", "ignore": ["Case"]},
            "`ignore` must be absent unless `name` is ExactMatch, Contains or Regex",
        ),
        ({"name": "ExactMatch", "ignore": ["Colour"]}, "must be one of Case, WhiteSpace, Punctuation, UnicodeForm"),
        ({"name": "JSON", "tolerance": "1"}, "`tolerance` must be absent unless `name` is Number"),
        ({"entryPoint": "x", "marker": "#"}, "`marker` must be absent unless `name` is Number"),
        ({"entryPoint": "GSM8K"}, "`entryPoint` must not be the name of a task of this project"),
        (
            {"name": "Regex", "pattern": "(?<=a)b"},
            "spec.dataset.task.pattern: must be a regular expression in the syntax of RE2: invalid perl operator: (?<",
        ),
        ({"name": "Regex", "pattern": "(((a{100}){100}){100})"}, "spec.dataset.task.pattern: must be a regular"),
        ({"name": "JSON", "arguments": {"a": "b"}}, "`arguments` must be absent unless `entryPoint` is set"),
    ],
    ids=str,
)
def test_what_a_task_does_not_take_is_refused_by_name(task: dict[str, Any], sentence: str) -> None:
    assert any(sentence in problem for problem in problems(task)), problems(task)


def test_the_wrong_entry_and_the_right_ones_are_named() -> None:
    required = [{"score": "exact", "atLeast": "0.5"}, {"score": "accuracy", "atLeast": "0.8"}]
    assert problems({"name": "GSM8K"}, required) == [
        "spec.evaluation.require[1].score: `evaluation.require` must only name scores that the job has, which are"
        " perplexity, allTokenPerplexity, exact: accuracy is none of them"
    ]
    first, second = problems({"name": "SQL", "fields": {"anwser": "a", "answer": "b", "tables": "c"}})
    for found, column in ((first, "anwser"), (second, "tables")):
        assert found == (
            f"spec.dataset.task.fields.{column}: `fields` must only have the keys context, answer where `name` is SQL:"
            f" `{column}` is no such key"
        )


def test_the_wrong_key_is_also_named_where_another_section_is_malformed() -> None:
    found = problems({"name": "JSON", "fields": {"anwser": "a"}}, maxLength=1)
    assert len(found) == 2
    assert found[1].startswith("spec.dataset.task.fields.anwser: `fields` must only")


@pytest.mark.parametrize("rows", ["validation", "test"])
def test_a_task_needs_rows_on_which_answers_are_graded(rows: str) -> None:
    given: dict[str, Any] = {"validation": None, "test": None}
    given[rows] = {"s3": {"uri": "s3://finetune/data/rows.jsonl"}}
    for task in ({"name": "JSON"}, {"entryPoint": "overlap"}):
        assert problems(task, **given) == []
        (found,) = problems(task, validation=None, test=None)
        assert found.startswith("spec.dataset: `task` must be absent unless `validation` or `test` is set, because")
    assert problems(None, validation=None, test=None) == []


@pytest.mark.parametrize(
    ("task", "require"),
    [
        (None, [{"score": "perplexity", "betterThanBase": True}, {"score": "allTokenPerplexity", "atMost": "9"}]),
        ({"name": "GSM8K"}, [{"score": "exact", "atLeast": "0.8"}]),
        ({"name": "JSON"}, [{"score": "keys", "atLeast": "0.8", "betterThanBase": True}]),
        ({"entryPoint": "x"}, [{"score": "reward", "atLeast": "-1.5"}, {"score": "reward", "atLeast": "80"}]),
        ({"name": "GSM8K"}, [{"score": "exact", "atLeast": "1", "atMost": "1.0"}]),
        (None, []),
    ],
    ids=str,
)
def test_scores_that_the_job_has_can_be_required(task: dict[str, Any] | None, require: list[dict[str, Any]]) -> None:
    assert problems(task, require) == []


@pytest.mark.parametrize(
    ("task", "require", "dataset", "sentence"),
    [
        (
            None,
            [{"score": "exact", "atLeast": "0.8"}],
            {},
            "`evaluation.require` must only name scores that the job has",
        ),
        (
            {"name": "ViGGO"},
            [{"score": "exact", "atLeast": "0.8"}],
            {},
            "`evaluation.require` must only name scores that the job has",
        ),
        (
            None,
            [{"score": "perplexity", "atMost": "2"}],
            {"validation": None, "test": None},
            "`evaluation.require` must be absent unless `dataset.validation` or `dataset.test` is set",
        ),
        (None, [{"score": "perplexity"}], {}, "`atLeast`, `atMost` or `betterThanBase: true` must be set"),
        (None, [{"score": "perplexity", "betterThanBase": False}], {}, "`atLeast`, `atMost` or `betterThanBase: true`"),
        (None, [{"score": "perplexity", "atMost": "two"}], {}, "require[0].atMost"),
        (
            {"name": "GSM8K"},
            [{"score": "perplexity", "atMost": "9"}, {"score": "exact", "atLeast": "80"}],
            {},
            "spec.evaluation.require[1].atLeast: must be at most 1: exact is a share, of which 1 means all answers",
        ),
        ({"name": "JSON"}, [{"score": "keys", "atMost": "-0.5"}], {}, "require[0].atMost: must be at least 0"),
        (None, [{"score": "perplexity", "atMost": "0.9"}], {}, "require[0].atMost: must be at least 1, the least"),
        (
            {"entryPoint": "x"},
            [{"score": "reward", "atLeast": "2", "atMost": "1e0"}],
            {},
            "spec.evaluation.require[0].atLeast: must be at most `atMost`, which is 1e0",
        ),
    ],
    ids=str,
)
def test_a_score_that_can_not_exist_or_be_reached_is_refused(
    task: dict[str, Any] | None, require: list[dict[str, Any]], dataset: dict[str, Any], sentence: str
) -> None:
    found = problems(task, require, **dataset)
    assert any(sentence in problem for problem in found), found
