"""docs/planning.md shows what was measured and what others have published.

`python -m tests.planning.test_planning_page` writes the tables into the page.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from finetune_core.planning.gpu_types import GIBIBYTE, GPU_TYPES
from finetune_core.planning.model_families import FAMILIES
from tests.planning.memory_cases import CASES, MODELS
from tests.planning.planned_cases import planned
from tests.planning.public_measurements import (
    A100,
    CLAIMS,
    FIGURES,
    LITGPT_RUNS,
    TOLERANCE,
    FitClaim,
    LitgptRun,
    PublicFigure,
    needed_gibibytes,
)
from tests.planning.test_planned_memory import errors, stored

PAGE = Path(__file__).parents[2] / "docs/planning.md"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def gpu_types() -> str:
    """Return the table of the built-in types of GPUs."""
    head = ("type", "memory (GiB)", "bf16 (TFLOP/s)", "memory (GB/s)", "between GPUs (GB/s)")
    return table(
        head,
        (
            (
                gpu.name,
                f"{gpu.memory_gibibytes:g}",
                f"{gpu.tera_flops:g}" if gpu.bf16 else f"none (fp16: {gpu.tera_flops:g})",
                f"{gpu.memory_bandwidth:g}",
                f"{gpu.link_bandwidth:g}",
            )
            for gpu in GPU_TYPES
        ),
    )


def families() -> str:
    """Return the list of the known families."""
    return ", ".join(f"`{name}`" for name in sorted(FAMILIES)) + "."


def measured() -> str:
    """Return the table of the measured cases, and the sentence about the errors."""
    found = stored()
    error = errors(found)
    rows = []
    for name, case in CASES.items():
        method = "Full" if case.rank is None else f"LoRA r {case.rank}"
        others = [
            *(["recomputed"] if case.recompute else []),
            *([f"{case.accumulation} micro-batches"] if case.accumulation > 1 else []),
            *([f"dropout {case.dropout}"] if case.dropout != "0" else []),
            *([case.precision] if case.precision != "bf16" else []),
        ]
        layers = case.layers or MODELS[case.model]["num_hidden_layers"]
        rows.append(
            (
                f"{case.model} ({layers} layers)",
                method,
                f"{case.stage} of {case.processes}",
                f"{case.micro_batch} x {case.length}",
                ", ".join(others),
                f"{found[name].peak / GIBIBYTE:.2f}",
                f"{planned(case).step_peak / GIBIBYTE:.2f}",
                f"{error[name]:+.1%}",
            )
        )
    head = ("model", "method", "ZeRO stage", "micro-batch", "", "measured (GiB)", "plan (GiB)", "error")
    middle = statistics.median(map(abs, error.values()))
    sentence = (
        f"The median of the errors is {middle:.1%}. The plan is {-min(error.values()):.1%} too low and"
        f" {max(error.values()):.1%} too high at most."
    )
    return f"{table(head, rows)}\n\n{sentence}"


def quantity(value: float, unit: str) -> str:
    """Return ``value`` with at most four digits, or as a whole number from 1000 on, and its unit."""
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.4g} {unit}"


def published() -> str:
    """Return the table of the published figures."""

    def row(figure: PublicFigure) -> tuple[str, ...]:
        return (
            figure.source,
            figure.training,
            quantity(figure.published, figure.unit),
            quantity(figure.planned(), figure.unit),
            f"{figure.difference:+.0%}",
            figure.explanation,
        )

    return table(("source", "training", "published", "plan", "difference", "why"), map(row, FIGURES))


def claims() -> str:
    """Return the table of what fits a node by the study."""

    def row(claim: FitClaim) -> tuple[str, ...]:
        return (
            claim.training,
            "trains" if claim.fits else "does not fit",
            f"{needed_gibibytes(claim.setup):.1f} of {A100.memory_gibibytes:g} GiB a GPU",
        )

    return table(("training", "study", "plan"), map(row, CLAIMS))


PARTS = {
    "gpu-types": gpu_types,
    "families": families,
    "measured": measured,
    "published": published,
    "claims": claims,
}


def with_tables(page: str) -> str:
    """Return ``page`` with the tables between their markers."""
    for name, make in PARTS.items():
        shown = re.compile(f"<!-- generated: {name} -->\n.*?<!-- end -->", re.DOTALL)
        assert len(shown.findall(page)) == 1
        text = f"<!-- generated: {name} -->\n\n{make()}\n\n<!-- end -->"
        page = shown.sub(text.replace("\\", r"\\"), page)
    return page


def test_the_page_shows_what_was_measured_and_published() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run: make docs"


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.source[:12]} {figure.training}")
def test_a_published_figure_is_met_or_the_difference_is_explained(figure: PublicFigure) -> None:
    assert (abs(figure.difference) > TOLERANCE) == bool(figure.explanation)


@pytest.mark.parametrize("run", LITGPT_RUNS, ids=lambda run: run.training)
def test_litgpt_takes_what_the_plan_says_of_the_kernels_of_transformers(run: LitgptRun) -> None:
    assert run.without_kernels == pytest.approx(run.published, rel=TOLERANCE)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.training)
def test_the_study_trains_what_fits(claim: FitClaim) -> None:
    assert (needed_gibibytes(claim.setup) <= A100.memory_gibibytes) == claim.fits


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
