"""Writes the rules and verdicts of attempts and the states of a job into docs/architecture.md, between its markers.

`make docs` runs `python -m finetune_operator.decide.reference docs/architecture.md`. A test compares the page with the
code (tests/operator/test_decide_reference.py).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from finetune_operator.decide.rules import RULES, Rule
from finetune_operator.decide.states import MEANINGS, state_diagram


def verdict_table() -> str:
    """Return a Markdown table with one line for each rule of `RULES`, in the order in which the rules are asked.

    A sentence about the rules for orders of `runPolicy` follows the table.
    """
    rows = [f"| `{rule.name}` | {rule.when} | {_verdict(rule)} |" for rule in RULES]
    orders = "An order of `runPolicy` is obeyed only while no other cause of the attempt's end is recorded."
    return "\n".join(["| rule | evidence | verdict |", "|---|---|---|", *rows, "", orders])


def _verdict(rule: Rule) -> str:
    if rule.verdict is None:
        return "none"
    return f"{rule.verdict} (order)" if rule.is_order else str(rule.verdict)


def states_section() -> str:
    """Return the states of a job as a Mermaid diagram and a Markdown table of their meanings."""
    rows = [f"| {state} | {meaning} |" for state, meaning in MEANINGS.items()]
    return "\n".join(["```mermaid", state_diagram(), "```", "", "| state | meaning |", "|---|---|", *rows])


SECTIONS = {"verdicts": verdict_table, "states": states_section}
"""For each name in a marker ``<!-- generated: NAME -->``, the function that returns the text of the section."""


def with_generated_sections(page: str) -> str:
    """Return ``page`` with fresh text in each section between ``<!-- generated: NAME -->`` and ``<!-- end -->``.

    Raises ValueError where the page lacks a section or has a section twice.
    """
    for name, make in SECTIONS.items():
        start, end = f"<!-- generated: {name} -->", "<!-- end -->"
        pattern = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", re.DOTALL)
        section = f"{start}\n\n{make()}\n\n{end}"
        page, count = pattern.subn(lambda _, section=section: section, page)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"the page must have the marker {start} once, followed by {end}; it has {count}")
    return page


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_generated_sections(path.read_text(encoding="utf-8")), encoding="utf-8")
