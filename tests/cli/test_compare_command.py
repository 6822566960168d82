"""`finetune compare` as a command: its sources and options, the page, and the sentences about bad input."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune_cli.commands.compare_command import MARKER
from finetune_cli.compare.sources import facts_of, is_folder, labels_of
from finetune_cli.main import main
from finetune_core.contract.pod import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from tests.cli.stored import job
from tests.cli.written_runs import Made, write_rolled_back, write_run
from tests.trainer.objectstore import ACCESS_KEY, BUCKET, SECRET_KEY, ObjectStore

SHORT = Made(steps=40, rows=40)


def compare(*arguments: str | Path) -> int:
    return main(["compare", *map(str, arguments)])


def test_two_folders_become_a_table_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = write_run(tmp_path / "lora", SHORT)
    full = write_run(tmp_path / "full", Made(method="Full", rate=5e-6, steps=40, rows=40))
    page = tmp_path / "page.html"
    assert compare(lora, full, "--html", page, "--price", "2") == 0
    shown = capsys.readouterr()
    for text in ("1 lora", "2 full", "tuned score", "80.0%", "cost", "optimization.learningRate", "LoRA comes close"):
        assert text in shown.out, text
    assert f"{page}: open it in a browser" in shown.out.replace("\n", "")
    assert shown.err == ""
    html = page.read_text(encoding="utf-8")
    assert html.startswith(MARKER)
    assert "<h1>Comparison of 2 runs</h1>" in html
    assert "GPU hours times 2" in html
    assert list(tmp_path.glob(".page*")) == []


def test_a_page_of_the_command_is_replaced_and_another_file_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, page = write_rolled_back(tmp_path / "run", Made(steps=200, rows=40)), tmp_path / "page.html"
    page.write_text(MARKER + "old")
    assert compare(run, "--html", page) == 0
    assert "Comparison of 1 run<" in page.read_text()
    page.write_text("<!doctype html>\nmine")
    assert compare(run, "--html", page) == 2
    assert page.read_text() == "<!doctype html>\nmine"
    assert "exists and is no page of this command; name another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["./missing"], "missing: must be a folder, and there is none at this path"),
        (["./empty"], "empty: has no run: a folder of a job has runs/<run>.json"),
        (["./run", "--html", "empty"], "--html: must name a file, and empty is a folder"),
        (["./run", "--html", "no/page.html"], "--html: must name a file in a folder that exists, and no does not"),
        (["s3://bucket/"], "s3://bucket/: must be the folder of all runs of a job, such as s3://bucket/runs/NAMESPACE"),
        (["s3://bucket/team/job/uid"], "environment: must have AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to read"),
        ([f"./run{'/.' * number}" for number in range(101)], "SOURCE: must be at most 100 runs, and there are 101"),
    ],
)
def test_a_wrong_command_line_gets_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in (ACCESS_KEY_ID, SECRET_ACCESS_KEY):
        monkeypatch.delenv(name, raising=False)
    assert compare(*arguments) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--endpoint", "ftp://minio"], "--endpoint: is none that can be read"),
        (["--endpoint", "http://127.0.0.1:9", "--region", "a b"], "--region: is none that can be read"),
        (["--endpoint", "http://127.0.0.1:9"], "http://127.0.0.1:9: cannot be reached from here"),
    ],
)
def test_a_store_that_cannot_be_asked_is_named(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ACCESS_KEY_ID, "key")
    monkeypatch.setenv(SECRET_ACCESS_KEY, "secret")
    assert compare("s3://bucket/team/job/uid", *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_in_the_bucket_is_compared_with_the_same_folder_here(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = write_run(tmp_path / "lora", SHORT)
    prefix = "compared/team/lora/uid"
    for path in (path for path in here.rglob("*") if path.is_file()):
        store.client.fput_object(BUCKET, f"{prefix}/{path.relative_to(here)}", str(path))
    monkeypatch.setenv(ACCESS_KEY_ID, ACCESS_KEY)
    monkeypatch.setenv(SECRET_ACCESS_KEY, SECRET_KEY)
    page = tmp_path / "page.html"
    assert compare(f"s3://{BUCKET}/{prefix}/", here, "--endpoint", store.endpoint, "--html", page) == 0
    shown = capsys.readouterr().out
    assert "1 lora #1" in shown
    assert "2 lora #2" in shown
    assert "differs" not in shown
    assert f"s3://{BUCKET}/{prefix}<" in page.read_text()
    assert compare(f"s3://{BUCKET}/compared", "--endpoint", store.endpoint, "--html", page) == 2
    assert "give the folder of one job, such as team/lora/uid/" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sources", "labels"),
    [
        (["lora", "full"], ["lora", "full"]),
        (["s3://b/runs/team/lora/uid-1", "s3://b/runs/team/lora/uid-2/"], ["lora #1", "lora #2"]),
        (["./a/lora/", "/data/full", ".."], ["lora", "full", ".."]),
        (["s3://b/lora"], ["lora"]),
        (["runs/default/lora/local", "runs/default/full/local-2/", "./local"], ["lora", "full", "local"]),
    ],
)
def test_each_source_has_a_label_of_its_own(sources: list[str], labels: list[str]) -> None:
    assert labels_of(sources) == labels


def test_a_text_with_a_slash_is_a_folder_and_another_one_a_job() -> None:
    assert [is_folder(source) for source in ("./lora", "runs/lora", "/lora", "~/lora", ".")] == [True] * 5
    assert not is_folder("lora")


def test_a_job_brings_its_state_its_gpu_time_and_its_settings() -> None:
    facts = facts_of(job("succeeded"))
    assert facts.state == "Completed"
    assert facts.settings is not None
    assert facts.settings["method"] == "LoRA"
    assert facts.settings["optimization.learningRate"] == "0.001"


def test_control_characters_in_a_folder_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "evil\x1b[2J\x07", SHORT)
    with (folder / "metrics/000001-000001.jsonl").open("ab") as file:
        file.write(b"\x1b]0;title\x07\n")
    assert compare(folder, "--html", tmp_path / "page.html") == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "\x07" not in shown.out + shown.err
    assert "\x1b" not in (tmp_path / "page.html").read_text()


def test_the_terminal_shows_only_claims_that_the_runs_can_speak_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one run alone, 12 of 14 rows would say what else to run."""
    folder = write_run(tmp_path / "run", SHORT)
    page = tmp_path / "page.html"
    assert compare(folder, "--html", page) == 0
    shown = capsys.readouterr().out
    untested = re.search(r"not tested: (\d+) claims of the study; the page says what to run for them", shown)
    assert untested is not None
    assert page.read_text().count('<span class="verdict not-tested">') == int(untested[1])
    assert "Run two jobs" not in shown
