"""What `finetune run` shows: the reports of the trainer over the loopback interface, lines for a pipe, the view of a
terminal, and the examples of a dry run."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import requests

from finetune_cli.localrun.dry_run_view import example_lines
from finetune_cli.localrun.progress_view import figures, is_due, line, live_view, new_notices
from finetune_cli.localrun.report_receiver import ReportReceiver
from finetune_cli.terminal import SafeConsole
from finetune_core.contract import Phase, Report
from finetune_core.contract.first_examples import ShownExample, TextPiece, TokenUse
from finetune_core.contract.report import REPORT_LIMIT_BYTES
from finetune_trainer.pod.settings import Paths
from finetune_trainer.reporting.reporter import Reporter


def report(step: int, *, total: int = 100, phase: Phase = Phase.TRAINING) -> Report:
    return Report(
        run=1,
        pod_uid="pod",
        phase=phase,
        ranks=1,
        step=step,
        total_steps=total,
        epoch=0.5,
        eta_seconds=75,
        tokens_per_second=1234.4,
        metrics={"loss": 1.23456, "perplexity": 3.5},
        history=[],
        checkpoints=[],
        notices=["first", "second"],
    )


def test_the_reporter_of_the_trainer_is_heard_and_nobody_else(tmp_path: Path) -> None:
    receiver = ReportReceiver("default", "here")
    token = tmp_path / "token"
    token.write_text(receiver.token)
    paths = Paths(report_token_file=token, ca_file=tmp_path / "none")
    with receiver.listening():
        url = receiver.config.url
        Reporter(receiver.config, paths).close(report(7))
        assert receiver.newest == report(7)
        body = report(8).to_body()
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \xe9"}):
            assert requests.post(url, body, headers=headers, timeout=5).status_code == 401
        known = {"Authorization": f"Bearer {receiver.token}"}
        for wrong in (b"", b"{}", b"\xff"):
            assert requests.post(url, wrong, headers=known, timeout=5).status_code == 400
        too_long = b" " * (REPORT_LIMIT_BYTES + 1)
        assert requests.post(url, too_long, headers=known, timeout=5).status_code == 400
        assert requests.post(f"{url}x", body, headers=known, timeout=5).status_code == 400
        assert receiver.newest == report(7)
        assert requests.post(url, body, headers=known, timeout=5).status_code == 204
        assert receiver.newest == report(8)
    host, port = url.split("/")[2].split(":")
    with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port)), timeout=5):
        pass


def test_a_line_has_loss_perplexity_speed_and_the_time_left() -> None:
    assert line(report(20)) == "step 20/100  loss 1.235  perplexity 3.5  1234 tokens/s  1 min 15 s left"
    assert figures(report(100)) == "loss 1.235  perplexity 3.5  1234 tokens/s"
    assert line(report(3).model_copy(update={"metrics": {}, "tokens_per_second": None, "eta_seconds": None})) == (
        "step 3/100"
    )


def test_a_pipe_gets_a_line_for_each_stretch_of_steps_and_for_the_last_one() -> None:
    def shown(steps: list[int], every: int | None, total: int = 100) -> list[int]:
        found: list[int] = []
        for step in steps:
            if is_due(report(step, total=total), found[-1] if found else None, every):
                found.append(step)
        return found

    assert shown([0, 1, 2, 4, 5, 5, 6, 11, 12], None) == [1, 5, 11]
    assert shown([1, 9, 10, 19, 31, 99, 100, 100], 10) == [1, 10, 19 + 12, 99, 100]
    assert shown([1, 2, 3], None, total=3) == [1, 2, 3]


def test_a_terminal_shows_phase_bar_and_figures() -> None:
    console = SafeConsole(width=60, force_terminal=True, color_system=None)

    def text(found: Report | None, doing: str) -> str:
        with console.capture() as capture:
            console.print(live_view(found, doing, 5.0))
        return capture.get()

    assert text(None, "").strip() == "● starting  5 s"
    lines = text(report(50), "").splitlines()
    assert lines[0].strip() == "● training  5 s"
    assert lines[1].endswith("step 50/100")
    assert 20 < lines[1].count("━") < 60
    assert lines[2].strip() == figures(report(50))
    assert text(report(50), "stopping").splitlines()[0].strip() == "● stopping  5 s"


def test_each_notice_is_told_once() -> None:
    assert new_notices(report(1), []) == ["first", "second"]
    assert new_notices(report(1), ["first"]) == ["second"]


EXAMPLES = [
    ShownExample(
        place="rows.jsonl line 1",
        pieces=[
            TextPiece(use=TokenUse.READ, text="ask\n", ids=[2], tokens=["ask"]),
            TextPiece(use=TokenUse.LEARNED, text="a b", ids=[3, 4], tokens=["a", "b"]),
            TextPiece(use=TokenUse.CUT_OFF, text="c", ids=[5], tokens=["c"]),
        ],
    ),
    ShownExample(place="rows.jsonl line 2", pieces=[], left_out="has no token to learn"),
]


def test_a_pipe_marks_what_is_learned_and_what_is_cut_off() -> None:
    assert [line.plain for line in example_lines(EXAMPLES, marks=True)] == [
        "first examples: {+learned+}, only read, [-cut off-]",
        "",
        "example 1: rows.jsonl line 1, 1 tokens read, 2 learned, 1 cut off",
        "  text: ask\\n{+a b+}[-c-]",
        "  tokens: 2:ask {+3:a 4:b+} [-5:c-]",
        "",
        "example 2: rows.jsonl line 2",
        "  left out: it has no token to learn",
    ]


def test_a_terminal_shows_what_is_learned_in_colour() -> None:
    (text,) = [line for line in example_lines(EXAMPLES, marks=False) if line.plain.startswith("  text")]
    assert text.plain == "  text: ask\\na bc"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles == {"ask\\n": "dim", "a b": "bold green", "c": "red strike"}


def test_a_long_piece_is_shortened() -> None:
    long = TextPiece(use=TokenUse.READ, text="x" * 5000, ids=list(range(500)), tokens=["x"] * 500)
    lines = [line.plain for line in example_lines([ShownExample(place="a line 1", pieces=[long])], marks=True)]
    assert lines[3].endswith("… 3000 more characters")
    assert lines[4].endswith("119:x … 380 more")
