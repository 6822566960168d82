"""The generated sections of docs/architecture.md, verdicts and states of a job, agree with the code."""

from __future__ import annotations

import pytest

from finetune_operator.decide.reference import with_generated_sections
from tests.operator.builders import REPOSITORY

PAGE = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")


def test_the_generated_sections_of_the_page_are_up_to_date() -> None:
    assert with_generated_sections(PAGE) == PAGE, "run: make docs"


@pytest.mark.parametrize("marker", ["<!-- generated: verdicts -->", "<!-- generated: states -->"])
def test_a_page_without_a_marker_is_refused(marker: str) -> None:
    with pytest.raises(ValueError, match="generated"):
        with_generated_sections(PAGE.replace(marker, ""))
