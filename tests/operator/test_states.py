"""Every condition, reason and cause that the operator writes into a status is explained in docs/api.md."""

from __future__ import annotations

import ast
import itertools
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import finetune_operator
from finetune_core.api.attempt_causes import CAUSES, DISRUPTIONS, Cause
from finetune_core.api.condition_reasons import STATES
from finetune_core.api.conditions import ConditionType, Reason
from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import AttemptCause, AttemptsStatus, CurrentAttempt, FineTuneJobStatus, PastAttempt
from finetune_core.contract import Phase, Report
from finetune_operator.decide.decision import JobEnd
from finetune_operator.decide.verdict import Verdict
from finetune_operator.objects.observations import ChildObservation
from finetune_operator.queue.retryable import RetryableError
from finetune_operator.status.conditions import compute_conditions
from finetune_operator.status.inputs import StatusInput
from tests.operator.test_verdict import TABLE

NOW = datetime(2026, 11, 24, tzinfo=UTC)
CAUSE = AttemptCause(verdict=Verdict.FREE, reason="PodDeleted", time=NOW)
PAST = PastAttempt(number=1, verdict=Verdict.FREE, reason="PodDeleted", start_time=NOW, end_time=NOW)
ATTEMPTS = (
    AttemptsStatus(),
    AttemptsStatus(started=1, free=1, recent=[PAST], next_start_time=NOW),
    AttemptsStatus(started=1, current=CurrentAttempt(number=1, start_time=NOW)),
    AttemptsStatus(started=1, current=CurrentAttempt(number=1, start_time=NOW, cause=CAUSE)),
    *(
        AttemptsStatus(started=1, recent=[PAST.model_copy(update={"verdict": Verdict.PERMANENT, "reason": reason})])
        for reason in (Reason.CANCELLED, Reason.DEADLINE_EXCEEDED)
    ),
)
POLICIES = tuple(RunPolicySpec(**policy) for policy in ({}, {"suspend": True}, {"cancel": True}, {"queueName": "gpu"}))
CHILDREN = tuple(ChildObservation(name="c", uid="u", owner_uid="o", replicas=1, suspended=it) for it in (False, True))
CHECKS: tuple[dict[str, Any], ...] = (
    {},
    *({"is_checked": True, "missing": missing} for missing in ("", "no bucket")),
    *(
        {"is_checked": True, "end": JobEnd(succeeded=False, reason=reason, message="m")}
        for reason in (Reason.BAD_INPUT, Reason.DEADLINE_EXCEEDED)
    ),
)
REPORT = Report(
    run=1,
    pod_uid="u",
    phase=Phase.TRAINING,
    ranks=1,
    step=1,
    total_steps=2,
    epoch=0,
    metrics={},
    history=[],
    checkpoints=[],
)
OVERDUE = REPORT.model_copy(update={"checkpoint_problem": "the store is down"})
FINAL = (
    Reason.GATE_FAILED,
    Reason.BAD_INPUT,
    Reason.DIVERGED,
    Reason.OUT_OF_MEMORY,
    Reason.RETRIES_EXHAUSTED,
    Reason.DEADLINE_EXCEEDED,
    Reason.CANCELLED,
)
ENDS = (
    None,
    *(JobEnd(succeeded=True, reason=reason, message="") for reason in (Reason.COMPLETED, Reason.EARLY_STOPPED)),
    *(JobEnd(succeeded=False, reason=reason, message="") for reason in FINAL),
)
PROBLEMS = (
    None,
    *(RetryableError(reason, "") for reason in (Reason.NAME_CONFLICT, Reason.BACKEND_UNAVAILABLE, Reason.BAD_INPUT)),
)


@pytest.mark.parametrize("attempts", ATTEMPTS, ids=["none", "between", "running", "ending", "cancelled", "late"])
def test_every_condition_that_can_be_computed_is_explained(attempts: AttemptsStatus) -> None:
    checks = CHECKS if not attempts.started else ({},)
    reports = (None, REPORT, OVERDUE)
    inputs = itertools.product(ENDS, PROBLEMS, reports, ("", "spec.a: must"), POLICIES, CHILDREN, checks)
    for end, problem, report, invalid, policy, child, check in inputs:
        values: dict[str, Any] = {
            "now": NOW, "generation": 1, "nodes": 1, "ranks": 1, "attempts": attempts, "end": end, "problem": problem,
            "report": report, "invalid": invalid, "policy": policy, "child": child, "ending_pods": 1,
        }  # fmt: skip
        given = StatusInput(**(values | check))
        stored = FineTuneJobStatus()
        conditions = compute_conditions(stored, stored.model_copy(update={"attempts": attempts}), given)
        assert [condition.type for condition in conditions] == list(ConditionType)
        for condition in conditions:
            explained = STATES[ConditionType(condition.type)].get(condition.status, ())
            assert condition.reason in explained, f"{condition.type}={condition.status}, {condition.reason}"


def test_every_reason_in_the_code_is_one_of_the_reasons() -> None:
    """No call that sets a reason passes the reason as a string literal. Reasons are members of the enum `Reason`,
    because `STATES` explains only those."""
    (folder,) = finetune_operator.__path__
    for file in sorted(Path(folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id in ("_State", "JobEnd", "_failed", "RetryableError"):
                texts = [
                    item for item in ast.walk(node) if isinstance(item, ast.Constant) and isinstance(item.value, str)
                ]
                assert all(item.value in ("True", "False", "Unknown", "; ", "") for item in texts), (
                    f"{file}:{node.lineno}"
                )


def test_every_reason_of_an_attempt_is_explained_with_the_verdict_that_it_gets() -> None:
    assert set(CAUSES) == set(Cause)
    for name, (_, expected) in TABLE.items():
        if expected is not None and expected[1] in set(Cause):
            assert CAUSES[Cause(expected[1])][0] == expected[0], name
        elif expected is not None and expected[0] == "Free":
            assert expected[1] in DISRUPTIONS, name
