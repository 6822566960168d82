"""`judge` decides from the measured scores whether a required score is reached. If a required score is not reached,
`judged` turns the outcome of a training that has published an artifact into GateFailed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.api.evaluation import RequirementSpec
from finetune_core.contract import ArtifactRecord, EvaluationRecord, Outcome, Result, ScoreRecord
from finetune_core.requirements import judge, judged

ARTIFACT = ArtifactRecord(uri="s3://bucket/a", step=10, bytes=1, manifest_sha256="a")


def evaluation(base: dict[str, Any] | None, tuned: dict[str, Any] | None) -> EvaluationRecord:
    def record(values: dict[str, Any] | None) -> ScoreRecord | None:
        return None if values is None else ScoreRecord(**{"perplexity": 5.0, **values})

    return EvaluationRecord(rows="Test", examples=10, base=record(base), tuned=record(tuned))


LOW, HIGH = {"scores": {"exact": 0.25}}, {"scores": {"exact": 0.75}, "perplexity": 2.0}


@pytest.mark.parametrize(
    ("requirement", "base", "tuned", "problem"),
    [
        ({"score": "exact", "at_least": "0.75"}, LOW, HIGH, ""),
        ({"score": "exact", "at_least": "0.8"}, LOW, HIGH, "exact must be at least 0.8 and is 0.75"),
        ({"score": "exact", "at_most": "0.5"}, LOW, HIGH, "exact must be at most 0.5 and is 0.75"),
        ({"score": "exact", "better_than_base": True}, LOW, HIGH, ""),
        (
            {"score": "exact", "better_than_base": True},
            HIGH,
            HIGH,
            "exact must be better than the base model's 0.75 and is 0.75",
        ),
        ({"score": "perplexity", "better_than_base": True}, LOW, HIGH, ""),
        (
            {"score": "perplexity", "better_than_base": True, "at_most": "1"},
            HIGH,
            LOW,
            "perplexity must be at most 1 and must be better than the base model's 2 and is 5",
        ),
        ({"score": "perplexity", "better_than_base": False, "at_most": "5"}, HIGH, LOW, ""),
        (
            {"score": "exact", "better_than_base": True},
            None,
            HIGH,
            "exact must be better than the base model's, which was not measured, and is 0.75",
        ),
        ({"score": "exact", "at_least": "0"}, LOW, {}, "exact was not measured"),
        ({"score": "allTokenPerplexity", "at_most": "9"}, LOW, HIGH, "allTokenPerplexity was not measured"),
        ({"score": "exact", "at_least": "0"}, LOW, None, "exact was not measured"),
        ({"score": "reward", "at_least": "-1.5"}, None, {"scores": {"reward": -1.5}}, ""),
    ],
    ids=str,
)
def test_a_required_score_is_reached_or_a_sentence_says_why_not(
    requirement: dict[str, Any], base: dict[str, Any] | None, tuned: dict[str, Any] | None, problem: str
) -> None:
    (found,) = judge([RequirementSpec(**requirement)], evaluation(base, tuned))
    assert (found.problem, found.passed) == (problem, not problem)


@given(st.floats(1e-9, 1), st.floats(1e-9, 1))
def test_the_status_and_the_trainer_come_to_the_same_judgement(base: float, tuned: float) -> None:
    """The trainer judges scores with all digits, and the operator judges the rounded scores of a termination message.
    `judge` itself rounds the scores, so both judgements are the same."""
    record = evaluation({"scores": {"exact": base}}, {"scores": {"exact": tuned}})
    for bound in (f"{tuned:.6g}", "0.8"):
        required = [RequirementSpec(score="exact", at_least=bound, better_than_base=True)]
        assert judge(required, record) == judge(required, record.rounded())


def test_a_result_becomes_gate_failed_and_names_every_score_that_was_not_reached() -> None:
    record = evaluation(LOW, HIGH)
    result = Result(outcome=Outcome.EARLY_STOPPED, message="trained", artifact=ARTIFACT, evaluation=record)
    required = [
        RequirementSpec(score="exact", at_least="0.9"),
        RequirementSpec(score="perplexity", at_most="1"),
        RequirementSpec(score="perplexity", at_most="3"),
    ]
    failed = judged(result, required)
    assert (failed.outcome, failed.exit_code, failed.artifact) == (Outcome.GATE_FAILED, 0, ARTIFACT)
    assert failed.message == (
        "evaluation.require: exact must be at least 0.9 and is 0.75; perplexity must be at most 1 and is 2; trained"
    )
    assert judged(result, required[2:]) == result
    assert judged(result, None) == result
    unfinished = result.model_copy(update={"outcome": Outcome.STOPPED, "artifact": None})
    assert judged(unfinished, required) == unfinished
