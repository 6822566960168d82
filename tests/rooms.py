"""Find the test files of a room for `make unit ROOM=graders`, which runs `python -m tests.rooms graders`.

A room is a folder inside one of the four packages, such as `graders` or `decide`, or a folder of `tests/`. A test file
belongs to a folder of `tests/` if it lies there. It belongs to a room of a package if it imports a module of the room,
directly or through one or two modules between. The first module between must lie in `tests/` or directly in the folder
of a package, as `finetune_operator/reconcile.py` does. The second must lie directly in the folder of a package. For
example, tests/operator/test_crashes.py imports tests/operator/operators.py, which imports
finetune_operator/reconcile.py, which imports the room `act`. So test_crashes.py belongs to the room `act`.
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
    """There is no room with the given name, or all tests of the room need the cluster or are long."""


def rooms_of_packages() -> dict[str, list[str]]:
    """Return the rooms inside the packages: a mapping from the name of a room to the dotted names of its folders. The
    name of a room is the last part of the dotted name.

    For example ``{"graders": ["finetune_trainer.evaluation.graders"]}``.
    """
    rooms: dict[str, list[str]] = {}
    for package in PACKAGES.values():
        for init in sorted(package.glob("*/**/__init__.py")):
            parts = init.parent.relative_to(package.parent).parts
            rooms.setdefault(parts[-1], []).append(".".join(parts))
    return rooms


def groups_of_tests() -> list[str]:
    """Return the names of the folders of `tests/` that hold test files, for example ``["api", "chart"]``."""
    return sorted({file.relative_to(TESTS).parts[0] for file in TESTS.glob("*/**/test_*.py")})


def unit_test_files(room: str) -> list[Path]:
    """Return the test files of ``room``, sorted by path, without the files whose tests all need the cluster or are
    long.

    Raises:
        RoomError: no room has that name, or no file is left.
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
    """Return whether the names that `_reached` returns for ``file`` include the package ``folder`` or a module of
    it."""
    return any(module == folder or module.startswith(f"{folder}.") for module in _reached(file))


@cache
def _reached(file: Path) -> frozenset[str]:
    """Return the dotted names that ``file`` imports, either itself or through one or two modules for which
    `_is_followed` returns True. The second of two such modules counts only if it lies in a package, not in `tests/`."""
    reached = set(_imports(file))
    for module in _imports(file):
        if _is_followed(module):
            reached |= _imports(_path_of(module))
    for module in reached - _imports(file):
        if _is_followed(module) and module.split(".")[0] in PACKAGES:
            reached |= _imports(_path_of(module))
    return frozenset(reached)


@cache
def _is_followed(module: str) -> bool:
    """Return whether a test file that imports ``module`` also counts as importing what ``module`` imports. This holds
    for modules of `tests/` and for modules directly in the folder of a package."""
    top, *below = module.split(".")
    return (top == "tests" or (top in PACKAGES and len(below) == 1)) and _path_of(module).is_file()


def _path_of(module: str) -> Path:
    top = module.split(".")[0]
    base = PACKAGES[top].parent if top in PACKAGES else REPOSITORY
    return base / f"{module.replace('.', '/')}.py"


@cache
def _imports(file: Path) -> frozenset[str]:
    """Return the dotted names that ``file`` imports. ``from a import b`` gives both ``a`` and ``a.b``, because ``b``
    may be a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


@cache
def _is_left_out(file: Path) -> bool:
    """Return whether the variable ``pytestmark`` of ``file`` contains the marker ``cluster`` or ``long``. All tests of
    the file then need the cluster or are long. Markers of single tests do not count."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "pytestmark" for target in node.targets):
            marks = {found.attr for found in ast.walk(node.value) if isinstance(found, ast.Attribute)}
            return bool(marks & {"cluster", "long"})
    return False


def main() -> None:
    """Print the paths of the test files of the room that the command line names, one per line, relative to the
    repository."""
    try:
        for file in unit_test_files(sys.argv[1]):
            print(file.relative_to(REPOSITORY))
    except RoomError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
