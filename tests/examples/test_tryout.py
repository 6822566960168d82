"""`make try` names files that are there, shows answers of both models, and tunes a real model (long)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.demo.base_model import NAME
from examples.trails.generate import generate, write
from examples.tryout.__main__ import HELDOUT, JOB, PAGE, TRAIN, VALIDATION, show
from finetune_core.validation.validate_job import validate_job
from tests.cli.written_runs import Made, write_run
from tests.core.test_docs import ROOT


def document() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(JOB.read_text(encoding="utf-8"))
    return found


def test_the_job_is_valid_for_a_cluster_too() -> None:
    assert validate_job(document()).problems == []


def test_the_job_reads_the_files_that_are_prepared(tmp_path: Path) -> None:
    write(generate(7, train=TRAIN, validation=VALIDATION, heldout=HELDOUT), tmp_path)
    spec = document()["spec"]
    assert spec["model"] == {"volume": {"claimName": "models", "path": NAME}}
    for part in ("train", "validation", "test"):
        source = spec["dataset"][part]["volume"]
        assert source["claimName"] == "rows"
        assert (tmp_path / source["path"]).is_file()


def test_answers_and_next_steps_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    show(write_run(tmp_path / "run", Made()))
    shown = capsys.readouterr().out
    for text in ("What is game 0?", "no idea", "request(name[game 0])", "artifacts/000001", str(PAGE), "docs/run.md"):
        assert text in shown


@pytest.mark.long
def test_a_model_is_tuned_here_and_a_second_call_shows_it_again(tmp_path: Path) -> None:
    """Minutes: the real base model is tuned as a user does, without a kubeconfig, in a copy of the project's folder."""
    for name in ("examples", "tests", "core", "cli", "trainer_image", "operator"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "examples.tryout"]
    environment = {**os.environ, "KUBECONFIG": "/nonexistent", "COLUMNS": "200"}
    outputs = []
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
        page = (tmp_path / PAGE).read_text(encoding="utf-8")
        assert 'href="#answers"' in page
        shutil.move(tmp_path / PAGE, tmp_path / "page.html")
    assert "answers to sentences that were not trained" in outputs[0]
    assert "step 1/" in outputs[0]
    assert "step 1/" not in outputs[1]
