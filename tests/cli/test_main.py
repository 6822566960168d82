"""The program `finetune` ends with the documented exit codes. After a user's mistake it prints one sentence and no
traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.objectstore import free_port

KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
users: [{{name: u, user: {{}}}}]
contexts: [{{name: x, context: {{cluster: c, user: u}}}}]
current-context: x
"""


def finetune(*arguments: str, kubeconfig: Path | str = "/nonexistent") -> subprocess.CompletedProcess[str]:
    """Run the program `finetune` in a process of its own."""
    environment = {"PATH": os.environ["PATH"], "KUBECONFIG": str(kubeconfig), "HOME": "/nonexistent"}
    command = [sys.executable, "-m", "finetune_cli", *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("arguments", [[], ["watch"], ["download"]])
def test_help_has_examples(arguments: list[str]) -> None:
    done = finetune(*arguments, "--help")
    assert done.returncode == 0
    assert "finetune download quickstart" in done.stdout or "finetune watch quickstart" in done.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["watch"], ["fly", "quickstart"], ["watch", "quickstart", "--timeout", "soon"]]
)
def test_a_wrong_command_line_is_explained(arguments: list[str]) -> None:
    done = finetune(*arguments)
    assert done.returncode == 2
    assert "usage: finetune" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["watch", "download"])
def test_no_kubeconfig_is_one_sentence(command: str) -> None:
    done = finetune(command, "quickstart")
    assert done.returncode == 2
    assert done.stderr.startswith("finetune: kubeconfig: cannot be loaded")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", ["]", "apiVersion: v1\nkind: Config\n", "just words"])
def test_a_broken_kubeconfig_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "config").write_text(content)
    done = finetune("watch", "quickstart", kubeconfig=tmp_path / "config")
    assert done.returncode == 2
    assert done.stderr.startswith("finetune: kubeconfig: cannot be loaded")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["watch", "download"])
def test_an_api_server_that_is_away_is_one_sentence(tmp_path: Path, command: str) -> None:
    (tmp_path / "config").write_text(KUBECONFIG.format(port=free_port()))
    done = finetune(command, "quickstart", kubeconfig=tmp_path / "config")
    assert done.returncode == 2
    assert done.stderr.startswith("finetune: API server: cannot be reached")
    assert "Traceback" not in done.stderr
