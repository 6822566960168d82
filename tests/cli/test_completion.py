"""`finetune completion` prints scripts with which real shells and kubectl complete commands, options
and names of jobs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import shtab

from finetune_cli.command_line import command_line
from finetune_cli.commands.completion_command import SHELLS
from finetune_cli.kubectl_completion import ERROR, FILES, NO_FILES, main
from tests.cli.test_main import finetune
from tests.cluster.clients import clients

BASH = """\
source ./script
COMP_WORDS=({words}) COMP_CWORD={last} COMP_LINE="{line}" COMP_POINT={point}
{function}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
FAKE = """\
#!/bin/sh
printf 'finetunejob.finetune.dev/lora-small\\nfinetunejob.finetune.dev/full-large\\n'
"""
"""A program `finetune` that knows two jobs, because the test has no cluster."""


def script(shell: str, folder: Path) -> Path:
    """Write the script for ``shell`` into ``folder``, as the program prints it."""
    done = finetune(folder, "completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    file = folder / "script"
    file.write_text(done.stdout)
    return file


def completed_by_bash(folder: Path, *words: str) -> set[str]:
    """Return what bash offers for the last of ``words``, which is incomplete."""
    function = next(
        line.split()[-2] for line in (folder / "script").read_text().splitlines() if line.startswith("complete ")
    )
    quoted = " ".join(f'"{word}"' for word in words)
    line = " ".join(words)
    text = BASH.format(words=quoted, last=len(words) - 1, line=line, point=len(line), function=function)
    path = f"{folder / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "--norc", "-c", text], cwd=folder, env={"PATH": path}, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {word.strip() for word in done.stdout.splitlines() if word.strip()}


def test_bash_completes_commands_options_and_jobs(tmp_path: Path) -> None:
    script("bash", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "finetune").write_text(FAKE)
    (tmp_path / "bin" / "finetune").chmod(0o755)
    assert completed_by_bash(tmp_path, "finetune", "su") == {"suspend"}
    assert completed_by_bash(tmp_path, "finetune", "metrics", "--every") == {"--every-run"}
    assert completed_by_bash(tmp_path, "finetune", "metrics", "-o", "") == {"csv", "json", "parquet"}
    assert completed_by_bash(tmp_path, "finetune", "describe", "lo") == {"lora-small"}


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shell != "bash"])
def test_the_other_shells_read_their_scripts(shell: str, tmp_path: Path) -> None:
    file = script(shell, tmp_path)
    for command in ("suspend", "metrics", "describe"):
        assert command in file.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed; the script was made")
    done = subprocess.run([shell, "-n", file], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_shell_asks_the_cluster_before_a_key_is_pressed(tmp_path: Path) -> None:
    """A shell loads the script at its start, or at the first press of the key."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "finetune").write_text(f"#!/bin/sh\ntouch {tmp_path / 'asked'}\n")
    (tmp_path / "bin" / "finetune").chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    for shell, start in (
        ("bash", "source ./script"),
        ("zsh", 'autoload -U compinit; compinit -u; eval "$(cat script)"'),
    ):
        if shutil.which(shell) is None:
            continue
        script(shell, tmp_path)
        environment = {"PATH": path, "HOME": str(tmp_path)}
        done = subprocess.run([shell, "-c", start], cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert not (tmp_path / "asked").exists(), shell


def test_fish_offers_the_commands(tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    file = script("fish", tmp_path)
    text = f"source {file}; complete --do-complete 'finetune su'"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TERM": "dumb"}
    done = subprocess.run(
        ["fish", "--no-config", "-c", text], env=environment, text=True, capture_output=True, check=False
    )
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["suspend"], done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_made_without_a_control_character(shell: str) -> None:
    text = shtab.complete(command_line(), shell)
    assert all(character.isprintable() or character in "\n\t" for character in text)


def test_an_unknown_shell_is_refused(tmp_path: Path) -> None:
    done = finetune(tmp_path, "completion", "powershell")
    assert done.returncode == 2
    assert "invalid choice: 'powershell'" in done.stderr


def completed_by_kubectl(folder: Path, *words: str) -> tuple[set[str], str]:
    """Return what kubectl offers for the last of ``words``, which is incomplete, and what it says about files."""
    programs = Path(sys.executable).parent
    path = f"{folder / 'bin'}:{programs}:/usr/bin:/bin"
    done = subprocess.run(
        [clients()["kubectl"], "__complete", "finetune", *words],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder)},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *found, directive = done.stdout.splitlines()
    return set(found), directive


def test_kubectl_completes_its_plugin(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "finetune").write_text(FAKE)
    (tmp_path / "bin" / "finetune").chmod(0o755)
    (tmp_path / "job.yaml").touch()
    assert completed_by_kubectl(tmp_path, "su") == ({"suspend"}, NO_FILES)
    assert completed_by_kubectl(tmp_path, "metrics", "-o", "") == ({"csv", "json", "parquet"}, NO_FILES)
    assert completed_by_kubectl(tmp_path, "describe", "lo") == ({"lora-small"}, NO_FILES)
    assert completed_by_kubectl(tmp_path, "validate", "") == (set(), FILES)
    assert completed_by_kubectl(tmp_path, "metrics", "$(touch made)") == (set(), FILES)
    assert not (tmp_path / "made").exists()


def test_without_bash_kubectl_is_told_of_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["su"]) == 1
    assert capsys.readouterr().out == f"{ERROR}\n"
