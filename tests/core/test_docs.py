"""The pages of the documentation agree with the repository. The tests check the pages' tables of packages (called
rooms), paths, links, decisions and recipes.

The pages are README.md, CONTRIBUTING.md, CHANGELOG.md, those in docs/, and some READMEs of folders. `python -m
tests.core.test_docs` writes the column "imports" of docs/architecture.md anew.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from finetune_core import layout
from finetune_core.contract import ExitCode

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PARTS = {
    "core": "core/finetune_core",
    "operator": "operator/finetune_operator",
    "trainer": "trainer_image/finetune_trainer",
    "cli": "cli/finetune_cli",
}
"""Folders of the four import packages, by the names that docs/decisions.md uses for them."""
FOLDERS = (*PARTS.values(), "charts", "crds", "examples", "locks", "tests", "docs", ".ci")
GENERATED = "<!-- Generated"
HAND_WRITTEN = sorted(page for page in DOCS.glob("*.md") if GENERATED not in page.read_text(encoding="utf-8")[:400])
PAGES = sorted(
    [
        *DOCS.glob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        ROOT / "charts/finetune-operator/README.md",
        ROOT / "examples/study/llama2/README.md",
        ROOT / "examples/trails/README.md",
        ROOT / "tests/cluster/README.md",
    ]
)
ROOM_ROW = re.compile(r"^\| `([\w/.-]+)` \| (.*?) \| (.*?) \| (.*?) \|$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```|(`+)(.+?)\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)


def text_of(page: Path) -> str:
    """Return the text of the file ``page``."""
    return page.read_text(encoding="utf-8")


# ---- Each room (package) is a row of docs/architecture.md ----


def packages() -> set[str]:
    """Return the folders of all packages and subpackages of the four import packages, relative to the repository."""
    inits = (init for part in PARTS.values() for init in (ROOT / part).rglob("__init__.py"))
    return {init.parent.relative_to(ROOT).as_posix() for init in inits}


class Room(NamedTuple):
    """A row of docs/architecture.md that describes a package: the texts of its last three columns."""

    purpose: str
    imports: str
    tests: str


def rooms() -> dict[str, Room]:
    """Return the rows of docs/architecture.md that describe packages, by the folder of the package."""
    found = ROOM_ROW.findall(text_of(DOCS / "architecture.md"))
    return {path: Room(*cells) for path, *cells in found if path.startswith(tuple(PARTS.values()))}


def modules_named_by(room: Room) -> set[str]:
    """Return the modules that the purpose of ``room`` names without a folder, for example ``"panel.py"``."""
    return set(re.findall(r"`(\w+\.py)`", room.purpose))


@pytest.mark.parametrize(("path", "room"), rooms().items(), ids=rooms().keys())
def test_the_modules_that_a_rooms_row_names_are_in_the_room(path: str, room: Room) -> None:
    there = {module.name for module in (ROOT / path).rglob("*.py")}
    assert modules_named_by(room) <= there


def imports_of(package: str) -> str:
    """Return what the modules in the folder ``package`` import, in the form of the column "imports" of
    docs/architecture.md.

    The text lists first the rooms of the same import package, then the rooms of the core, then libraries. A module that
    is directly in an import package, and in none of its rooms, is listed by its own name. If ``package`` is an import
    package itself, such modules of its own are left out. Modules of the standard library are left out too.
    """
    inside: set[str] = set()
    core: set[str] = set()
    libraries: set[str] = set()
    own = next(part for part in PARTS.values() if package.startswith(part)).rpartition("/")[2]
    for module in sorted((ROOT / package).glob("*.py")):
        for name in _imported(module):
            top, _, rest = name.partition(".")
            room = _room(top, rest) if top.startswith("finetune_") else ""
            if top == own and room and f"{ROOT / package}" != f"{_folder(top) / room}":
                inside.add(room)
            elif top == "finetune_core" and top != own:
                core.add(room)
            elif not top.startswith("finetune_") and top not in sys.stdlib_module_names:
                libraries.add(top)
    if package in PARTS.values():
        inside = {room for room in inside if (ROOT / package / room).is_dir()}
    parts = (
        ", ".join(sorted(inside)),
        f"core: {', '.join(sorted(room or 'finetune_core' for room in core))}" if core else "",
        ", ".join(sorted(libraries)),
    )
    return "; ".join(part for part in parts if part)


def _imported(module: Path) -> Iterator[str]:
    """Yield the dotted name of everything that the file ``module`` imports, also of imports within functions."""
    for node in ast.walk(ast.parse(text_of(module))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _folder(top: str) -> Path:
    return next(ROOT / part for part in PARTS.values() if part.endswith(f"/{top}"))


def _room(top: str, rest: str) -> str:
    """Return the room of the import package ``top`` that contains ``rest``, the dotted name of a module or of an object
    in a module. The room is a path relative to the package.

    If no room contains the module, return the name of the module, which is "" for the package's own `__init__.py`.
    """
    folder = _folder(top)
    names: list[str] = []
    for name in rest.split("."):
        if not (folder / name / "__init__.py").is_file():
            is_module = not names and (folder / f"{name}.py").is_file()
            return name if is_module else "/".join(names)
        folder, names = folder / name, [*names, name]
    return "/".join(names)


def test_every_package_is_a_row_of_the_architecture_and_every_row_a_package() -> None:
    assert set(rooms()) == packages()


@pytest.mark.parametrize("package", sorted(packages()))
def test_a_row_says_what_its_package_imports(package: str) -> None:
    assert rooms()[package].imports == imports_of(package), "run: .venv/bin/python -m tests.core.test_docs"


@pytest.mark.parametrize("package", sorted(packages()))
def test_a_row_says_what_its_package_is_for_and_how_to_test_it(package: str) -> None:
    row = rooms()[package]
    assert len(row.purpose) > 30
    assert re.search(r"`make unit ROOM=[a-z]+`|`\.venv/bin/python -m pytest .+`", row.tests)


# ---- Paths that the pages name exist ----


@cache
def files() -> frozenset[str]:
    """Return the paths of all files and folders that a page may name, relative to the repository."""
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    inside = {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}
    return frozenset(inside | {path.name for path in ROOT.iterdir()})


def named_paths(text: str) -> Iterator[str]:
    """Yield every word that looks like a path or a dotted module name of this repository, from the code spans and code
    blocks in ``text``, the text of a page."""
    for match in CODE.finditer(text):
        for word in re.split(r"[\s\"'=,()|]+", match[0].strip("`")):
            path = word.strip("`.:;").partition("::")[0]
            top = path.partition("/")[0]
            # Commands write into out/, which is no part of the repository.
            is_below = bool(top) and top != "out" and "/" in path and (ROOT / top).is_dir()
            is_module = re.fullmatch(r"\w[\w/*-]*\.(py|md|go)|pyproject\.toml", path) is not None
            is_dotted = re.fullmatch(r"(finetune_(core|cli|operator|trainer)|tests|examples)(\.\w+)+", path) is not None
            if (is_below or is_module or is_dotted) and "<" not in path and "://" not in word:
                yield path


def exists(path: str) -> bool:
    """Return whether ``path`` names something in this repository. ``path`` is the path of a file or folder, a glob
    pattern, or the dotted name of a module or of an object in a module.

    The beginning of a path may be missing: `decide/verdict.py` means the file in the operator's package.
    """
    if re.fullmatch(r"\w+(\.\w+)+", path) and not path.endswith((".py", ".md", ".go", ".toml")):
        top, *names = path.split(".")
        base = next((ROOT / part for part in PARTS.values() if part.endswith(f"/{top}")), ROOT / top)
        module = base.joinpath(*names)
        return any(
            place.is_dir() or place.with_suffix(".py").is_file()
            # The last part of a dotted name may be an attribute of a module, so the name without it is tried too.
            for place in (module, module.parent)
        )
    if "*" in path:
        return any(fnmatch(file, pattern) for file in files() for pattern in (path, f"*/{path}"))
    return (ROOT / path).exists() or any(file.endswith(f"/{path.strip('/')}") for file in files())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    beside = page.parent
    missing = {path for path in named_paths(text_of(page)) if not exists(path) and not (beside / path).exists()}
    assert missing == set()


# ---- Links lead somewhere ----


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of the page."""
    found: dict[str, int] = {}
    result = set()
    for _, heading in HEADING.findall(re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)):
        words = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
        slug = words.replace(" ", "-")
        result.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return result


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(text_of(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(file), f"{target} names no heading of {file.name}"


# ---- The content of single pages agrees with the repository ----


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: page.name)
def test_a_page_begins_by_saying_for_whom_it_is(page: Path) -> None:
    title, _, rest = text_of(page).partition("\n\n")
    assert title.startswith("# ")
    assert rest.startswith("This page is for ")


def test_the_list_of_pages_has_every_page_and_the_readme_leads_to_the_list() -> None:
    links = set(LINK.findall(text_of(DOCS / "README.md")))
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} - links == set()
    assert {"docs/README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= set(LINK.findall(text_of(ROOT / "README.md")))


def test_the_readme_is_one_page() -> None:
    """Five minutes of reading, with the job and the panel."""
    assert len(text_of(ROOT / "README.md").split()) <= 900


def test_the_job_of_the_readme_is_the_quickstart() -> None:
    block = re.search(r"```yaml\n(.*?)```", text_of(ROOT / "README.md"), re.DOTALL)
    assert block is not None
    assert yaml.safe_load(block[1]) == yaml.safe_load(text_of(ROOT / "examples/quickstart.yaml"))


@pytest.mark.parametrize("page", ["README.md", "docs/install.md", "charts/finetune-operator/README.md"])
def test_the_oldest_kubernetes_is_the_one_that_the_chart_accepts(page: str) -> None:
    chart = yaml.safe_load(text_of(ROOT / "charts/finetune-operator/Chart.yaml"))
    oldest = re.findall(r"Kubernetes (\d+\.\d+) or newer", text_of(ROOT / page))
    assert [f">={version}.0-0" for version in oldest] == [chart["kubeVersion"]]


def test_the_exit_codes_of_the_architecture_are_those_of_the_contract() -> None:
    section = text_of(DOCS / "architecture.md").partition("\n## Exit codes\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (\w+) \|", section, re.MULTILINE) == [
        "code",
        *(str(int(code)) for code in ExitCode),
        "other",
    ]


def test_the_tree_of_the_bucket_names_every_folder_of_the_layout() -> None:
    tree = text_of(DOCS / "storage.md")
    keys = (
        layout.run_key(1),
        layout.metrics_key(1, 1),
        layout.checkpoint_folder(1, 1),
        layout.artifact_folder(1),
        layout.evaluation_key(1),
        layout.settings_key(1),
        layout.probe_key("t"),
    )
    assert [key for key in keys if f"\n  {key.partition('/')[0]}/<" not in tree] == []
    assert f"\n  {layout.ARTIFACT_POINTER} " in tree
    assert f"<uri>/{layout.BASES}/" in tree


# ---- docs/decisions.md ----


def test_every_decision_stands_under_a_room_and_the_room_leads_to_its_decisions() -> None:
    sections = re.split(r"^#{2,3} ", text_of(DOCS / "decisions.md"), flags=re.MULTILINE)
    assert "\n- **" not in sections[0]
    for section in sections[1:]:
        heading, _, body = section.partition("\n")
        if "\n- **" not in body:
            continue
        part, _, room = heading.partition("/")
        folder = f"{PARTS[part]}/{room}".rstrip("/")
        assert folder in rooms(), f"{heading} is no room"
        link = f"decisions.md#{heading.replace('/', '')}"
        assert link in rooms()[folder].purpose, f"the row of {folder} must link {link}"


# ---- The recipes of docs/extending.md ----

RECIPE = re.compile(r"^## .+?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
GREP = re.compile(r"^\$ (git grep -l[iwE]* .+)$", re.MULTILINE)


def recipes() -> dict[str, str]:
    """Return the recipes of docs/extending.md that show a `git grep` command: the text of each recipe, by its
    heading."""
    found = RECIPE.findall(text_of(DOCS / "extending.md"))
    return {text.partition("\n")[0].removeprefix("## "): text for text in found if GREP.search(text)}


@pytest.mark.parametrize("heading", recipes())
def test_a_recipe_names_every_file_that_its_example_touches(heading: str) -> None:
    """Each recipe has an example, such as a data format that exists already, and `git grep` commands that print every
    file that the example touches. The recipe must name all files that its commands print."""
    if not (ROOT / ".git").exists():
        # `git grep` needs a git repository, and a source archive has none.
        pytest.skip("needs the git repository")
    text = recipes()[heading]
    named = set(named_paths(text))
    for command in GREP.findall(text):
        result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        touched = result.stdout.split()
        assert touched, f"{command} finds nothing"
        missing = [file for file in touched if not any(file == path or file.endswith(f"/{path}") for path in named)]
        assert missing == [], command


def test_every_name_of_code_in_a_recipe_exists() -> None:
    sources = (path for folder in (*PARTS.values(), "tests", "examples") for path in (ROOT / folder).rglob("*.py"))
    words = {word for path in sources for word in re.findall(r"\w+", text_of(path))}
    names = re.findall(r"`(\w+)`", text_of(DOCS / "extending.md"))
    assert [name for name in names if name not in words] == []


def write_imports() -> None:
    """Write the column "imports" of docs/architecture.md anew, from the imports in the code."""
    page = DOCS / "architecture.md"

    def row(match: re.Match[str]) -> str:
        path, purpose, _, tests = match.groups()
        return f"| `{path}` | {purpose} | {imports_of(path)} | {tests} |" if path in packages() else match[0]

    page.write_text(ROOM_ROW.sub(row, text_of(page)), encoding="utf-8")


if __name__ == "__main__":
    write_imports()
