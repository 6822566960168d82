"""Makes the HTML file of a comparison: one file without scripts, which needs no network. Pure.

`page.html.jinja` is the template. Every text goes through Jinja's escaping and loses its control characters, and a
Content-Security-Policy in the file forbids scripts and requests, whatever a name or a setting contains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from finetune_cli.compare.claims.findings import Claim, Comparison, Finding, Verdict
from finetune_cli.compare.claims.study import STUDY
from finetune_cli.compare.page_tables import (
    NONE,
    OVERVIEW,
    SPEED,
    Column,
    answers_of,
    cost_column,
    events_of,
    score_rows,
)
from finetune_cli.compare.plots import AXES, COLOURS, Plot, colour_of, curves, dash_of, scores_plot
from finetune_cli.compare.settings import differences
from finetune_cli.terminal import printable

LIGHT = ("#0b63b5", "#b3420a", "#1b7a3d", "#8e3aa8", "#9a6700", "#00727d", "#c0265f", "#5a5a5a", "#5546c9", "#6b4a2b")
DARK = ("#6cb2ff", "#ff9a5c", "#62d18a", "#d694f0", "#e3b341", "#4fd0dc", "#ff82ae", "#b8b8b8", "#a79bff", "#d0a884")
"""Colours of the runs on a light and on a dark page. Each has a contrast of at least 4.5 to the page."""


def page(comparison: Comparison, findings: Sequence[tuple[Claim, Finding]], made: datetime, price: float | None) -> str:
    """Return the HTML file of ``comparison``. ``findings`` are those of the claims, ``made`` is the time that the page
    names, and ``price`` that of one GPU for one hour."""
    environment = Environment(
        loader=PackageLoader("finetune_cli.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    runs = comparison.runs
    verdicts = Counter(finding.verdict for _, finding in findings)
    speed = [*SPEED, *([cost_column(price)] if price is not None else [])]
    loss = [
        curves(
            comparison,
            "training loss",
            axis,
            lambda point: point.row.loss,
            crossed=lambda point: not point.row.is_finite,
        )
        for axis in AXES
    ]
    perplexity = [
        curves(comparison, "validation perplexity", axis, lambda point: point.row.perplexity) for axis in AXES
    ]
    steps = AXES[0]
    stability = [
        curves(comparison, "learning rate", steps, lambda point: point.row.learning_rate),
        curves(comparison, "gradient norm", steps, lambda point: point.row.gradient_norm),
        curves(comparison, "main score on validation rows", steps, lambda point: point.row.task_score),
    ]
    tasks = dict.fromkeys(item.run.task_name for item in runs if item.run.task_name is not None)
    events = [(index, events_of(item)) for index, item in enumerate(runs)]
    text: str = environment.get_template("page.html.jinja").render(
        runs=[_legend(comparison, index) for index in range(len(runs))],
        made=made.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        overview=_cells(comparison, OVERVIEW),
        speed=_cells(comparison, speed),
        scores=score_rows(comparison),
        answers=answers_of(comparison),
        score_plots=_plots([scores_plot(comparison, task) for task in tasks]),
        loss_plots=_plots(loss),
        perplexity_plots=_plots(perplexity),
        rate_plots=_plots(stability),
        incidents=[(index, found) for index, found in events if found],
        differences=differences([item.run for item in runs]),
        without_settings=[item.label for item in runs if item.run.settings is None],
        claims=[(claim, finding, finding.verdict.name.lower().replace("_", "-")) for claim, finding in findings],
        verdicts=[(verdict.value, verdicts[verdict]) for verdict in Verdict],
        study=STUDY,
        unknown=NONE,
    )
    return text


def _clean(value: Any) -> Any:
    """Return ``value`` without control characters if it is a text that is not markup."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def _legend(comparison: Comparison, index: int) -> dict[str, Any]:
    """Return what the template shows of a run beside its figures: names, colours, notices."""
    run = comparison.runs[index].run
    return {
        "index": index,
        "label": run.label,
        "address": run.address,
        "notices": run.notices,
        "dash": " ".join(map(str, dash_of(index))),
        "colour": colour_of(index),
        "light": LIGHT[index % COLOURS],
        "dark": DARK[index % COLOURS],
    }


def _cells(comparison: Comparison, columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Return the columns with the text of each run."""
    return [
        {
            "heading": column.heading,
            "meaning": column.meaning,
            "kind": column.kind.value,
            "cells": [column.cell(item) for item in comparison.runs],
        }
        for column in columns
    ]


def _plots(made: Sequence[Plot | None]) -> list[dict[str, Any]]:
    """Return the plots for the template. Only their SVG is markup: the library escapes the texts in it."""
    return [
        {"title": plot.title, "description": plot.description, "svg": Markup(plot.svg)}  # noqa: S704
        for plot in made
        if plot is not None
    ]
