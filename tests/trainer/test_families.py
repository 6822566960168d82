"""Models of every family train, resume and are published as docs/models.md says.

`python -m tests.trainer.family_matrix` runs all families and stores what it finds, and
`python -m tests.trainer.test_families` writes the table of what was found into the page.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.trainer.families import FAMILIES
from tests.trainer.family_matrix import Findings, examine, stored_results
from tests.trainer.objectstore import ObjectStore

PAGE = Path(__file__).parents[2] / "docs/models.md"
SHOWN = re.compile(r"<!-- generated: families -->\n.*?<!-- end -->", re.DOTALL)
QUICK = ("apertus", "qwen3.5-vision")
"""Families that differ most from Llama. apertus has weights of a single number, which two ranks can't share.
qwen3.5-vision is a text model inside of a larger model, with layers that carry a state. `test_lora_variants.py` trains
families with experts."""
SECONDS = 600


def line_of(name: str, findings: Findings) -> str:
    """Return the line of the page's table about the family ``name``."""
    # The findings about a family name a kernel if a model of the family was trained.
    refused = "kernel" not in findings
    failed = bool(findings.get("lora") or findings.get("full"))
    packed = [findings.get(f"{method} packed", "") for method in ("lora", "full")]
    limits: dict[str, list[str]] = {}
    for check, sentence in findings.items():
        if sentence and check not in ("kernel", "preflight") and not (refused and check.endswith("packed")):
            limits.setdefault(sentence, []).append(check)
    told = "; ".join(f"{' and '.join(checks)}: {sentence}" for sentence, checks in limits.items())
    cells = [
        name,
        f"`{FAMILIES[name].model_type}`",
        "refused" if refused else "in part" if failed else "works with a limit" if told else "works",
        "no" if refused or any(sentence.startswith("dataset.packing: ") for sentence in packed) else "yes",
        findings.get("kernel", ""),
        told.replace("|", "\\|"),
    ]
    return f"| {' | '.join(cells)} |"


def with_table(page: str) -> str:
    """Return ``page`` with the table of the stored findings between the markers."""
    lines = [line_of(name, findings) for name, findings in stored_results().items()]
    head = [
        "| family | `model_type` | LoRA and Full | packing | attention on CPUs | limit or reason |",
        "|---|---|---|---|---|---|",
    ]
    table = "\n".join([*head, *lines])
    return SHOWN.sub(lambda _: f"<!-- generated: families -->\n\n{table}\n\n<!-- end -->", page)


def test_the_page_shows_what_was_found() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- generated: families -->") == 1
    assert page == with_table(page), "run: make docs"


def test_every_family_was_examined() -> None:
    assert stored_results().keys() == FAMILIES.keys()


@pytest.mark.gang
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", QUICK)
def test_a_contrasting_family_does_what_the_page_says(name: str, empty_store: ObjectStore, tmp_path: Path) -> None:
    assert examine(name, empty_store, tmp_path) == stored_results()[name]


@pytest.mark.long
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in QUICK])
def test_a_family_does_what_the_page_says(name: str, empty_store: ObjectStore, tmp_path: Path) -> None:
    assert examine(name, empty_store, tmp_path) == stored_results()[name]


def test_a_finding_of_the_preflight_check_is_what_the_trainer_refuses() -> None:
    """The preflight check of a LoRA job has a finding exactly where the trainer refuses the job with a sentence about a
    field."""
    differ = {
        name: (findings["preflight"], findings.get("lora", ""))
        for name, findings in stored_results().items()
        if bool(findings["preflight"]) != bool(re.match(r"(model|dataset|training|lora)[\w.]*: ", findings["lora"]))
    }
    assert not differ


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
