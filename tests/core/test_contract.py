"""The messages between operator and trainer have a version and a largest size. Unknown and malformed content is
refused.
"""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_core.api.status import CHECKPOINT_LIMIT, HISTORY_LIMIT, INCIDENT_LIMIT, METRIC_LIMIT, NOTICE_LIMIT
from finetune_core.contract import (
    EXIT_CODES,
    IDENTITY_VARIABLES,
    REPORT_LIMIT_BYTES,
    RESULT_LIMIT_BYTES,
    ArtifactRecord,
    CheckpointRecord,
    CurvePoint,
    EvaluationRecord,
    Identity,
    Incident,
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


def test_every_outcome_has_an_exit_code_and_only_those_with_an_artifact_have_zero() -> None:
    assert set(EXIT_CODES) == set(Outcome)
    zero = {outcome for outcome, code in EXIT_CODES.items() if code == 0}
    assert zero == {Outcome.COMPLETED, Outcome.EARLY_STOPPED, Outcome.GATE_FAILED}


def test_identity_comes_from_the_environment() -> None:
    identity = Identity.from_environment(ENVIRONMENT)
    assert (identity.namespace, identity.attempt, identity.node_rank) == ("team", 2, 0)


@pytest.mark.parametrize("variable", sorted(IDENTITY_VARIABLES.values()))
def test_a_missing_variable_is_named(variable: str) -> None:
    environment = {key: value for key, value in ENVIRONMENT.items() if key != variable}
    with pytest.raises(UserError, match=variable):
        Identity.from_environment(environment)


@pytest.mark.parametrize("text", ["two", "0", "-1", "1000", "1.5", "\u00b2", "9" * 5000])
def test_a_malformed_attempt_is_named(text: str) -> None:
    with pytest.raises(UserError, match="FTJ_ATTEMPT: must be a whole number from 1 to 999"):
        Identity.from_environment({**ENVIRONMENT, "FTJ_ATTEMPT": text})


@pytest.mark.parametrize("text", ["one", "-1", "1.5", "\u00b2"])
def test_a_malformed_rank_is_named(text: str) -> None:
    with pytest.raises(UserError, match="PET_NODE_RANK: must be a whole number"):
        Identity.from_environment({**ENVIRONMENT, "PET_NODE_RANK": text})


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
    """The scores are those of ViGGO, because no other task of this project has as many: five for the base model and
    five for the tuned model."""
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


def checkpoints(count: int, uri: str = "s3://bucket/run") -> list[CheckpointRecord]:
    """Return ``count`` records of checkpoints, oldest first, each with the address ``uri``."""
    return [
        CheckpointRecord(run=1, step=step, uri=uri, bytes=10**12, manifest_sha256="f" * 64, time=datetime.now(UTC))
        for step in range(count)
    ]


def full_report(**changes: Any) -> Report:
    plain = Report(
        run=1,
        pod_uid="p" * 64,
        phase=Phase.TRAINING,
        ranks=8,
        step=1,
        total_steps=2,
        epoch=0.5,
        metrics={},
        history=[],
        checkpoints=[],
    )
    return plain.model_copy(update=changes)


def test_a_report_of_usual_size_is_sent_as_it_is() -> None:
    report = full_report(checkpoints=checkpoints(CHECKPOINT_LIMIT), notices=["ä"])
    assert report.to_body() == report.to_json().encode()


def test_a_hundred_checkpoints_with_long_addresses_fit_into_a_report_and_the_newest_are_kept() -> None:
    report = full_report(checkpoints=checkpoints(CHECKPOINT_LIMIT, "s3://" + "ä" * 1019), notices=["first", "last"])
    assert len(report.to_json().encode()) > 3 * REPORT_LIMIT_BYTES
    body = report.to_body()
    sent = Report.model_validate_json(body)
    assert len(body) <= REPORT_LIMIT_BYTES
    assert sent.checkpoints == report.checkpoints[-len(sent.checkpoints) :]
    assert len(body) > REPORT_LIMIT_BYTES - 2500, "no more is left out than needed"
    assert sent.notices == report.notices


TEXTS = st.sampled_from(["x", "ä", "\u2603", "\U0001f600", '"', "\x00"])
"""Characters that take one to six bytes in JSON."""


@given(
    characters=st.tuples(TEXTS, TEXTS, TEXTS, TEXTS),
    counts=st.tuples(st.integers(0, CHECKPOINT_LIMIT), st.integers(0, INCIDENT_LIMIT), st.integers(0, NOTICE_LIMIT)),
    message=st.integers(0, 2 * REPORT_LIMIT_BYTES),
)
@settings(max_examples=40)
def test_whatever_a_report_holds_fits_and_only_its_oldest_items_are_missing(
    characters: tuple[str, str, str, str], counts: tuple[int, int, int], message: int
) -> None:
    uri, told, noticed, ended = characters
    incident = Incident(
        step=1, kind="k" * 32, value="v" * 32, threshold="t" * 32, action="RollBack", message=told * 512
    )
    report = full_report(
        metrics={noticed * 60 + str(number): 1.0 for number in range(METRIC_LIMIT)},
        history=[CurvePoint(step=10**9 + step, loss=0.123456789, perplexity=1e9) for step in range(HISTORY_LIMIT)],
        checkpoints=checkpoints(counts[0], uri * 1024),
        incidents=[incident.model_copy(update={"step": step}) for step in range(counts[1])],
        notices=[noticed * 512] * counts[2],
        checkpoint_problem=told * 512,
        result=Result(outcome=Outcome.STOPPED, message=ended * message, checkpoint=uri * 1024),
    )
    body = report.to_body()
    assert len(body) <= REPORT_LIMIT_BYTES
    sent = json.loads(body)
    whole = json.loads(report.to_json())
    for name in ("checkpoints", "incidents", "notices", "history"):
        assert whole[name][len(whole[name]) - len(sent[name]) :] == sent[name]
    assert whole["result"]["message"].startswith(sent["result"]["message"])
    assert {key: value for key, value in sent.items() if key not in CUT} == {
        key: value for key, value in whole.items() if key not in CUT
    }


CUT = {"checkpoints", "incidents", "notices", "history", "result"}
"""The fields of a report that may be shortened to keep the report within its largest size. No other field may be
shortened."""
