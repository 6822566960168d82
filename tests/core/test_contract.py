"""The messages between operator and trainer have a version and a largest size. Unknown and malformed content is
refused.
"""

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_core.contract import (
    EXIT_CODES,
    IDENTITY_VARIABLES,
    RESULT_LIMIT_BYTES,
    ArtifactRecord,
    EvaluationRecord,
    Identity,
    Outcome,
    Phase,
    Report,
    Result,
    ScoreRecord,
    report_audience,
)
from finetune_core.errors import UserError

ENVIRONMENT = {
    "FTJ_NAMESPACE": "team",
    "FTJ_NAME": "quickstart",
    "FTJ_UID": "0c1d",
    "FTJ_ATTEMPT": "2",
    "FTJ_POD_NAME": "quickstart-worker-0",
    "FTJ_POD_UID": "9f",
    "PET_NODE_RANK": "0",
}


@given(message=st.text(max_size=6000), step=st.integers(0, 10**9))
def test_result_fits_a_termination_message_and_comes_back(message: str, step: int) -> None:
    artifact = ArtifactRecord(uri="s3://bucket/" + "a" * 300, step=step, bytes=10**12, manifest_sha256="f" * 64)
    result = Result(outcome=Outcome.COMPLETED, message=message, step=step, checkpoint="s3://b/c", artifact=artifact)
    text = result.to_termination_message()
    assert len(text.encode()) <= RESULT_LIMIT_BYTES
    parsed = Result.from_termination_message(text)
    assert parsed is not None
    assert parsed.artifact == artifact
    assert parsed.step == step
    assert message.startswith(parsed.message.removesuffix("…")) or parsed.message == message


@pytest.mark.parametrize(
    "text", ["", "Traceback (most recent call last):", "{}", '{"version":2,"outcome":"Completed"}']
)
def test_something_else_is_no_result(text: str) -> None:
    assert Result.from_termination_message(text) is None


def test_every_outcome_has_an_exit_code_and_only_success_is_zero() -> None:
    assert set(EXIT_CODES) == set(Outcome)
    zero = {outcome for outcome, code in EXIT_CODES.items() if code == 0}
    assert zero == {Outcome.COMPLETED, Outcome.EARLY_STOPPED}


def test_identity_comes_from_the_environment() -> None:
    identity = Identity.from_environment(ENVIRONMENT)
    assert (identity.namespace, identity.attempt, identity.node_rank) == ("team", 2, 0)


@pytest.mark.parametrize("variable", sorted(IDENTITY_VARIABLES.values()))
def test_a_missing_variable_is_named(variable: str) -> None:
    environment = {key: value for key, value in ENVIRONMENT.items() if key != variable}
    with pytest.raises(UserError, match=variable):
        Identity.from_environment(environment)


def test_a_malformed_attempt_is_named() -> None:
    with pytest.raises(UserError, match="FTJ_ATTEMPT: must be a whole number"):
        Identity.from_environment({**ENVIRONMENT, "FTJ_ATTEMPT": "two"})


def _report(**changes: object) -> str:
    report = {
        "version": 1, "run": 1, "podUid": "u", "phase": "Training", "ranks": 2, "step": 3, "totalSteps": 10,
        "epoch": 0.1, "metrics": {"loss": 1.5}, "history": [], "checkpoints": [], **changes,
    }  # fmt: skip
    return json.dumps(report)


def test_a_report_is_read_back() -> None:
    report = Report.model_validate_json(_report())
    assert report.phase is Phase.TRAINING
    assert Report.model_validate_json(report.to_json()) == report


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"unknown": 1},
        {"step": -1},
        {"metrics": {"loss": float("nan")}},
        {"metrics": {"loss": float("inf")}},
        {"history": [{"step": n} for n in range(61)]},
        {"notices": ["x" * 513]},
    ],
)
def test_a_report_that_lies_about_its_form_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Report.model_validate_json(_report(**changes))


def test_times_survive_the_wire() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    record = {"run": 1, "step": 5, "uri": "s3://b/c", "bytes": 7, "manifestSha256": "a", "time": now.isoformat()}
    report = Report.model_validate_json(_report(checkpoints=[record]))
    assert report.checkpoints[0].time == now


def test_each_job_has_its_own_audience() -> None:
    assert report_audience("a") != report_audience("b")


def test_a_result_with_all_scores_of_a_task_keeps_its_message() -> None:
    """ViGGO is used, because it has the most scores of all tasks: five for each of the two models."""
    names = ("strict", "orderFree", "function", "attributes", "values")
    score = ScoreRecord(
        perplexity=1.0234567890123,
        all_token_perplexity=12.345678901234,
        task_score=0.94736842105263,
        scores={name: 0.94736842105263 - index / 7 for index, name in enumerate(names)},
        graded=1083,
    )
    evaluation = EvaluationRecord(rows="Validation", examples=1083, base=score, tuned=score, tuned_step=4000).rounded()
    assert evaluation.base is not None
    assert evaluation.base.scores["orderFree"] == 0.804511
    root = f"s3://{'b' * 30}/{'n' * 20}/{'j' * 30}/{'u' * 36}"
    message = "the artifact is the model of step 4000, validation perplexity 1.023, 94.7% of the answers right"
    result = Result(
        outcome=Outcome.COMPLETED,
        message=message,
        step=4000,
        artifact=ArtifactRecord(uri=f"{root}/artifacts/000001", step=4000, bytes=41_258_000, manifest_sha256="0" * 64),
        evaluation=evaluation,
    )
    text = result.to_termination_message()
    assert len(text.encode()) <= RESULT_LIMIT_BYTES
    assert Result.from_termination_message(text) == result
