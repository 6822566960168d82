"""A pod may report any value, if it has a valid token, and may write any termination message. No value keeps the status
of its job from being written, and none keeps the metrics of other jobs from being served."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from finetune_core.api.status import FineTuneJobStatus
from finetune_core.contract import Report, Result
from finetune_core.contract.contract_model import LARGEST_NUMBER
from finetune_core.contract.preflight_result import FoundRun, PlannedNeeds, PreflightResult
from finetune_core.contract.records import AdapterOrigin, EvaluationRecord
from finetune_core.contract.stock_reports import RuntimeStatus, to_report
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import Memory
from tests.operator.builders import NOW, UID, job_manifest
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.skewed_statuses import leaves, value_at

Json = Any
CHECKPOINT = {"run": 1, "step": 1, "uri": "s3://a/b", "bytes": 1, "manifestSha256": "a", "time": "2026-11-24T12:00:00Z"}
SCORES = {"perplexity": 1.5, "allTokenPerplexity": 1.5, "taskScore": 0.5, "scores": {"exact": 0.5}, "graded": 1}
FULL: dict[str, Json] = {
    "version": 1, "run": 1, "phase": "Training", "ranks": 2, "step": 5, "totalSteps": 10, "epoch": 0.5,
    "etaSeconds": 9, "tokensPerSecond": 1.5, "mfu": 0.5, "metrics": {"loss": 1.5, "perplexity": 1.5},
    "resumedFromStep": 0, "history": [{"step": 1, "loss": 1.5, "perplexity": 1.5}], "checkpoints": [CHECKPOINT],
    "checkpointAgeSeconds": 9, "checkpointProblem": "late", "best": {"run": 1, "step": 1}, "notices": ["n"],
    "evaluation": {"rows": "Test", "examples": 1, "base": SCORES, "tuned": SCORES, "tunedStep": 1},
    "incidents": [{"step": 1, "kind": "k", "value": "1", "threshold": "1", "action": "Record", "message": "m"}],
    "attention": "SDPA", "adaptedShare": 0.5,
    "adapter": {"use": "Continue", "source": "s3://a/b", "revision": "r", "jobUid": "99999999", "sha256": "a" * 64},
}  # fmt: skip
"""A report with every field but `podUid` and `result`."""
RESULT: dict[str, Json] = {
    "version": 1, "outcome": "Completed", "message": "m", "step": 5, "checkpoint": "s3://a/b",
    "artifact": {"uri": "s3://a/b", "step": 5, "bytes": 1, "manifestSha256": "ab"}, "evaluation": FULL["evaluation"],
    "nodeFault": True, "phase": "Training",
}  # fmt: skip
"""A termination message of a training pod, with every field."""
CHECKED: dict[str, Json] = {
    "version": 1, "findings": [], "notices": ["n"], "sizes": {"modelBytes": 1, "dataBytes": 1},
    "planned": {
        "gpuMemoryBytes": 1, "memoryBytes": 1 << 30, "cpus": 8, "advice": "spec.method: LoRA",
        "choices": {"zeroStage": 2, "offloadOptimizer": False, "gradientCheckpointing": True, "microBatchSize": 1},
    },
    "found": {
        "runId": "99999999-8888", "uid": "99999999-8888", "time": "2026-11-24T12:00:00Z", "step": 5,
        "artifact": {"run": 2, "bytes": 1, "manifestSha256": "a" * 64, "outcome": "Completed"},
        "evaluation": FULL["evaluation"], "templateDate": "2026-11-24",
    },
}  # fmt: skip
"""A termination message of a preflight check that has found a run, with every field."""
NUMBERS = (0, 1, LARGEST_NUMBER, LARGEST_NUMBER + 1, 2**63, 10**400, 1e308, 5e-324)
TIMES = (
    "1970-01-01T00:00:00Z",
    "2026-11-24T12:00:00",
    "0001-01-01T00:00:00+14:00",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59-14:00",
    0,
    2**63,
)
TEXTS = ("", "\x00", "\x1b[2J", "a\nb", "\ufffd", "é" * 500)


def test_no_field_is_missing_in_the_messages_of_this_file() -> None:
    assert {*FULL, "podUid", "result"} == names(Report)
    assert set(FULL["adapter"]) == names(AdapterOrigin)
    assert set(RESULT) == names(Result)
    assert set(CHECKED) == names(PreflightResult)
    assert set(CHECKED["planned"]) == names(PlannedNeeds)
    assert set(CHECKED["found"]) == names(FoundRun)
    assert set(FULL["evaluation"]) == names(EvaluationRecord)


def names(model: type[BaseModel]) -> set[str]:
    """Return the names that the fields of ``model`` have in JSON."""
    return {field.alias or name for name, field in model.model_fields.items()}


def hostile(full: Json) -> Iterator[tuple[str, Json]]:
    """Yield a description and a message for each hostile value of each place in ``full``. The message is ``full`` with
    the hostile value at that place."""
    for path in leaves(full):
        old = value_at(full, path)
        is_number = isinstance(old, int | float) and not isinstance(old, bool)
        values = TIMES if path[-1] == "time" else NUMBERS if is_number else TEXTS if isinstance(old, str) else ()
        for value in values:
            message = copy.deepcopy(full)
            value_at(message, path[:-1])[path[-1]] = value
            yield f"{path} = {str(value)[:30]}", message


def writable(status: Json) -> None:
    """Assert that the API server could store ``status``: bounds of the CRD, integers of 64 bits, times with a zone."""
    FineTuneJobStatus.model_validate(status)
    for path in leaves(status):
        value = value_at(status, path)
        assert not isinstance(value, int) or -(2**63) <= value < 2**63, path
        if isinstance(path[-1], str) and path[-1].lower().endswith("time") and isinstance(value, str):
            assert datetime.fromisoformat(value).tzinfo is not None, path


@pytest.mark.parametrize("field", sorted(FULL))
async def test_no_value_of_a_report_keeps_the_status_from_being_written(field: str) -> None:
    server, memory = ModelServer(job_manifest(), NOW), Memory(lambda: server.now.timestamp())
    operator = reconciler(server, memory=memory)
    for _ in range(4):
        await operator.reconcile(KEY)
    uid = server.pods[0]["metadata"]["uid"]
    accepted = 0
    for name, body in hostile(FULL):
        if not name.startswith(f"('{field}',"):
            continue
        try:
            report = Report.model_validate_json(json.dumps(body | {"podUid": uid}))
        except ValidationError:
            continue
        accepted += 1
        memory.store_report(KEY, UID, report, server.now)
        for seconds in (11, 20):
            server.pass_time(seconds)
            await operator.reconcile(KEY)
        writable(server.job["status"])
    assert accepted or field in ("version", "phase")


async def test_no_value_of_a_termination_message_keeps_the_status_from_being_written() -> None:
    for name, message in hostile(RESULT):
        server = ModelServer(job_manifest(), NOW)
        operator = reconciler(server)
        for _ in range(2):
            await operator.reconcile(KEY)
        assert server.end_pods(0, json.dumps(message)), name
        for _ in range(3):
            server.pass_time(15)
            await operator.reconcile(KEY)
        writable(server.job["status"])
        assert server.job["status"]["attempts"]["recent"][0]["number"] == 1, name


async def test_no_value_of_the_answer_of_a_check_keeps_the_status_from_being_written() -> None:
    for name, message in hostile(CHECKED):
        server = ModelServer(job_manifest(runPolicy={"preflight": "Run"}), NOW)
        operator = reconciler(server)
        for _ in range(2):
            await operator.reconcile(KEY)
        assert server.end_check(0, json.dumps(message)), name
        for _ in range(3):
            await operator.reconcile(KEY)
        writable(server.job["status"])
        assert server.job["status"]["preflight"]["verdict"] == "Passed", name


@pytest.mark.parametrize("steps", ["1e15", "1e16", "1e300", "1e308"])
async def test_no_number_of_a_stock_report_keeps_the_status_from_being_written(steps: str) -> None:
    server, memory = ModelServer(job_manifest(), NOW), Memory(lambda: server.now.timestamp())
    operator = reconciler(server, memory=memory)
    for _ in range(4):
        await operator.reconcile(KEY)
    uid = server.pods[0]["metadata"]["uid"]
    for step in ("1", "2"):
        metrics = [{"name": "current_step", "value": step}, {"name": "total_steps", "value": steps}]
        status = {"trainerStatus": {"metrics": metrics, "lastUpdatedTime": "2026-11-24T12:00:00Z"}}
        try:
            report = to_report(RuntimeStatus.model_validate(status), uid, 2)
        except ValidationError:
            assert float(steps) > LARGEST_NUMBER
            return
        memory.store_report(KEY, UID, report, server.now)
        server.pass_time(36_000)
        await operator.reconcile(KEY)
        writable(server.job["status"])


def test_no_status_of_one_job_costs_the_metrics_of_the_others() -> None:
    metrics = Metrics(lambda: datetime.now(UTC))
    huge = 10**400
    status = FineTuneJobStatus.model_validate(
        {
            "progress": {"step": huge, "totalSteps": huge, "etaSeconds": huge},
            "usage": {"gpuSeconds": huge},
            "preflight": {"startTime": "2026-11-24T12:00:00Z", "tries": huge},
        }
    )
    metrics.jobs.update(KEY, {}, status)
    metrics.jobs.update(Key("other", "job"), {}, FineTuneJobStatus())
    assert b'job_namespace="other"' in metrics.render()
