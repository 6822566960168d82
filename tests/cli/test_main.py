"""The program `finetune` ends with exit code 2 and without a traceback after a wrong command line, without a usable
kubeconfig, and when the API server can't be reached. Each help text contains an example."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.cli.programs import Ended, run_finetune
from tests.trainer.objectstore import free_port

KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
users: [{{name: u, user: {{}}}}]
contexts: [{{name: x, context: {{cluster: c, user: u}}}}]
current-context: x
"""


def environment(kubeconfig: Path | str = "/nonexistent") -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "KUBECONFIG": str(kubeconfig), "HOME": "/nonexistent"}


def finetune(folder: Path, *arguments: str, kubeconfig: Path | str = "/nonexistent") -> Ended:
    """Run the program `finetune` in a process of its own, which is forked from a process that has already imported the
    program."""
    return run_finetune(arguments, environment(kubeconfig), folder)


def test_the_program_is_started_by_an_interpreter() -> None:
    """All other tests of this file fork a process that has already imported the program, because its imports take far
    longer than a command."""
    command = [sys.executable, "-m", "finetune_cli"]
    for arguments, status in (("--help",), 0), (("watch", "quickstart"), 2):
        done = subprocess.run(
            [*command, *arguments], env=environment(), text=True, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == status
        assert ("usage: finetune" in done.stdout) == (status == 0)
        assert len(done.stderr.splitlines()) == (status != 0)


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    done = finetune(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"finetune {project['version']}\n")


@pytest.mark.parametrize("arguments", [[], ["watch"], ["download"]])
def test_help_has_examples(arguments: list[str], tmp_path: Path) -> None:
    done = finetune(tmp_path, *arguments, "--help")
    assert done.returncode == 0
    assert "finetune download quickstart" in done.stdout or "finetune watch quickstart" in done.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["describe"], ["fly", "quickstart"], ["watch", "quickstart", "--timeout", "soon"]]
)
def test_a_wrong_command_line_is_explained(arguments: list[str], tmp_path: Path) -> None:
    done = finetune(tmp_path, *arguments)
    assert done.returncode == 2
    assert "usage: finetune" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["watch", "download"])
def test_no_kubeconfig_is_one_sentence(command: str, tmp_path: Path) -> None:
    done = finetune(tmp_path, command, "quickstart")
    assert done.returncode == 2
    assert done.stderr.startswith("finetune: kubeconfig: cannot be loaded")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize("content", ["]", "apiVersion: v1\nkind: Config\n", "just words"])
def test_a_broken_kubeconfig_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "config").write_text(content)
    done = finetune(tmp_path, "watch", "quickstart", kubeconfig=tmp_path / "config")
    assert done.returncode == 2
    assert done.stderr.startswith("finetune: kubeconfig: cannot be loaded")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["watch", "download"])
def test_an_api_server_that_is_away_is_one_sentence(tmp_path: Path, command: str) -> None:
    (tmp_path / "config").write_text(KUBECONFIG.format(port=free_port()))
    done = finetune(tmp_path, command, "quickstart", kubeconfig=tmp_path / "config")
    assert done.returncode == 2
    assert done.stderr.startswith("finetune: API server: cannot be reached")
    assert "Traceback" not in done.stderr
