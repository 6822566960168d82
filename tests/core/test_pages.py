"""The commands and examples on the pages of the documentation are right: their names, versions, namespaces, options and
YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_core.validation.validate_job import validate_job
from finetune_operator.process.settings import parse_settings
from tests.core.jobs import quickstart
from tests.core.test_docs import DOCS, PAGES, PARTS, ROOT, text_of

CHART = ROOT / "charts/finetune-operator"
INSTALLATION = [ROOT / "README.md", CHART / "README.md", CHART / "templates/NOTES.txt", *sorted(DOCS.glob("*.md"))]
YAML_BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def by_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_nothing_is_installed_by_a_name_that_anybody_could_take(page: Path) -> None:
    """The project is on no package index. `pip install finetune-operator` would therefore run any code that somebody
    uploads to the index under this name."""
    assert_nothing_is_installed_by_name(page)


def test_no_program_says_to_install_such_a_name() -> None:
    sources = [path for part in PARTS.values() for path in (ROOT / part).rglob("*.py")]
    assert len(sources) > 300
    for path in sources:
        assert_nothing_is_installed_by_name(path)


def assert_nothing_is_installed_by_name(page: Path) -> None:
    for line in re.findall(r"pip3? install (.*)", text_of(page)):
        assert "finetune" not in line or " @ git+" in line, line
    assert not re.search(r"\b(?:uvx|pipx)\b.*finetune", text_of(page))


@pytest.mark.parametrize("page", INSTALLATION, ids=by_name)
def test_the_version_of_kubernetes_is_that_of_the_chart(page: Path) -> None:
    wanted = re.findall(r">=(\d+\.\d+)", yaml.safe_load(text_of(CHART / "Chart.yaml"))["kubeVersion"])
    assert set(re.findall(r"Kubernetes (1\.\d+)", text_of(page))) <= set(wanted)


@pytest.mark.parametrize("page", INSTALLATION, ids=by_name)
def test_all_pages_install_into_the_same_namespace(page: Path) -> None:
    namespace = parse_settings([], {"FINETUNE_TRAINER_IMAGE": "i"}).namespace
    commands = [line for line in text_of(page).splitlines() if re.search(r"helm |deploy/finetune|get lease", line)]
    named = re.findall(r"(?:-n|--namespace)[ =]([a-z-]+)", "\n".join(commands))
    assert set(named) <= {namespace}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_no_upgrade_leaves_the_new_values_of_a_chart_undefined(page: Path) -> None:
    for block in re.findall(r"^```.*?^```", text_of(page), re.MULTILINE | re.DOTALL):
        assert not re.search(r"(?<!then)-reuse-values", block.replace("--reset-then-reuse-values", ""))


def sections(page: Path) -> list[dict[str, Any]]:
    """Return the YAML examples of a page that are sections of a job's spec, such as `storage`."""
    documents = [yaml.safe_load(block) for block in YAML_BLOCK.findall(text_of(page))]
    known = set(quickstart()["spec"])
    return [found for found in documents if isinstance(found, dict) and found and set(found) <= known]


def test_the_recipe_of_the_storage_page_is_accepted() -> None:
    (recipe,) = [found for found in sections(DOCS / "storage.md") if "identity" in found.get("storage", {})]
    document = quickstart()
    document["spec"] |= recipe
    assert validate_job(document).problems == []


@pytest.mark.parametrize("page", [page for page in PAGES if sections(page)], ids=by_name)
def test_every_example_of_a_section_is_accepted(page: Path) -> None:
    for recipe in sections(page):
        document = quickstart()
        document["spec"] |= recipe
        assert validate_job(document).problems == []


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_no_page_asks_for_a_variable_that_a_job_must_not_set(page: Path) -> None:
    for sentence in re.split(r"(?<=[.:])\s", text_of(page)):
        assert not re.search(r"AWS_\w+`? .*in `podTemplate.env`", sentence.replace("\n", " ")), sentence
