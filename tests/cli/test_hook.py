"""The pre-commit hook runs a command that the program `finetune` really has, and docs/validate.md contains the id of
the hook."""

import re
from importlib.metadata import entry_points
from pathlib import Path

import yaml

from finetune_cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def test_the_hook_runs_the_program() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    program, command = hook["entry"].split()
    assert entry_points(group="console_scripts", name=program)
    assert main([command, str(ROOT / "examples" / "quickstart.yaml")]) == 0
    assert re.fullmatch(r"[a-z-]+", hook["id"])
    assert hook["id"] in (ROOT / "docs" / "validate.md").read_text(encoding="utf-8")
