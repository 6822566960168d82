"""docs/tasks.md and the allowed values of `dataset.task.name` are generated from the declared tasks. A declaration with
a mistake, such as too many scores, is refused."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.task_declaration import SCORE_LIMIT, SCORE_NAME_LENGTH, Column, Score, Unit
from finetune_core.tasks import GSM8K, TASKS, main_score_label, main_score_text
from finetune_core.tasks_page import TASKS_PAGE, tasks_page

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_page_is_the_generated_one() -> None:
    assert (ROOT / "docs" / TASKS_PAGE).read_text(encoding="utf-8") == tasks_page(), "run: make docs"


def test_the_field_takes_every_declared_task_and_nothing_else() -> None:
    field = openapi_schema(FineTuneJobSpec)["properties"]["dataset"]["properties"]["task"]
    assert field["properties"]["name"]["enum"] == list(TASKS)


def test_the_page_shows_a_whole_package_with_a_grader() -> None:
    (shown,) = re.findall(r"^```toml\n(.*?)^```", tasks_page(), re.MULTILINE | re.DOTALL)
    project = tomllib.loads(shown)["project"]
    assert {"name", "version"} <= project.keys()
    assert project["entry-points"] == {"finetune_trainer.graders": {"overlap": "my_graders:overlap"}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"scores": ()}, "1 to 8 scores"),
        ({"scores": tuple(Score(name=f"s{n}", meaning="") for n in range(SCORE_LIMIT + 1))}, "1 to 8 scores"),
        ({"scores": (Score(name="exact", meaning=""),) * 2}, "different names"),
        ({"scores": (Score(name="e" * (SCORE_NAME_LENGTH + 1), meaning=""),)}, "at most 32 characters"),
        ({"columns": (Column(name="answer"),) * 2}, "columns of different names"),
        ({"main": "other"}, "other is none of them"),
        ({"scores": (Score(name="perplexity", meaning=""),), "main": "perplexity"}, "no score may be called"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        replace(GSM8K, **change)


def test_sentences_name_shares_of_right_answers_and_means_of_partial_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main_score_text("GSM8K", 0.9) == "90.0% of the answers right"
    assert main_score_text("GSM8K", 0.9, answers=50) == "90.0% of 50 answers right"
    assert main_score_label("GSM8K") == main_score_label(None) == "right answers"
    words = Score(name="words", meaning="The words are right.", unit=Unit.PARTIAL_CREDIT)
    monkeypatch.setitem(TASKS, "Words", replace(GSM8K, name="Words", scores=(words,), main="words"))
    assert main_score_text("Words", 0.9) == "words 90.0%"
    assert main_score_text("Words", 0.9, answers=50) == "words 90.0% (mean of 50 answers)"
    assert main_score_label("Words") is None


def test_the_sentence_about_an_own_grader_names_the_grader_and_its_value() -> None:
    assert main_score_text("overlap", 12.345, answers=50) == "overlap 12.35 (over 50 answers)"
    assert main_score_label("overlap") is None
