"""Tests of the Prometheus metrics of jobs, of the JSON log lines, and of the rate limit of events."""

from __future__ import annotations

import json
import logging
import tomllib
from datetime import datetime, timedelta
from typing import Any

import pytest
import yaml

from finetune_core.api import FineTuneJobStatus
from finetune_core.api.conditions import Condition, ConditionType, Reason
from finetune_core.api.status import (
    AttemptsStatus,
    CheckpointStatus,
    MetricValue,
    PreflightStatus,
    ProgressStatus,
    UsageStatus,
)
from finetune_operator import __version__
from finetune_operator.kube.api_errors import ApiError
from finetune_operator.observe.stored_job import StoredJob
from finetune_operator.process.logs import JsonFormatter, set_log_fields
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.memory import JobMemory
from finetune_operator.status.event_recorder import EventRecorder
from tests.operator.builders import NOW, REPOSITORY, UID, at
from tests.operator.operators import KEY

SPEC = {"method": "LoRA", "model": {"huggingFace": {"repo": "a/b"}}, "runPolicy": {"queueName": "gpus"}}


def full_status(**update: Any) -> FineTuneJobStatus:
    status = FineTuneJobStatus(
        progress=ProgressStatus(
            step=20,
            total_steps=100,
            percentage=20,
            eta_seconds=80,
            tokens_per_second="1234.5",
            mfu="0.41",
            last_update_time=at(30),
        ),
        preflight=PreflightStatus(start_time=NOW, tries=2, verdict="Passed"),
        metrics=[MetricValue(name="loss", value="1.25", step=20), MetricValue(name="perplexity", value="3.5", step=20)],
        checkpoints=[CheckpointStatus(run=1, step=20, uri="s3://b/c", bytes=9, manifest_sha256="ab", time=NOW)],
        attempts=AttemptsStatus(started=3, charged=1, free=1),
        usage=UsageStatus(gpu_seconds=3600),
    )
    return status.model_copy(update=update)


def condition(kind: ConditionType, status: str, reason: Reason, since: datetime = NOW) -> Condition:
    return Condition.model_validate(
        {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": "m",
            "lastTransitionTime": since,
            "observedGeneration": 1,
        }
    )


def series(metrics: Metrics) -> dict[str, float]:
    lines = metrics.render().decode().splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("finetune_job")
    }


def test_every_number_of_a_job_is_a_series_and_goes_with_the_job() -> None:
    metrics = Metrics(now=lambda: at(90))
    metrics.jobs.update(KEY, SPEC, full_status(conditions=[condition(ConditionType.RUNNING, "True", Reason.RUNNING)]))
    job = '{job_name="quickstart",job_namespace="team"}'
    kinds = {
        kind: f'{{job_name="quickstart",job_namespace="team",kind="{kind}"}}' for kind in ("started", "charged", "free")
    }
    expected = {
        f"finetune_job_step{job}": 20,
        f"finetune_job_total_steps{job}": 100,
        f"finetune_job_eta_seconds{job}": 80,
        f"finetune_job_loss{job}": 1.25,
        f"finetune_job_perplexity{job}": 3.5,
        f"finetune_job_tokens_per_second{job}": 1234.5,
        f"finetune_job_mfu{job}": 0.41,
        f"finetune_job_checkpoint_age_seconds{job}": 90,
        f"finetune_job_report_age_seconds{job}": 60,
        f"finetune_job_preflight_tries{job}": 2,
        'finetune_job_info{job_name="quickstart",job_namespace="team",method="LoRA",model="a/b",queue="gpus"}': 1,
        'finetune_job_condition{job_name="quickstart",job_namespace="team",reason="Running",status="True",'
        'type="Running"}': 1,
        f"finetune_job_attempts{kinds['started']}": 3,
        f"finetune_job_attempts{kinds['charged']}": 1,
        f"finetune_job_attempts{kinds['free']}": 1,
        f"finetune_job_gpu_seconds_total{job}": 3600,
    }
    assert {_sorted(name): value for name, value in series(metrics).items()} == expected
    metrics.jobs.remove(KEY)
    assert series(metrics) == {}


def _sorted(name: str) -> str:
    head, _, labels = name.partition("{")
    return head + "{" + ",".join(sorted(labels.rstrip("}").split(","))) + "}"


def test_a_settled_job_is_shown_for_an_hour() -> None:
    moment = [at(0)]
    metrics = Metrics(now=lambda: moment[0])
    metrics.jobs.update(KEY, {}, full_status(completion_time=NOW))
    moment[0] = at(3599)
    assert series(metrics)
    moment[0] = at(3601)
    assert series(metrics) == {}


def test_a_number_that_is_not_known_has_no_series() -> None:
    metrics = Metrics()
    metrics.jobs.update(KEY, {}, FineTuneJobStatus())
    shown = {name.partition("{")[0] for name in series(metrics)}
    assert shown == {"finetune_job_attempts", "finetune_job_gpu_seconds_total", "finetune_job_info"}


@pytest.mark.parametrize("value", ["0." + "1" * 1_000_000, "one", ""])
def test_a_text_that_is_long_or_no_number_costs_only_its_own_series(value: str) -> None:
    metrics = Metrics()
    loss = MetricValue.model_construct(name="loss", value=value, step=20)
    metrics.jobs.update(KEY, SPEC, full_status().model_copy(update={"metrics": [loss]}))
    shown = {name.partition("{")[0] for name in series(metrics)}
    assert "finetune_job_loss" not in shown
    assert "finetune_job_step" in shown


def test_only_a_running_job_has_ages_and_they_count_from_its_start_at_most() -> None:
    metrics = Metrics(now=lambda: at(7200))
    ages = ("finetune_job_checkpoint_age_seconds", "finetune_job_report_age_seconds")

    def shown(status: FineTuneJobStatus) -> set[float]:
        metrics.jobs.update(KEY, SPEC, status)
        return {value for name, value in series(metrics).items() if name.startswith(ages)}

    assert shown(full_status()) == set()
    waits = condition(ConditionType.RUNNING, "False", Reason.WAITING_FOR_PODS)
    assert shown(full_status(conditions=[waits])) == set()
    resumed = condition(ConditionType.RUNNING, "True", Reason.RUNNING, at(7000))
    assert shown(full_status(conditions=[resumed])) == {200}
    assert shown(full_status(conditions=[resumed], checkpoints=[], progress=None)) == {200}


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"model": None},
        {"model": {"huggingFace": "a/b"}, "method": 7},
        {"model": [], "runPolicy": {"queueName": {}}},
    ],
)
def test_a_spec_of_another_version_gives_empty_texts(spec: dict[str, Any]) -> None:
    metrics = Metrics()
    metrics.jobs.update(KEY, spec, FineTuneJobStatus())
    info = next(name for name in series(metrics) if name.startswith("finetune_job_info"))
    assert all(f'{label}=""' in info for label in ("model", "method", "queue"))


def test_the_version_is_that_of_the_package_and_of_the_chart() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = yaml.safe_load((REPOSITORY / "charts/finetune-operator/Chart.yaml").read_text(encoding="utf-8"))
    assert __version__ == project["version"] == chart["appVersion"]
    assert f'finetune_build_info{{version="{__version__}"}} 1.0' in Metrics().render().decode()


def test_log_lines_of_a_reconcile_name_job_uid_and_attempt_also_lines_of_libraries() -> None:
    record = logging.LogRecord("kubernetes", logging.WARNING, "file", 1, "retry", (), None)
    set_log_fields(job="team/a", uid="u", attempt=2)
    try:
        line = json.loads(JsonFormatter().format(record))
        assert (line["job"], line["uid"], line["attempt"]) == ("team/a", "u", 2)
        record.attempt = 3
        assert json.loads(JsonFormatter().format(record))["attempt"] == 3
    finally:
        set_log_fields()
    assert "job" not in json.loads(JsonFormatter().format(logging.LogRecord("n", 20, "f", 1, "m", (), None)))


class Events:
    """A fake client that records the reasons of created events, or refuses every event."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.refuse = False

    async def create_event(self, _namespace: str, manifest: dict[str, Any]) -> bool:
        if self.refuse:
            raise ApiError(403, "Forbidden", "no events")
        self.reasons.append(manifest["reason"])
        return True


def accepted(status: str, reason: Reason) -> FineTuneJobStatus:
    return FineTuneJobStatus(conditions=[condition(ConditionType.ACCEPTED, status, reason)])


async def test_a_condition_that_flips_creates_one_event_a_minute_for_one_reason() -> None:
    events, clock, memory = Events(), [0.0], JobMemory()
    recorder = EventRecorder(
        events,  # type: ignore[arg-type]
        instance="pod",
        now=lambda: NOW + timedelta(seconds=clock[0]),
        clock=lambda: clock[0],
    )

    async def flip(seconds: float, reason: Reason) -> None:
        clock[0] = seconds
        raw = {"metadata": {"uid": UID}}
        record = StoredJob(key=KEY, manifest=raw, status=accepted("True", Reason.VALID), now=NOW, memory=memory)
        await recorder.record(record, accepted("False", reason))

    # The first flip, at 0:59, creates an event. The next three flips come less than 60 s after it, and so create none,
    # although a new minute of the clock begins at 1:00.
    for seconds in (59.0, 61.0, 100.0, 118.0):
        await flip(seconds, Reason.NAME_CONFLICT)
    assert events.reasons == ["NameConflict"]
    await flip(118.5, Reason.BACKEND_UNAVAILABLE)
    await flip(119.5, Reason.NAME_CONFLICT)
    assert events.reasons == ["NameConflict", "BackendUnavailable", "NameConflict"]


async def test_a_refused_event_stops_nothing() -> None:
    events = Events()
    events.refuse = True
    recorder = EventRecorder(events, instance="pod", now=lambda: NOW, clock=lambda: 0.0)  # type: ignore[arg-type]
    raw = {"metadata": {"uid": UID}}
    record = StoredJob(key=KEY, manifest=raw, status=FineTuneJobStatus(), now=NOW, memory=JobMemory())
    await recorder.record(record, accepted("False", Reason.NAME_CONFLICT))
    assert events.reasons == []
