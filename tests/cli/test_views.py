"""The panel (on a terminal) and the plain lines (elsewhere) show the state of a job. The jobs get their statuses from
the files in tests/cli/jobs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from finetune_cli.state import ending
from finetune_cli.terminal import SafeConsole
from finetune_cli.views.log_lines import new_lines
from finetune_cli.views.panel import render
from finetune_cli.views.watch import LineView, show_until_ended
from finetune_core.api.job import FineTuneJob
from tests.cli.stored import job, stored

NOW = datetime(2026, 11, 24, 2, 3, 0, tzinfo=UTC)


def drawn(shown: FineTuneJob, now: datetime = NOW, width: int = 110) -> str:
    """Return the panel that shows the job ``shown`` at the time ``now``, as text."""
    console = SafeConsole(width=width, color_system=None, force_terminal=True)
    with console.capture() as capture:
        console.print(render(shown, now))
    return capture.get()


def test_a_running_job_shows_how_far_it_is() -> None:
    text = drawn(job("running"))
    for expected in (
        "quickstart · research · LoRA · 2 nodes · CPU",
        "● Running  all 2 ranks report",
        "step 40/100",
        "412.5 tokens/s",
        "1 min 13 s left",  # The report from 2 s ago said that 75 s are left.
        "0.0051  █▆▄▂▁  from 3.9",
        "1.023",
    ):
        assert expected in text


def test_checkpoints_show_size_and_which_is_best_and_last() -> None:
    rows = {line.split()[1]: line for line in drawn(job("running")).splitlines() if "31.6 MB" in line}
    assert "best" in rows["25"]
    assert "last" in rows["40"]
    assert "best" not in rows["20"]


def test_the_best_checkpoint_is_shown_even_when_it_is_old() -> None:
    found = stored("running")
    later = [found["status"]["checkpoints"][0] | {"step": step} for step in range(50, 60)]
    found["status"]["checkpoints"] += later
    text = drawn(FineTuneJob.model_validate(found))
    assert "best" in text
    assert " 50 " not in text


def test_a_lost_attempt_is_shown_with_its_reason() -> None:
    text = drawn(job("running"))
    assert "PodDeleted (free)" in text
    assert "pod quickstart-1a2b3c4d-1-worker-1 was deleted" in text


def test_a_silent_trainer_is_named() -> None:
    text = drawn(job("running"), NOW + timedelta(minutes=5))
    assert "last report 5 min 02 s ago" in text
    assert "left" not in text


def test_a_waiting_job_says_what_it_waits_for() -> None:
    assert "1 Insufficient nvidia.com/gpu" in drawn(job("unschedulable"))


def test_a_job_that_nobody_looked_at_says_so() -> None:
    assert "no operator has looked at it yet" in drawn(job())


def test_a_finished_job_shows_its_artifact_and_no_attempts() -> None:
    text = drawn(job("succeeded"))
    assert "✔ Completed" in text
    assert "s3://finetune/runs/research/quickstart/u/artifacts/000001" in text
    assert "in 5 min 00 s" in text
    assert "attempts" not in text


def test_scores_stand_side_by_side_and_incidents_below() -> None:
    lines = [line.strip("│ ").split() for line in drawn(job("succeeded")).splitlines()]
    assert ["scores", "40", "test", "examples", "base", "step", "100"] in lines
    assert ["right", "answers", "0", "0.975"] in lines
    assert ["function", "0.125", "1"] in lines
    assert "31 LossSpike (3.2, threshold 1.1) RollBack went back to step 25" in " ".join(
        word for line in lines for word in line
    )


def test_the_verdict_on_each_required_score_stands_below_the_scores() -> None:
    lines = [line.strip("│ ").split() for line in drawn(job("gate-failed")).splitlines()]
    words = " ".join(word for line in lines for word in line)
    assert "✘ GateFailed evaluation.require: exact must be at least 0.8 and is 0.75" in words
    assert ["exact", "at", "least", "0.8", "0.25", "0.75", "0.5", "failed"] in lines
    assert ["perplexity", "better", "than", "the", "base", "model", "48.2", "1.5", "-46.7", "passed"] in lines
    assert (
        "tuned model: 4 of 40 answers not graded: 3 because the row has no text to compare with; 1 because the grader"
        " raised KeyError"
    ) in words
    assert "artifacts/000001" in words


def test_lines_tell_the_verdict_and_what_was_not_graded() -> None:
    lines = new_lines(job("running"), job("gate-failed"))
    assert "required exact at least 0.8: failed (base 0.25, tuned 0.75, difference 0.5)" in lines
    assert "required perplexity better than the base model: passed (base 48.2, tuned 1.5, difference -46.7)" in lines
    assert any(line.startswith("tuned model: 4 of 40 answers not graded: 3 because") for line in lines)
    assert new_lines(job("gate-failed"), job("gate-failed")) == []
    end = ending(job("gate-failed"))
    assert end is not None
    assert (end.succeeded, end.reason) == (False, "GateFailed")


@pytest.mark.parametrize(("tuned", "told"), [("21.5", True), ("20", False), ("9.9", False), (None, False)])
def test_a_risen_perplexity_of_all_tokens_is_explained(tuned: str | None, told: bool) -> None:
    scored = stored("gate-failed")
    evaluation = scored["status"]["evaluation"]
    evaluation["base"]["allTokenPerplexity"], evaluation["tuned"]["allTokenPerplexity"] = "20", tuned
    shown = FineTuneJob.model_validate(scored)
    meaning = "The perplexity of all tokens counts the prompts too, and may rise where a job learns only the answers."
    words = " ".join(word for line in drawn(shown).splitlines() for word in line.strip("│ ").split())
    assert (meaning in words) == told
    assert new_lines(job("running"), shown).count(meaning) == told
    assert new_lines(shown, shown) == []


def test_a_required_score_is_shown_with_all_digits_because_a_rounded_one_may_look_like_its_bound() -> None:
    found = stored("gate-failed")
    found["status"]["evaluation"]["requirements"][0] |= {"tuned": "0.799996", "difference": "0.549996"}
    missed = FineTuneJob.model_validate(found)
    assert "0.799996" in drawn(missed)
    line = "required exact at least 0.8: failed (base 0.25, tuned 0.799996, difference 0.549996)"
    assert line in new_lines(job("running"), missed)


def test_a_damaged_checkpoint_is_named() -> None:
    found = stored("running")
    found["status"]["checkpoints"][0]["damaged"] = "manifest.json is missing"
    damaged = FineTuneJob.model_validate(found)
    assert "damaged: manifest.json is missing" in drawn(damaged)
    step = found["status"]["checkpoints"][0]["step"]
    line = f"checkpoint of step {step} is damaged: manifest.json is missing"
    assert line in new_lines(job("running"), damaged)
    assert line in new_lines(None, damaged)
    assert new_lines(damaged, damaged) == []


def test_a_failed_job_shows_the_sentence() -> None:
    assert "✘ BadInput  s3://finetune/data/train.jsonl: row 1 has no field `sentense`" in drawn(job("failed"))


def test_words_from_the_cluster_are_never_markup() -> None:
    found = stored("running")
    found["status"]["attempts"]["recent"][0]["message"] = "row [red]7[/red] of [Pine Ridge] [/]"
    assert "row [red]7[/red] of [Pine Ridge] [/]" in drawn(FineTuneJob.model_validate(found), width=160)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("name", [None, "running", "succeeded", "failed", "unschedulable", "gate-failed"])
def test_the_panel_fits_every_terminal(name: str | None, width: int) -> None:
    assert all(len(line) <= width for line in drawn(job(name), width=width).splitlines())


def test_lines_tell_everything_once() -> None:
    running = job("running")
    lines = new_lines(None, running)
    assert lines[0] == "Running: all 2 ranks report"
    assert "step 40/100, loss 0.0051, perplexity 1.023, 412.5 tokens/s, 1 min 15 s left" in lines
    assert "checkpoint of step 25 committed (31.6 MB, perplexity 1.023)" in lines
    assert new_lines(running, running) == []


def test_a_step_back_after_a_resume_is_a_line() -> None:
    running, earlier = job("running"), stored("running")
    earlier["status"]["progress"] |= {"step": 20, "percentage": 20}
    assert any(line.startswith("step 20/100") for line in new_lines(running, FineTuneJob.model_validate(earlier)))


def test_a_little_progress_is_no_line() -> None:
    running, later = job("running"), stored("running")
    later["status"]["progress"] |= {"step": 42, "percentage": 42}
    assert new_lines(running, FineTuneJob.model_validate(later)) == []


def test_lines_add_up_small_progress() -> None:
    written: list[str] = []
    view = LineView(written.append)
    for step in range(1, 101):
        state = stored("running")
        state["status"]["progress"] |= {"step": step, "percentage": step}
        view.show_job(FineTuneJob.model_validate(state))
    assert 15 <= sum(" step " in line and "/100" in line for line in written) <= 25


def test_watching_ends_with_the_job() -> None:
    written: list[str] = []
    end = show_until_ended(iter([job("running"), job("succeeded"), job("failed")]), LineView(written.append))
    assert end.succeeded
    assert any("artifact of step 100 (9.8 MB)" in line for line in written)
    told = [line.partition("tuned model")[2] for line in written if "tuned model" in line]
    assert told == [
        " on 40 test examples: perplexity 1.002, right answers 0.975, strict 0.975, function 1",
    ]
    assert any("LossSpike at step 31 (RollBack): went back to step 25" in line for line in written)
    assert ending(job("failed")) == show_until_ended([job("failed")], LineView(written.append))
