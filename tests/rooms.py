"""Find the test files of a room for `make unit ROOM=graders`, which runs `python -m tests.rooms graders`.

A room is a folder inside one of the four packages, such as `graders` or `decide`, or a folder of `tests/`. A test file
belongs to a room if the file imports a module of the room. The file also belongs to the room if the file imports a
module of `tests/` or of a package's top folder, such as `finetune_operator/reconcile.py`, that imports the room.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = REPOSITORY / "tests"
PACKAGES = {folder.name: folder for folder in sorted(REPOSITORY.glob("*/finetune_*")) if folder.is_dir()}
"""The folder of each import package, by the package's name, for example ``finetune_core``."""


class RoomError(Exception):
    """There is no such room, or the room has no test that runs without a cluster."""


def rooms_of_packages() -> dict[str, list[str]]:
    """Return the dotted names of the packages' inner folders by the last part of the dotted name.

    For example ``{"graders": ["finetune_trainer.evaluation.graders"]}``.
    """
    rooms: dict[str, list[str]] = {}
    for package in PACKAGES.values():
        for init in sorted(package.glob("*/**/__init__.py")):
            parts = init.parent.relative_to(package.parent).parts
            rooms.setdefault(parts[-1], []).append(".".join(parts))
    return rooms


def groups_of_tests() -> list[str]:
    """Return the folders of `tests/` that hold test files, for example ``["api", "chart"]``."""
    return sorted({file.relative_to(TESTS).parts[0] for file in TESTS.glob("*/**/test_*.py")})


def unit_test_files(room: str) -> list[Path]:
    """Return the test files of ``room`` that have tests that run without a cluster, sorted by path.

    Raises:
        RoomError: no room has that name, or every test file of the room needs the cluster or is long.
    """
    rooms, groups = rooms_of_packages(), groups_of_tests()
    if room not in rooms and room not in groups:
        known = ", ".join(sorted({*rooms, *groups}))
        raise RoomError(f"there is no room {room!r}; the rooms are: {known}")
    files = set((TESTS / room).rglob("test_*.py"))
    for folder in rooms.get(room, []):
        files |= {file for file in TESTS.rglob("test_*.py") if _uses(file, folder)}
    chosen = sorted(file for file in files if not _is_left_out(file))
    if not chosen:
        paths = " ".join(str(file.relative_to(REPOSITORY)) for file in sorted(files))
        raise RoomError(f"every test of {room!r} needs the cluster or is long; run: .venv/bin/python -m pytest {paths}")
    return chosen


def _uses(file: Path, folder: str) -> bool:
    """Return whether ``file``, or a module that `_is_followed` allows, imports a module of the package ``folder``."""
    reached = set(_imports(file))
    for module in _imports(file):
        if _is_followed(module):
            reached |= _imports(_path_of(module))
    return any(module == folder or module.startswith(f"{folder}.") for module in reached)


def _is_followed(module: str) -> bool:
    """Return whether the imports of ``module`` count for a test file that imports ``module``."""
    top, *below = module.split(".")
    return (top == "tests" or (top in PACKAGES and len(below) == 1)) and _path_of(module).is_file()


def _path_of(module: str) -> Path:
    top = module.split(".")[0]
    base = PACKAGES[top].parent if top in PACKAGES else REPOSITORY
    return base / f"{module.replace('.', '/')}.py"


@cache
def _imports(file: Path) -> frozenset[str]:
    """Return the dotted names that ``file`` imports; ``from a import b`` counts as ``a`` and as ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def _is_left_out(file: Path) -> bool:
    """Return whether ``file`` marks all of its tests as ``cluster`` or ``long``, by its variable ``pytestmark``."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "pytestmark" for target in node.targets):
            marks = {found.attr for found in ast.walk(node.value) if isinstance(found, ast.Attribute)}
            return bool(marks & {"cluster", "long"})
    return False


def main() -> None:
    """Print the files of the room that the command line names, one a line, relative to the repository."""
    try:
        for file in unit_test_files(sys.argv[1]):
            print(file.relative_to(REPOSITORY))
    except RoomError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
