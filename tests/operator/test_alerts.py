"""The alert rules of the chart, run by Prometheus' own rule engine on the metrics that the operator serves.

Each scenario lasts four hours. For every minute, the scenario sets the state of the operator's replicas, and the
metrics that the replicas then serve become the input of `promtool test rules`. A rule that fires in no scenario fails a
test.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from finetune_core.api import FineTuneJobStatus
from finetune_core.api.conditions import ConditionType, Reason
from finetune_core.api.status import CheckpointStatus, ProgressStatus
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.key import Key
from tests.cluster.packages import unpacked_program
from tests.operator.builders import REPOSITORY
from tests.operator.operators import KEY
from tests.operator.test_job_metrics import SPEC, condition

RULES = REPOSITORY / "charts/finetune-operator/files/alerts.yaml"
EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
"""Time of minute 0 of every scenario. promtool begins to count at this time, too."""
MINUTES = 240


def minute(number: float) -> datetime:
    """Return the time ``number`` minutes after the beginning of a scenario."""
    return EPOCH + timedelta(minutes=number)


@dataclass
class Replica:
    """A replica of the operator that Prometheus scrapes, and the minute of the newest scrape."""

    minute: int = 0
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(now=lambda: minute(self.minute))

    def leads(self) -> Replica:
        """Set the metrics of a leader that has nothing to do and whose certificate is valid for 60 days; return the
        replica."""
        self.metrics.leader.set(1)
        self.metrics.certificate_expiry.set(minute(60 * 24 * 60).timestamp())
        return self

    def shows(self, status: FineTuneJobStatus) -> Replica:
        self.metrics.jobs.update(KEY, SPEC, status)
        return self


def status(
    succeeded: tuple[str, Reason] = ("Unknown", Reason.RUNNING),
    *,
    accepted: tuple[str, Reason] = ("True", Reason.VALID),
    running_since: float | None = 0,
    checkpoint: tuple[str, Reason] = ("True", Reason.COMMITTED),
    checkpoint_minute: float | None = None,
    step: int = 0,
    reported: float = 0,
    ended: float | None = None,
) -> FineTuneJobStatus:
    """Return a status. ``succeeded``, ``accepted`` and ``checkpoint`` are the status and the reason of a condition.
    Times are minutes of the scenario; ``running_since`` is None while the job does not run."""
    runs = running_since is not None
    conditions = [
        condition(ConditionType.ACCEPTED, *accepted, minute(0)),
        condition(
            ConditionType.RUNNING, str(runs), Reason.RUNNING if runs else Reason.SETTLED, minute(running_since or 0)
        ),
        condition(ConditionType.CHECKPOINT_AVAILABLE, *checkpoint, minute(0)),
        condition(ConditionType.SUCCEEDED, *succeeded, minute(0)),
    ]
    committed = CheckpointStatus(
        run=1, step=step, uri="s3://b/c", bytes=9, manifest_sha256="ab", time=minute(checkpoint_minute or 0)
    )
    return FineTuneJobStatus(
        conditions=conditions,
        progress=ProgressStatus(step=step, total_steps=1000, last_update_time=minute(reported)),
        checkpoints=[committed] if checkpoint_minute is not None else [],
        completion_time=None if ended is None else minute(ended),
    )


World = Mapping[str, Replica]
Play = Callable[[int], World]
"""Returns, for a minute, the replicas that Prometheus can scrape, by the name of their pod."""


def healthy(number: int) -> World:
    """A leader and a waiting replica; the job trains, and commits a checkpoint every ten minutes."""
    job = status(step=number + 1, reported=number, checkpoint_minute=number // 10 * 10)
    return {"one": Replica(number).leads().shows(job), "two": Replica(number)}


def one_leader(make: Callable[[int], FineTuneJobStatus]) -> Play:
    """Return a `Play` with one replica, the leader. In each minute its job has the status that ``make`` returns for
    this minute."""
    return lambda number: {"one": Replica(number).leads().shows(make(number))}


def queue_of(seconds: float) -> Play:
    def play(number: int) -> World:
        replica = Replica(number).leads()
        replica.metrics.queue_age_seconds.set(seconds)
        return {"one": replica}

    return play


def certificate_for(days: float) -> Play:
    def play(number: int) -> World:
        replica = Replica(number).leads()
        replica.metrics.certificate_expiry.set(minute(days * 24 * 60).timestamp())
        return {"one": replica, "two": Replica(number)}

    return play


def two_releases(number: int) -> World:
    job = status(step=number + 1, reported=number, checkpoint_minute=number)
    return {name: Replica(number).leads().shows(job) for name in ("one", "two")}


def two_confined_releases(number: int) -> World:
    """Two installations that serve different namespaces, as the chart's `watchNamespaces` allows."""
    first, second = Replica(number).leads(), Replica(number).leads()
    job = status(step=number + 1, reported=number, checkpoint_minute=number)
    first.metrics.jobs.update(Key("a", "job"), SPEC, job)
    second.metrics.jobs.update(Key("b", "job"), SPEC, job)
    return {"one": first, "two": second}


def takeover(number: int) -> World:
    """The leader is killed in minute 60, and another replica shows the job from minute 61 on."""
    job = status(step=number + 1, reported=number, checkpoint_minute=number // 10 * 10)
    if number < 60:
        return {"one": Replica(number).leads().shows(job), "two": Replica(number)}
    return {"two": Replica(number).leads().shows(job)} if number > 60 else {"two": Replica(number)}


def succeeds(number: int) -> FineTuneJobStatus:
    """The job trains, and ends in minute 60. The leader serves the job's metrics for one more hour."""
    if number < 60:
        return status(step=number * 16, reported=number, checkpoint_minute=number)
    return status(
        ("True", Reason.COMPLETED), running_since=None, step=1000, reported=60, checkpoint_minute=57, ended=60
    )


def suspended(number: int) -> FineTuneJobStatus:
    """The job is suspended in minute 60 and resumed in minute 180."""
    if number < 60:
        return status(step=number + 1, reported=number, checkpoint_minute=number)
    if number < 180:
        return status(("Unknown", Reason.SUSPENDED), running_since=None, step=61, reported=60, checkpoint_minute=60)
    return status(running_since=180, step=number - 118, reported=number, checkpoint_minute=max(60, number - 5))


def failed(reason: Reason) -> Callable[[int], FineTuneJobStatus]:
    def make(number: int) -> FineTuneJobStatus:
        if number < 60:
            return status(step=number + 1, reported=number, checkpoint_minute=number)
        return status(("False", reason), running_since=None, step=60, reported=60, checkpoint_minute=59, ended=60)

    return make


def evaluates(number: int) -> FineTuneJobStatus:
    """The base model is scored in the first hour, before step 1. The last step ends in minute 123, and from then on the
    tuned model is scored."""
    step = max(0, min(1000, (number - 60) * 16))
    return status(step=step, reported=number, checkpoint_minute=min(number, 122))


NOTHING: Mapping[int, set[str]] = {number: set() for number in range(10, MINUTES, 10)}
SCENARIOS: dict[str, tuple[Play, Mapping[int, set[str]]]] = {
    "healthy": (healthy, NOTHING),
    "takeover": (takeover, NOTHING),
    "two confined installations": (two_confined_releases, NOTHING),
    "succeeds": (one_leader(succeeds), NOTHING),
    "suspended and resumed": (one_leader(suspended), NOTHING),
    "long evaluations": (one_leader(evaluates), NOTHING),
    "cancelled": (one_leader(failed(Reason.CANCELLED)), NOTHING),
    "queued": (
        one_leader(
            lambda _: status(("Unknown", Reason.QUEUED), running_since=None, checkpoint=("False", Reason.NONE_YET))
        ),
        NOTHING,
    ),
    "nothing was ever scraped": (lambda _: {}, {4: set(), 6: {"FineTuneOperatorGone"}, 200: {"FineTuneOperatorGone"}}),
    "gone after an hour": (
        lambda number: healthy(number) if number < 60 else {},
        {59: set(), 63: set(), 66: {"FineTuneOperatorGone"}, 239: {"FineTuneOperatorGone"}},
    ),
    "only waiting replicas": (
        lambda number: {"one": Replica(number), "two": Replica(number)},
        {4: set(), 6: {"FineTuneOperatorGone"}},
    ),
    "two installations": (two_releases, {9: set(), 11: {"FineTuneTwoInstallations"}}),
    "old queue": (queue_of(90), {4: set(), 6: {"FineTuneQueueIsOld"}}),
    "young queue": (queue_of(30), NOTHING),
    "certificate ends in 5 days": (certificate_for(5), {9: set(), 11: {"FineTuneReportCertificateEnds"}}),
    "certificate ends in 20 days": (certificate_for(20), NOTHING),
    "failed": (
        one_leader(failed(Reason.RETRIES_EXHAUSTED)),
        {59: set(), 61: {"FineTuneJobFailed"}, 119: {"FineTuneJobFailed"}, 125: set()},
    ),
    "waits for its Secret": (
        one_leader(
            lambda _: status(
                ("Unknown", Reason.PREFLIGHT),
                accepted=("False", Reason.OUTSIDE_FAILURE),
                running_since=None,
                checkpoint=("False", Reason.NONE_YET),
            )
        ),
        {29: set(), 31: {"FineTuneJobWaits"}},
    ),
    "refused at once": (
        one_leader(
            lambda _: status(
                ("False", Reason.BAD_INPUT), accepted=("False", Reason.BAD_INPUT), running_since=None, ended=0
            )
        ),
        {31: {"FineTuneJobFailed"}, 70: set()},
    ),
    "no step any more, reports come": (
        one_leader(lambda number: status(step=min(number, 60) + 1, reported=number, checkpoint_minute=number)),
        {60: set(), 100: set(), 110: {"FineTuneJobStalled"}},
    ),
    "no reports any more": (
        one_leader(lambda number: status(step=min(number, 60) + 1, reported=min(number, 60), checkpoint_minute=number)),
        {60: set(), 74: set(), 95: {"FineTuneJobStalled"}},
    ),
    "never a report": (
        one_leader(lambda number: status(step=0, reported=0, checkpoint_minute=number)),
        {14: set(), 35: {"FineTuneJobStalled"}},
    ),
    "the store takes no checkpoint": (
        one_leader(
            lambda number: status(step=number + 1, reported=number, checkpoint=("False", Reason.CHECKPOINT_OVERDUE))
        ),
        {4: set(), 6: {"FineTuneJobCheckpointOverdue"}},
    ),
    "four hours without a checkpoint, and none before": (
        one_leader(lambda number: status(running_since=-60, step=number + 1, reported=number)),
        {179: set(), 187: {"FineTuneJobCheckpointOverdue"}},
    ),
    "overdue when it was suspended": (
        one_leader(
            lambda number: status(
                ("Unknown", Reason.SUSPENDED),
                running_since=None,
                step=60,
                checkpoint=("True", Reason.CHECKPOINT_OVERDUE),
                checkpoint_minute=0,
            )
        ),
        NOTHING,
    ),
}


@pytest.fixture(scope="module")
def promtool() -> Path:
    """The program `promtool`, which checks and runs rules without a server."""
    found = unpacked_program("prometheus")
    if found is None:
        # The rules need Prometheus' own engine. `make test` prepares the program before it runs the tests.
        pytest.skip("no promtool: `python -m tests.cluster prepare` unpacks it, or FINETUNE_TOOL_PROMTOOL names it")
    return found


def samples(world: World) -> dict[str, float]:
    """Return the series that Prometheus stores after a scrape of all replicas, with the labels of their pods."""
    found: dict[str, float] = {}
    for pod, replica in world.items():
        for line in replica.metrics.render().decode().split("\n"):
            series, _, value = line.rpartition(" ")
            if series and not line.startswith("#") and (name := stored_name(series, pod)):
                found[name] = float(value)
    return found


@functools.cache
def stored_name(series: str, pod: str) -> str:
    """Return the name under which Prometheus stores ``series`` of ``pod``, with all labels; an empty text for series
    whose name ends with `_bucket` or `_created`. No rule reads those. The results are cached, because the scrapes of
    all minutes contain the same few series."""
    (family,) = text_string_to_metric_families(f"{series} 0\n")
    (sample,) = family.samples
    if sample.name.endswith(("_bucket", "_created")):
        return ""
    labels = {**sample.labels, "namespace": "finetune-operator", "pod": pod, "job": "finetune-operator"}
    text = ",".join(f"{name}={json.dumps(value)}" for name, value in sorted(labels.items()))
    return f"{sample.name}{{{text}}}"


def input_series(play: Play) -> list[dict[str, str]]:
    """Return the series of all minutes of a scenario, in the notation of promtool."""
    scrapes = [samples(play(number)) for number in range(MINUTES)]
    series = []
    for name in sorted({name for scrape in scrapes for name in scrape}):
        values, before = [], False
        for scrape in scrapes:
            # A series that disappears gets one staleness marker in promtool's notation, and no sample after it.
            values.append(f"{scrape[name]:.17g}" if name in scrape else "stale" if before else "_")
            before = name in scrape
        series.append({"series": name, "values": " ".join(values)})
    return series


def rule_names() -> set[str]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"]}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_alerts_of_a_scenario_fire_when_they_should(name: str, promtool: Path, tmp_path: Path) -> None:
    play, expected = SCENARIOS[name]
    expressions: list[dict[str, Any]] = [
        {
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
            "eval_time": f"{number}m",
            "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(alerts)],
        }
        for number, alerts in expected.items()
    ]
    test = {"interval": "1m", "input_series": input_series(play), "promql_expr_test": expressions}
    file = tmp_path / "test.yaml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", file], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_every_rule_fires_in_a_scenario_and_is_quiet_in_a_healthy_one() -> None:
    fired = {alert for _, expected in SCENARIOS.values() for alerts in expected.values() for alert in alerts}
    assert fired == rule_names()
    assert not any(SCENARIOS["healthy"][1].values())


def test_the_rules_are_valid_for_prometheus(promtool: Path) -> None:
    done = subprocess.run([promtool, "check", "rules", RULES], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
