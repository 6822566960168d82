"""Shows a comparison in the terminal: the runs, their scores, and what they say about the claims. Pure.

Names and settings may contain control characters, which `SafeConsole` removes.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune_cli.compare.claims.findings import Claim, Comparison, FiguredRun, Finding, Verdict, points
from finetune_cli.compare.figures import gain_of
from finetune_cli.compare.page_tables import NONE, main_score_text, number_or_none, size_or_none
from finetune_cli.compare.settings import differences
from finetune_cli.formatting import count, duration

STYLES = {Verdict.SEEN: "green", Verdict.NOT_SEEN: "red", Verdict.NOT_TESTED: "bright_black"}
RUNS_ABREAST = 5
"""Most runs beside each other in the first table. More runs stand below."""
MOST_DIFFERENCES = 12
"""Most settings that are shown. The page has all of them."""
VALUE_LENGTH = 40


def as_table(comparison: Comparison, findings: Sequence[tuple[Claim, Finding]], price: float | None) -> RenderableType:
    """Return the comparison for people. ``findings`` are those of the claims, and ``price`` is that of one GPU for one
    hour."""
    runs = comparison.runs
    rows: list[tuple[str, list[str]]] = [
        ("method", [str(item.run.tuning or "not known") for item in runs]),
        ("task", [item.run.task_name or NONE for item in runs]),
        ("base score", [_score(item, tuned=False) for item in runs]),
        ("tuned score", [_score(item, tuned=True) for item in runs]),
        ("steps", [f"{item.figures.steps:,}" for item in runs]),
        ("tokens", [count(item.figures.tokens) for item in runs]),
        ("training loss", [number_or_none(item.figures.last_loss) for item in runs]),
        ("best perplexity", [number_or_none(item.figures.best_perplexity) for item in runs]),
        ("stability", [item.stability for item in runs]),
        ("tokens per second", [number_or_none(item.figures.tokens_per_second) for item in runs]),
        ("MFU", [NONE if item.figures.mfu is None else f"{item.figures.mfu:.1%}" for item in runs]),
        ("peak memory", [size_or_none(item.figures.memory_bytes) for item in runs]),
        ("checkpoint", [size_or_none(item.run.checkpoint_bytes) for item in runs]),
        (
            "artifact",
            [size_or_none(item.run.artifact.bytes if item.run.artifact is not None else None) for item in runs],
        ),
        ("training time", [duration(3600 * item.figures.hours) for item in runs]),
        (
            "CPU process hours" if all(item.run.on_gpu is False for item in runs) else "GPU hours",
            [number_or_none(item.figures.gpu_hours) for item in runs],
        ),
    ]
    if price is not None:
        rows.append(("cost", [NONE if item.figures.cost is None else f"{item.figures.cost:,.2f}" for item in runs]))
    parts: list[RenderableType] = []
    for first in range(0, len(runs), RUNS_ABREAST):
        names = (f"{index + 1} {runs[index].label}" for index in range(len(runs))[first : first + RUNS_ABREAST])
        table = _table("", *names)
        for name, texts in rows:
            table.add_row(Text(name, style="bold"), *texts[first : first + RUNS_ABREAST])
        parts += [table, Text()]
    parts += _gains(runs)
    parts += _settings(comparison)
    parts.append(_claims(findings))
    notices = [(item.label, notice) for item in runs for notice in item.run.notices]
    if notices:
        parts += [Text(), *(Text(f"{label}: {notice}", style="yellow") for label, notice in notices)]
    return Group(*parts)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        # A name may look like rich's markup, so it is a Text and no string.
        table.add_column(Text(column), overflow="fold")
    return table


def _score(item: FiguredRun, *, tuned: bool) -> str:
    scores = item.run.scores
    return main_score_text(item, (scores.tuned if tuned else scores.base) if scores is not None else None)


def _gains(runs: tuple[FiguredRun, ...]) -> list[RenderableType]:
    gains = [(item.label, gain) for item in runs if (gain := gain_of(item.run)) is not None]
    if not gains:
        return []
    return [*(Text(f"{label}: the tuned model gained {points(gain)}") for label, gain in gains), Text()]


def _settings(comparison: Comparison) -> list[RenderableType]:
    rows = [row for row in differences([item.run for item in comparison.runs]) if row.defines_training]
    if not rows:
        return []
    table = _table("differs", *(str(index) for index in range(1, len(comparison.runs) + 1)))
    for row in rows[:MOST_DIFFERENCES]:
        table.add_row(Text(row.path, style="cyan"), *(_shortened(value) for value in row.values))
    more = len(rows) - MOST_DIFFERENCES
    left_out = [Text(f"and {more} more, which the page has", style="bright_black")] if more > 0 else []
    return [table, *left_out, Text()]


def _shortened(value: str | None) -> str:
    if value is None:
        return NONE
    return value if len(value) <= VALUE_LENGTH else f"{value[: VALUE_LENGTH - 1]}…"


def _claims(findings: Sequence[tuple[Claim, Finding]]) -> RenderableType:
    """Return the claims about which the runs say something, and how many others there are."""
    tested = [item for item in findings if item[1].verdict is not Verdict.NOT_TESTED]
    left = len(findings) - len(tested)
    untested = Text(f"not tested: {left} claims of the study; the page says what to run for them", style="bright_black")
    if not tested:
        return untested
    table = _table("", "claim of the study", "", "")
    for claim, finding in tested:
        evidence = finding.evidence[0] if finding.evidence else finding.to_test
        table.add_row(
            str(claim.number), claim.title, Text(finding.verdict.value, style=STYLES[finding.verdict]), evidence
        )
    return Group(table, untested) if left else table
