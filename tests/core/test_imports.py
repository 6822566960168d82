"""The packages import each other only as the rules of import-linter in pyproject.toml allow. The core imports no heavy
library.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lint_imports(path: str = "") -> subprocess.CompletedProcess[str]:
    """Run import-linter with the rules in pyproject.toml. With ``path``, the packages in the folder ``path`` are
    checked instead of the packages of the same names in the repository."""
    command = Path(sys.executable).with_name("lint-imports")
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [command, "--no-cache"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_import_rules_hold() -> None:
    result = lint_imports()
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "added", "rule"),
    [
        ("decide/verdict.py", "import kubernetes.aio", "what the operator decides from values"),
        ("observe/waiting.py", "import finetune_operator.kube.client", "what the operator decides from values"),
        ("objects/labels.py", "import finetune_operator.observe.usage", "the operator's rooms"),
        ("kube/client.py", "import finetune_operator.process.settings", "the operator's rooms"),
        ("newcomer.py", "", "the operator's rooms"),
    ],
    ids=["a client", "a client by a detour", "upwards", "beside", "a module without a layer"],
)
def test_the_operators_import_rules_can_fail(module: str, added: str, rule: str, tmp_path: Path) -> None:
    package = tmp_path / "finetune_operator"
    shutil.copytree(ROOT / "operator/finetune_operator", package)
    with (package / module).open("a", encoding="utf-8") as file:
        file.write(f"{added}\n")
    result = lint_imports(str(tmp_path))
    broken = [line for line in result.stdout.splitlines() if line.endswith("BROKEN")]
    assert [line for line in broken if line.startswith(rule)], result.stdout + result.stderr


def test_the_core_is_light() -> None:
    program = (
        "import sys, finetune_core.resolve; print(sorted({'torch', 'kopf', 'kubernetes', 'yaml'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
