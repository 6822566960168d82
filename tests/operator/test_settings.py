"""Tests of the command line settings, the JSON logs and the health endpoints."""

from __future__ import annotations

import json
import logging

import pytest
from aiohttp.test_utils import TestClient, TestServer

from finetune_operator.process.health import HealthServer, WatchActivity
from finetune_operator.process.leader_election import LeaderElector, TimedLeaseLock
from finetune_operator.process.logs import JsonFormatter
from finetune_operator.process.metrics import Metrics
from finetune_operator.process.settings import parse_settings
from finetune_operator.queue.work_queue import WorkQueue


def waiting_leadership() -> LeaderElector:
    """Return the elector of a replica that does not hold the Lease."""
    return LeaderElector(TimedLeaseLock("operator", "system", "me", None, lambda: 0.0))


def test_flags_win_over_the_environment() -> None:
    environment = {"FINETUNE_TRAINER_IMAGE": "a", "FINETUNE_WORKERS": "3", "FINETUNE_NAMESPACE": "system"}
    settings = parse_settings(["--trainer-image", "b"], environment)
    assert (settings.trainer_image, settings.workers) == ("b", 3)
    assert settings.report_base_url == "https://finetune-operator.system.svc:8443"


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_settings(["--help"], {})
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--trainer-image", "--watch-namespaces", "--resync-seconds", "--log-level"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--trainer-image", "a", "--workers", "0"],
        ["--trainer-image", "a", "--max-preflights", "0"],
        ["--trainer-image", "a", "-x"],
    ],
)
def test_wrong_settings_end_with_a_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_settings(arguments, {})
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_log_line_is_json_with_the_job() -> None:
    record = logging.LogRecord("name", logging.INFO, "file", 1, "attempt %d", (2,), None)
    record.job = "team/a"
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["job"], line["level"]) == ("attempt 2", "team/a", "info")


async def test_healthz_fails_after_three_periods_without_activity_and_readyz_waits_for_the_first_list() -> None:
    now = [0.0]
    activity = WatchActivity(clock=lambda: now[0])
    leadership = waiting_leadership()
    health = HealthServer(
        activity=activity, queue=WorkQueue(), metrics=Metrics(), leadership=leadership, resync_seconds=300
    )
    async with TestClient(TestServer(health.application())) as client:

        async def status(path: str) -> int:
            async with client.get(path) as response:
                return response.status

        assert (await status("/healthz"), await status("/readyz")) == (200, 503)
        activity.jobs_listed()
        assert await status("/readyz") == 200
        now[0] = 900.0
        assert await status("/healthz") == 200
        now[0] = 901.0
        assert await status("/healthz") == 503
        activity.event_received()
        assert await status("/healthz") == 200
        assert await status("/metrics") == 200


def test_activity_gets_older_until_the_jobs_are_listed() -> None:
    now = [0.0]
    activity = WatchActivity(clock=lambda: now[0])
    assert not activity.ready
    now[0] = 900.0
    assert activity.age() == 900
    activity.jobs_listed()
    assert (activity.age(), activity.ready) == (0, True)
