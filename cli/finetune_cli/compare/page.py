"""Makes the HTML file of a comparison: one file without scripts, which needs no network. Pure.

`page.html.jinja` is the template. Every text goes through Jinja's escaping and loses its control characters, and a
Content-Security-Policy in the file forbids scripts and requests, whatever a name or a setting contains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from finetune_cli.compare.claims.findings import Comparison, FiguredRun, Verdict, percent, points
from finetune_cli.compare.claims.study import STUDY, findings_of
from finetune_cli.compare.figures import Point, gain_of, main_score, score_interval, scored_rows
from finetune_cli.compare.plots import AXES, COLOURS, Plot, colour_of, curves, dash_of, scores_plot
from finetune_cli.compare.settings import SettingRow, differences
from finetune_cli.compare.stored_files import ModelScores
from finetune_cli.formatting import count, duration, number, size
from finetune_cli.terminal import printable

MARKER = "<!doctype html>\n<!-- made by finetune compare -->\n"
"""Begin of each page, by which the command knows that it may replace the file."""
LIGHT = ("#0b63b5", "#b3420a", "#1b7a3d", "#8e3aa8", "#9a6700", "#00727d", "#c0265f", "#5a5a5a", "#5546c9", "#6b4a2b")
DARK = ("#6cb2ff", "#ff9a5c", "#62d18a", "#d694f0", "#e3b341", "#4fd0dc", "#ff82ae", "#b8b8b8", "#a79bff", "#d0a884")
"""Colours of the runs on a light and on a dark page. Each has a contrast of at least 4.5 to the page."""
NONE = "–"
"""What a cell shows where a value is not known."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its heading, what it means, and the text of each run."""

    heading: str
    meaning: str
    cells: tuple[str, ...]
    is_number: bool = True


def page(comparison: Comparison, made: datetime, price: float | None) -> str:
    """Return the HTML file of ``comparison``. ``made`` is the time that the page names, and ``price`` that of one GPU for
    one hour."""
    environment = Environment(
        loader=PackageLoader("finetune_cli.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    runs = comparison.runs
    findings = findings_of(comparison)
    verdicts = Counter(finding.verdict for _, finding in findings)
    return MARKER + environment.get_template("page.html.jinja").render(
        runs=[
            {
                "index": index,
                "label": item.label,
                "address": item.run.address,
                "dash": " ".join(map(str, dash_of(index))),
                "colour": colour_of(index),
                "light": LIGHT[index % COLOURS],
                "dark": DARK[index % COLOURS],
                "notices": item.run.notices,
                "method": item.run.tuning.value if item.run.tuning is not None else "method not known",
            }
            for index, item in enumerate(runs)
        ],
        made=made.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        overview=_overview(runs),
        speed=_speed(runs, price),
        scores=score_rows(comparison),
        score_plots=_plots([scores_plot(comparison, task) for task in _tasks(comparison)]),
        loss_plots=_plots([curves(comparison, "training loss", axis, _loss, crossed=_crossed) for axis in AXES]),
        perplexity_plots=_plots([curves(comparison, "validation perplexity", axis, _perplexity) for axis in AXES]),
        rate_plots=_plots(
            [
                curves(comparison, "learning rate", AXES[0], lambda point: point.row.learning_rate),
                curves(comparison, "gradient norm", AXES[0], lambda point: point.row.gradient_norm),
                curves(comparison, "main score on validation rows", AXES[0], lambda point: point.row.task_score),
            ]
        ),
        incidents=_incidents(runs),
        differences=differences([item.run for item in runs]),
        without_settings=[item.label for item in runs if item.run.settings is None],
        claims=[
            {
                "number": claim.number,
                "title": claim.title,
                "sentence": claim.sentence,
                "verdict": finding.verdict.value,
                "kind": finding.verdict.name.lower().replace("_", "-"),
                "evidence": finding.evidence,
                "to_test": finding.to_test,
            }
            for claim, finding in findings
        ],
        verdicts=[(verdict.value, verdicts[verdict]) for verdict in Verdict],
        study=STUDY,
        dash=NONE,
        setting_values=_setting_values,
    )


def _clean(value: Any) -> Any:
    """Return ``value`` without control characters if it is a text that is not yet markup."""
    return printable(value) if type(value) is str else value


def _plots(made: Sequence[Plot | None]) -> list[dict[str, Any]]:
    """Return the plots for the template. Only their SVG is markup: the library escapes the texts in it."""
    return [
        {"title": plot.title, "description": plot.description, "svg": Markup(plot.svg)}  # noqa: S704
        for plot in made
        if plot is not None
    ]


def _loss(point: Point) -> float | None:
    return point.row.loss


def _perplexity(point: Point) -> float | None:
    return point.row.perplexity


def _crossed(point: Point) -> bool:
    return not point.row.is_finite


def _tasks(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(item.run.task_name for item in comparison.runs if item.run.task_name is not None))


def _column(
    heading: str, meaning: str, runs: Sequence[FiguredRun], texts: Sequence[str], *, numbers: bool = True
) -> Column:
    return Column(heading, meaning, tuple(texts[: len(runs)]), numbers)


def _overview(runs: Sequence[FiguredRun]) -> list[Column]:
    """Return the columns of the first table: what was trained, and how well."""
    return [
        _column(
            "method",
            "What was trained: adapters or every parameter",
            runs,
            [_method(item) for item in runs],
            numbers=False,
        ),
        _column("task", "What grades the answers", runs, [item.run.task_name or NONE for item in runs], numbers=False),
        _column("steps", "Optimizer steps", runs, [f"{item.figures.steps:,}" for item in runs]),
        _column(
            "tokens",
            "Tokens of prompts and answers, without padding",
            runs,
            [count(item.figures.tokens) for item in runs],
        ),
        _column(
            "loss",
            "Mean training loss of the last steps (nats per token)",
            runs,
            [_number(item.figures.last_loss) for item in runs],
        ),
        _column(
            "best perplexity",
            "Least validation perplexity, and its step",
            runs,
            [
                NONE
                if item.figures.best_perplexity is None
                else f"{number(item.figures.best_perplexity)} at {item.figures.best_step:,}"
                for item in runs
            ],
        ),
        _column("main score", "Main score of the tuned model", runs, [_main(item) for item in runs]),
        _column(
            "stability",
            "Rollbacks, steps that were not finite, and a loss that exploded",
            runs,
            [item.stability for item in runs],
            numbers=False,
        ),
        _column(
            "state",
            "State of the job in the cluster, or what its folder says",
            runs,
            [_state(item) for item in runs],
            numbers=False,
        ),
    ]


def _method(item: FiguredRun) -> str:
    if item.run.tuning is None:
        return "not known"
    rank = item.run.setting("lora.rank")
    return f"{item.run.tuning} r {rank}" if rank is not None else str(item.run.tuning)


def _state(item: FiguredRun) -> str:
    if item.run.job is not None:
        return item.run.job.state
    return "has an artifact" if item.run.artifact is not None else "no artifact yet"


def _main(item: FiguredRun) -> str:
    value = main_score(item.run, item.run.scores.tuned) if item.run.scores is not None else None
    return NONE if value is None else _score_text(item, value)


def _score_text(item: FiguredRun, value: float) -> str:
    return percent(value) if item.run.task is not None and 0 <= value <= 1 else number(value)


def _number(value: float | None) -> str:
    return NONE if value is None else number(value)


def _speed(runs: Sequence[FiguredRun], price: float | None) -> list[Column]:
    """Return the columns of the table of speed, memory, sizes, time and cost."""
    figures = [item.figures for item in runs]
    columns = [
        _column(
            "tokens per second",
            "Tokens without padding, over all processes",
            runs,
            [NONE if f.tokens_per_second is None else f"{f.tokens_per_second:,.0f}" for f in figures],
        ),
        _column(
            "MFU",
            "Model FLOPs utilisation, measured on GPUs only",
            runs,
            [NONE if f.mfu is None else f"{f.mfu:.1%}" for f in figures],
        ),
        _column(
            "peak memory",
            "Memory of rank 0 at its peak: of the GPU, or of the process on a CPU",
            runs,
            [NONE if f.memory_bytes is None else size(f.memory_bytes) for f in figures],
        ),
        _column(
            "checkpoint", "Size of the newest checkpoint", runs, [_size(item.run.checkpoint_bytes) for item in runs]
        ),
        _column(
            "artifact",
            "Size of the adapter or the model",
            runs,
            [_size(item.run.artifact.bytes if item.run.artifact else None) for item in runs],
        ),
        _column(
            "training time",
            "Time of the steps that led to the model",
            runs,
            [duration(3600 * f.hours) for f in figures],
        ),
        _column(
            "discarded steps",
            "Steps that a rollback or a restart left behind",
            runs,
            [f"{f.discarded_steps:,}" for f in figures],
        ),
        _column(
            "processes",
            "Training processes, one for each GPU",
            runs,
            [_whole(item.run.processes, item) for item in runs],
        ),
        _column(
            "GPU hours",
            "Counted by the operator, or else those of the steps in the log",
            runs,
            [_gpu_hours(item) for item in runs],
        ),
    ]
    if price is not None:
        columns.append(
            _column(
                "cost",
                f"GPU hours times {price:g}",
                runs,
                [NONE if f.cost is None else f"{f.cost:,.2f}" for f in figures],
            )
        )
    return columns


def _size(value: int | None) -> str:
    return NONE if value is None else size(value)


def _whole(value: int | None, item: FiguredRun) -> str:
    device = {True: " GPU", False: " CPU", None: ""}[item.run.on_gpu]
    return NONE if value is None else f"{value}{device}"


def _gpu_hours(item: FiguredRun) -> str:
    figures = item.figures
    if figures.gpu_hours is None:
        return NONE
    source = "operator" if figures.counted_by_operator else "steps"
    kind = "CPU process hours, " if item.run.on_gpu is False else ""
    return f"{number(figures.gpu_hours)} ({kind}{source})"


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """A row of the table of scores: one score of one run, for the base model and for the tuned model."""

    index: int
    label: str
    task: str
    score: str
    rows: str
    base: str
    tuned: str
    gain: str
    """What the tuned model has gained, with its interval; only for the main score."""


def score_rows(comparison: Comparison) -> list[ScoreRow]:
    """Return the rows of the table of scores: of each run the main score first, then the others and the perplexities."""
    found = []
    for index, item in enumerate(comparison.runs):
        scores = item.run.scores
        if scores is None:
            continue
        main = item.run.task.main if item.run.task is not None else None
        tuned, base = scores.tuned, scores.base
        names = list(dict.fromkeys([*(tuned.scores if tuned else ()), *(base.scores if base else ())]))
        names.sort(key=lambda name: name != main)
        gain = gain_of(item.run)
        for name in names:
            is_main = name == main or (main is None and len(names) == 1)
            found.append(
                ScoreRow(
                    index,
                    item.label,
                    item.run.task_name or "own or unknown",
                    name,
                    _graded(tuned or base),
                    _valued(item, name, base),
                    _valued(item, name, tuned),
                    points(gain) if is_main and gain is not None else NONE,
                )
            )
        for name, base_value, tuned_value in (
            ("perplexity", base and base.perplexity, tuned and tuned.perplexity),
            ("perplexity of all tokens", base and base.all_token_perplexity, tuned and tuned.all_token_perplexity),
        ):
            if base_value is not None or tuned_value is not None:
                found.append(
                    ScoreRow(
                        index,
                        item.label,
                        item.run.task_name or NONE,
                        name,
                        scored_rows(scores),
                        _number(base_value),
                        _number(tuned_value),
                        NONE,
                    )
                )
    return found


def _graded(model: ModelScores | None) -> str:
    if model is None:
        return NONE
    left_out = f", {model.not_graded} not graded" if model.not_graded else ""
    return f"{model.graded} answers{left_out}"


def _valued(item: FiguredRun, name: str, model: ModelScores | None) -> str:
    """Return the value of a score with its interval."""
    value = model.scores.get(name) if model is not None else None
    if model is None or value is None:
        return NONE
    interval = score_interval(item.run.task, name, value, model.graded)
    if interval is None:
        return number(value)
    return f"{percent(value)} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _incidents(runs: Sequence[FiguredRun]) -> list[dict[str, Any]]:
    """Return what happened to each run beside its training: rollbacks, restarts, incidents, discarded steps."""
    found = []
    for index, item in enumerate(runs):
        training = item.run.training
        events = [
            f"Rollback to step {rollback.step}: {rollback.reason or 'no reason given'}; the rate was multiplied by"
            f" {rollback.rate_factor:g}, and the batches of steps {rollback.skip_from} to {rollback.skip_to} were left out."
            for rollback in training.rollbacks
        ]
        if item.run.job is not None:
            events += item.run.job.incidents
        if training.restarts:
            events.append(f"The ranks started again {training.restarts} time{'s' if training.restarts > 1 else ''}.")
        if training.discarded:
            events.append(f"{len(training.discarded)} computed steps were left behind.")
        if (explosion := item.figures.explosion) is not None:
            events.append(
                f"The training loss rose from {explosion.before:.4g} to {explosion.level:.4g} (medians) at step"
                f" {explosion.step}."
            )
        if item.figures.not_finite:
            events.append(f"{item.figures.not_finite} steps had a loss or a gradient that was not finite.")
        if events:
            found.append({"index": index, "label": item.label, "events": events})
    return found


def _setting_values(row: SettingRow) -> list[str]:
    return [NONE if value is None else value for value in row.values]
