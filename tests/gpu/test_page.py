"""docs/gpu-check.md shows the sections and goals of the check, and its Pod can run the check. The table of the packages
that the check needs is complete.

`python -m tests.gpu.test_page` writes the tables of the page.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from tests.gpu.__main__ import parse
from tests.gpu.catalogue import GOALS, SECTIONS
from tests.gpu.packages import PACKAGES, advice, missing_packages
from tests.gpu.verdict import Grade, JudgedGoal

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "tests" / "gpu"
PAGE = REPOSITORY / "docs" / "gpu-check.md"
TABLE = re.compile(r"(<!-- generated: python -m tests\.gpu\.test_page( goals)? -->\n).*?(<!-- end -->)", re.DOTALL)
CONFIG_MAP_BYTES = 1 << 20
"""Largest size of a ConfigMap."""
ROOTS = {"finetune_core": REPOSITORY / "core", "finetune_trainer": REPOSITORY / "trainer_image", "tests": REPOSITORY}
FOUND_LATER = {"deepspeed"}
"""Packages that the product imports inside of functions, and that every engine needs."""
BESIDE_TORCH = {"torch", "setuptools"}
"""Distributions that a vendor folder must not bring."""


def tables() -> Mapping[str, str]:
    """Return the generated tables of the page, by the word behind the command in their marker."""
    sections = ["| section | what it measures | what it expects | bound |", "|---|---|---|---|"]
    sections += [f"| `{each.name}` | {each.measures} | {each.expects} | {each.seconds:.0f} s |" for each in SECTIONS]
    goals = ["| goal | bound | on | source |", "|---|---|---|---|"]
    for goal in GOALS:
        bound = JudgedGoal(goal, Grade.OPEN, None).bound
        goals.append(f"| {goal.name} | {bound} | {goal.gpu or 'every GPU'} | {goal.source} |")
    return {"": "\n".join(sections) + "\n", " goals": "\n".join(goals) + "\n"}


def with_tables(text: str) -> str:
    """Return the page's ``text`` with new tables."""
    made = tables()
    return TABLE.sub(lambda found: f"{found[1]}{made[found[2] or '']}{found[3]}", text)


def test_the_page_has_the_tables_of_sections_and_goals() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(TABLE.findall(text)) == len(tables())
    assert text == with_tables(text), "run: .venv/bin/python -m tests.gpu.test_page"


def manifest() -> dict[str, Any]:
    """Return the Pod of the page."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    found = yaml.safe_load(blocks[0])
    assert isinstance(found, dict)
    return found


def test_the_pod_of_the_page_runs_the_check_on_one_gpu() -> None:
    pod = manifest()
    assert (pod["apiVersion"], pod["kind"]) == ("v1", "Pod")
    (container,) = pod["spec"]["containers"]
    assert container["command"][1:] == ["-m", "tests.gpu"]
    options = parse(container["args"])
    assert options.only == list(SECTIONS)
    assert pod["spec"]["activeDeadlineSeconds"] > options.seconds
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_the_pod_of_the_page_finds_the_check_and_the_product() -> None:
    pod = manifest()
    (container,) = pod["spec"]["containers"]
    dockerfile = (REPOSITORY / "trainer_image" / "Dockerfile").read_text(encoding="utf-8")
    library = re.search(r"PYTHONPATH=(\S+)", dockerfile)
    python = re.search(r'ENTRYPOINT \["([^"]+)"', dockerfile)
    assert library is not None
    assert python is not None
    assert container["command"][0] == python[1]
    path = next(each["value"] for each in container["env"] if each["name"] == "PYTHONPATH").split(":")
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    assert path == [library[1], "/opt/checks"]
    assert mounts["/opt/checks/tests/gpu"]["name"] == "checks"
    # Without an __init__.py, a package `tests` that a library installs would be found instead.
    assert mounts["/opt/checks/tests/__init__.py"]["subPath"] == "__init__.py"
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    assert volumes["checks"]["configMap"]["name"] == pod["metadata"]["name"]
    assert {each["name"] for each in mounts.values()} == set(volumes)
    assert container["workingDir"] == "/tmp" in mounts


def test_the_pod_of_the_page_satisfies_the_pod_security_standard_restricted() -> None:
    pod = manifest()
    (container,) = pod["spec"]["containers"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert [each for each in pod["spec"]["volumes"] if not {"configMap", "emptyDir"} & set(each)] == []


def test_the_folder_fits_into_a_config_map_and_has_no_folders() -> None:
    files = [path for path in FOLDER.iterdir() if path.name != "__pycache__"]
    assert all(path.is_file() for path in files)
    assert sum(path.stat().st_size for path in files) < CONFIG_MAP_BYTES / 2


# ---- What the check imports ----


def module_file(name: str) -> Path | None:
    """Return the file of the module or package ``name`` of this repository, or None where ``name`` is none."""
    top = name.partition(".")[0]
    if top not in ROOTS:
        return None
    path = ROOTS[top].joinpath(*name.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def imported(file: Path) -> Iterator[str]:
    """Yield the dotted names that ``file`` imports when it is imported itself. Imports inside of functions, and those
    for types only, are left out."""
    nodes: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while nodes:
        for node in ast.iter_child_nodes(nodes.pop()):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not (
                isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            ):
                nodes.append(node)


def check_modules() -> list[Path]:
    """Return the modules of the check without its tests."""
    return [path for path in FOLDER.glob("*.py") if not path.name.startswith("test_")]


def libraries() -> set[str]:
    """Return the third-party packages that the check imports, directly or through modules of the product."""
    open_files, seen, found = check_modules(), set[Path](), set[str]()
    while open_files:
        file = open_files.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imported(file):
            top = name.partition(".")[0]
            parts = name.split(".")
            inside = [module_file(".".join(parts[: length + 1])) for length in range(len(parts))]
            open_files += [path for path in inside if path is not None]
            if top not in ROOTS and top not in sys.stdlib_module_names:
                found.add(top)
    return found


def test_the_check_imports_no_other_test() -> None:
    others = {
        name
        for file in check_modules()
        for name in imported(file)
        if name.startswith("tests.") and not name.startswith("tests.gpu.")
    }
    assert others - {"tests.gpu"} == set()


def test_the_table_of_packages_has_every_package_that_the_check_imports() -> None:
    tops = {name: metadata.packages_distributions()[name][0] for name in libraries() | FOUND_LATER}
    written = {each for names in PACKAGES.values() for each in names}
    assert {distribution.lower().replace("_", "-") for distribution in tops.values()} <= written
    assert set(PACKAGES) <= set(tops)


def test_the_table_of_packages_has_everything_that_these_need() -> None:
    written = {each for names in PACKAGES.values() for each in names}
    needed: set[str] = set()
    open_names = [name for name in written if name not in BESIDE_TORCH]
    while open_names:
        name = open_names.pop()
        if name in needed:
            continue
        needed.add(name)
        for requirement in metadata.requires(name) or []:
            if "extra ==" in requirement or is_foreign(requirement):
                continue
            below = re.split(r"[ <>=!~;\[(]", requirement)[0].lower().replace("_", "-")
            if below not in BESIDE_TORCH:
                open_names.append(below)
    assert needed - written == set(), "these are needed too"


def is_foreign(requirement: str) -> bool:
    """Return whether the marker of ``requirement`` names another system or implementation of Python than CPython on
    Linux."""
    return bool(re.search(r"(win32|Windows|PyPy|emscripten|darwin|python_version < )", requirement))


def test_missing_packages_are_named_with_a_command_that_brings_them() -> None:
    there = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "peft", "certifi", "requests", "urllib3"}
    missing = missing_packages(lambda name: name if name in there else None)
    assert missing == ["deepspeed", "minio", "pydantic"]
    sentence = advice(missing)
    assert sentence.startswith("The packages deepspeed, minio, pydantic can't be imported by ")
    pinned = re.search(r"pip install --no-deps --target vendor (.+?)`", sentence)
    assert pinned is not None
    lock = (REPOSITORY / "locks" / "trainer.txt").read_text(encoding="utf-8")
    assert [each for each in pinned[1].split() if f"\n{each} " not in f"\n{lock}"] == []
    assert "torch==" not in pinned[1]


def test_the_command_ends_at_once_where_packages_are_missing() -> None:
    """Python's option -S leaves out all installed packages."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "tests.gpu"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"The packages {', '.join(sorted(PACKAGES))} can't be imported by ")


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
