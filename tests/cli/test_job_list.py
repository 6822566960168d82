"""`finetune list` and `finetune describe` show jobs: the states and figures of their statuses, what to do about them,
and also jobs that this version can't read. No value of a status makes a view fail."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import RenderableType

from finetune_cli.apiserver.job_events import JobEvent, event_of, is_about
from finetune_cli.commands.list_command import listed, without_managed_fields
from finetune_cli.commands.watch_command import exit_code
from finetune_cli.formatting import age, measured, number, sparkline
from finetune_cli.state import Ending
from finetune_cli.terminal import SafeConsole
from finetune_cli.views.columns import ColumnTable, column_lines
from finetune_cli.views.description import description
from finetune_cli.views.job_table import in_order, job_columns, job_rows
from finetune_cli.views.live_table import JobLinesView, TableView, summary
from finetune_cli.views.log_lines import new_lines
from finetune_cli.views.panel import render
from finetune_core.api.job import FineTuneJob
from finetune_core.names import attempt_name
from tests.cli.stored import job, stored

NOW = datetime(2026, 11, 24, 2, 3, 0, tzinfo=UTC)
STATES = (None, "running", "succeeded", "failed", "unschedulable", "gate-failed")
WIDTHS = (20, 40, 80, 160)


def named(state: str | None, name: str, namespace: str = "research") -> dict[str, Any]:
    """Return a stored job called ``name`` with the status in `jobs/<state>.yaml`."""
    found = stored(state)
    found["metadata"] |= {"name": name, "namespace": namespace, "creationTimestamp": "2026-11-24T01:00:00Z"}
    return found


def drawn(page: RenderableType, width: int) -> str:
    """Return ``page`` as a terminal of ``width`` characters shows it."""
    console = SafeConsole(width=width, height=24, color_system=None, force_terminal=True)
    with console.capture() as capture:
        console.print(page)
    return capture.get()


def table(jobs: list[dict[str, Any]], *, wide: bool = False, namespaces: bool = False) -> list[str]:
    """Return the lines of `finetune list` in a pipe."""
    rows = job_rows(in_order(listed(jobs)), NOW, namespaces=namespaces, wide=wide)
    return column_lines(job_columns(namespaces=namespaces, wide=wide), rows)


def test_a_row_tells_how_far_a_job_is() -> None:
    heading, row = table([named("running", "first")])
    assert heading.split() == ["NAME", "METHOD", "STATE", "STEP", "LOSS", "PERPLEXITY", "CHECKPOINT", "LEFT", "AGE"]
    assert row.split() == ["first", "LoRA", "Running", "40/100", "0.0051", "1.023", "40", "1m", "1h3m"]
    heading, row = table([named("failed", "second")], wide=True, namespaces=True)
    assert heading.startswith("NAMESPACE   NAME")
    assert row.startswith("research    second   LoRA     BadInput")
    assert row.endswith("s3://finetune/data/train.jsonl: row 1 has no field `sentense`")


def test_jobs_that_have_not_ended_come_first() -> None:
    jobs = [named("succeeded", "a"), named("running", "z"), named(None, "b"), named("failed", "c")]
    assert [line.split()[0] for line in table(jobs)[1:]] == ["b", "z", "a", "c"]


def test_a_job_of_another_version_does_not_hide_the_others() -> None:
    strange = named("running", "strange")
    strange["spec"]["quantum"] = True
    lines = table([strange, named("running", "known")], wide=True)
    assert lines[1].split()[:3] == ["known", "LoRA", "Running"]
    assert "Unreadable" in lines[2]
    assert lines[2].endswith(
        "`spec.quantum` is unknown to this version of finetune; install the version that the cluster runs"
    )


def test_a_narrow_terminal_leaves_the_least_columns_out_and_cuts_no_name() -> None:
    jobs = [named(state, f"job-{state}") for state in STATES]
    rows = job_rows(listed(jobs), NOW, namespaces=False, wide=False, message=True)
    columns = job_columns(namespaces=False, wide=False, message=True)
    for width in WIDTHS:
        lines = drawn(ColumnTable(columns, rows, one_line=True), width).splitlines()
        assert all(len(line) <= width for line in lines)
        assert len(lines) == 1 + len(jobs)
        if width >= 80:
            assert {"job-gate-failed", "GateFailed", "100/100"} <= set(" ".join(lines).split())
    assert "PERPLEXITY" not in drawn(ColumnTable(columns, rows), 80)
    assert "PERPLEXITY" in drawn(ColumnTable(columns, rows), 160)


def test_a_description_tells_why_attempts_ended_and_what_to_do() -> None:
    found = stored("running")
    found["status"]["plan"] = {"zeroStage": 2, "processes": 2, "microBatchSize": 4, "gradientAccumulationSteps": 2}
    found["status"]["notices"] = ["3 rows were left out"]
    event = JobEvent(NOW, True, "AttemptEnded", "FineTuneJob/quickstart", "attempt 1 ended", 3)
    text = drawn(description(FineTuneJob.model_validate(found), [event], NOW), 160)
    for expected in (
        "s3://finetune/models/smollm2-135m",
        "● Running  all 2 ranks report",
        "CheckpointAvailable  True     Committed",
        "PodDeleted (free)",
        "node node-a: pod quickstart-1a2b3c4d-1-worker-1 was deleted",
        "PodDeleted: Somebody deleted the pod that the message names.",
        "0 of 3 retries are used; 1 attempt ended freely",
        "2 processes, ZeRO stage 2",
        "• 3 rows were left out",
        "(x3)",
        "AttemptEnded",
    ):
        assert expected in text
    failed = drawn(description(job("failed"), "events of research: you may not list it", NOW), 160)
    assert "What to do: Correct the job or the data, and create the job again." in failed
    assert "events of research: you may not list it" in failed
    assert "finetune download quickstart" in drawn(description(job("succeeded"), [], NOW), 160)


HOSTILE = ("\x1b[2J", "", "1e999", "nan", "-1e308", "1e308", "9" * 32, "\u202e1.5", "x" * 1024)


def _places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of all texts and numbers in ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        yield path


def _set(value: Any, path: tuple[str | int, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@pytest.mark.parametrize("value", [*HOSTILE, 10**18, "2026-11-24T02:00:00", "0001-01-01T00:00:00Z"], ids=ascii)
@pytest.mark.parametrize("state", ["running", "succeeded", "gate-failed"])
def test_no_value_of_a_status_makes_a_view_fail(state: str, value: str | int) -> None:
    """Each text and number of a status is replaced by a hostile one, where the models accept that. The API server
    accepts any text as a decimal, and times without a zone."""
    found, changed, before = stored(state), 0, job(state)
    for path in list(_places(found["status"])):
        own = deepcopy(found["status"])
        _set(found["status"], path, value)
        try:
            FineTuneJob.model_validate(found)
            changed += 1
        except ValidationError:
            found["status"] = own
    assert changed
    shown = FineTuneJob.model_validate(found)
    page = drawn(description(shown, [], NOW), 80)
    text = page + drawn(render(shown, NOW), 80)
    text += "\n".join(table([found], wide=True)) + "".join(new_lines(None, shown) + new_lines(before, shown))
    assert "quickstart" in text
    assert "\u202e" not in page


def test_figures_that_are_no_numbers_stay_texts() -> None:
    assert (number("fast"), number("1e999"), measured("nan"), measured("0.5"), measured(None)) == (
        "fast",
        "inf",
        None,
        0.5,
        None,
    )
    assert len(sparkline([-1e308, 1e308, 1.0, 2.0])) == 4
    assert [age(seconds) for seconds in (5, 300, 12000, 10800, 187200, -3)] == ["5s", "5m", "3h20m", "3h", "2d4h", "0s"]


def test_managed_fields_are_left_out() -> None:
    found = named("running", "first")
    found["metadata"]["managedFields"] = [{}]
    assert "managedFields" not in without_managed_fields(found)["metadata"]
    assert without_managed_fields(found)["spec"] == found["spec"]


def test_the_live_table_has_as_many_rows_as_fit_and_counts_the_rest() -> None:
    jobs = listed([named("running", f"job-{number:02d}") for number in range(30)] + [named("failed", "z")])
    view = TableView(SafeConsole(width=100, force_terminal=True), namespaces=False, place="namespace research")
    assert "looking for jobs" in drawn(view.table(NOW, 24), 100)
    view.show_jobs([])
    assert "no job in namespace research yet" in drawn(view.table(NOW, 24), 100)
    view.show_jobs(jobs)
    view.show_notice("lost the connection")
    lines = drawn(view.table(NOW, 24), 100).splitlines()
    assert len(lines) <= 24
    assert lines[-2].startswith("31 jobs: 30 Running, 1 BadInput; 11 not shown")
    assert lines[-1].strip() == "lost the connection"
    view.show_jobs(jobs[:1])
    assert "lost the connection" not in drawn(view.table(NOW, 24), 100)
    assert summary(jobs[:1], 0) == "1 job: 1 Running"


def test_lines_about_several_jobs_name_the_job_and_tell_everything_once() -> None:
    written: list[str] = []
    view = JobLinesView(written.append, namespaces=True)
    strange = named("running", "strange")
    strange["spec"]["quantum"] = True
    view.show_jobs(listed([named("running", "first"), strange]))
    assert written[0].endswith("research/first  Running: all 2 ranks report")
    assert sum("research/strange  Unreadable" in line for line in written) == 1
    told = len(written)
    view.show_jobs(listed([named("running", "first"), strange]))
    assert len(written) == told
    view.show_jobs(listed([named("succeeded", "first")]))
    assert any(line.endswith("research/strange  was deleted") for line in written)
    assert any("research/first  Completed" in line for line in written)


def test_the_exit_code_for_several_jobs_is_that_of_the_worst() -> None:
    gate, crash = Ending(False, "GateFailed", ""), Ending(False, "BadInput", "")
    assert [exit_code(found) for found in ([], [gate], [gate, crash], [crash])] == [0, 3, 1, 1]


def test_events_of_all_programs_are_read_and_those_of_others_left_out() -> None:
    own = attempt_name("quickstart", "u", 2)
    about = {"kind": "Pod", "name": f"{own}-worker-0"}
    old = {"regarding": about, "deprecatedLastTimestamp": "2026-11-24T02:00:00Z", "deprecatedCount": 7, "note": "n"}
    new = {
        "regarding": {"kind": "FineTuneJob", "name": "quickstart", "uid": "u"},
        "eventTime": "2026-11-24T01:00:00.5Z",
    }
    assert event_of(old) == JobEvent(datetime(2026, 11, 24, 2, tzinfo=UTC), False, "", f"Pod/{own}-worker-0", "n", 7)
    assert event_of(new).last.hour == 1
    assert event_of({"eventTime": "soon", "series": {"count": "many"}}).count == 1
    assert is_about(old, "quickstart", "u")
    assert is_about(new, "quickstart", "u")
    assert not is_about(new, "quickstart", "of a former job")
    assert not is_about(old, "quickstart", "of a former job")
    assert not is_about({"regarding": {"kind": "Pod", "name": "quickstart-db-0"}}, "quickstart", "u")
    assert not is_about({}, "quickstart", "u")
