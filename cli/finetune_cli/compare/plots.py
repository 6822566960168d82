"""Draws the plots of the page: curves of the runs and scores with intervals, as SVG by Vega-Lite. Pure.

The SVG has no script. Colours are CSS variables (`var(--run-3)`, `var(--grid)`, `currentColor`), so that the page
decides on light and dark, and can hide a run by making its colour transparent. Long curves are thinned to `BUCKETS`
parts, so that the page stays small whatever the number of steps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import vl_convert

from finetune_cli.compare.claims.findings import Comparison, FiguredRun
from finetune_cli.compare.figures import Point, main_score, score_interval

VEGA_LITE = "6.1"
WIDTH, HEIGHT = 370, 220
BUCKETS = 160
"""Number of parts into which a curve is divided. A part becomes one point of the line: the mean of its values."""
FEW_POINTS, MOST_CROSSES = 20, 40
"""A curve of at most FEW_POINTS points shows them as dots. Of many crosses of a run about MOST_CROSSES are shown."""
MOST_BANDS = 4
"""Most runs for which the lowest and the highest value of each part are shown as a band behind the line."""
LOG_SPAN = 20.0
"""The axis is logarithmic where the largest value is more than so many times as large as the smallest."""
NAME_LENGTH = 28
COLOURS = 10
"""Number of different colours. Further runs get the same colours with another dash pattern."""
DASHES: Sequence[Sequence[int]] = ([1, 0], [6, 3], [2, 2])
FONT = "system-ui, 'Segoe UI', 'Open Sans', sans-serif"
CONFIG: Mapping[str, Any] = {
    "aria": False,
    "background": None,
    "font": FONT,
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "gridColor": "var(--grid)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 13,
        "titleFontSize": 14,
        "titleFontWeight": "normal",
        "labelLimit": 190,
    },
    "view": {"stroke": None},
}


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis along which curves are drawn."""

    title: str
    of: Callable[[Point], float]
    label: str
    """Vega's expression for the text at a tick."""


SHORT_POWERS = "datum.value < 0.01 || datum.value >= 100000 ? format(datum.value, '~e') : format(datum.value, '~g')"
SHORT_AXIS = 4
"""Most powers of ten of a logarithmic axis with ticks between them."""
WITH_UNIT, PLAIN = "datum.value == 0 ? '0' : format(datum.value, '~s')", "format(datum.value, '~g')"
AXES = (
    Axis("step", lambda point: float(point.step), WITH_UNIT),
    Axis("tokens", lambda point: float(point.tokens), WITH_UNIT),
    Axis("hours of training", lambda point: point.hours, PLAIN),
)


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot: its title, what it shows in one sentence, and the SVG. No SVG where there is nothing to show."""

    title: str
    description: str
    svg: str


def colour_of(index: int) -> str:
    """Return the CSS colour of run number ``index``, counted from 0."""
    return f"var(--run-{index})"


def dash_of(index: int) -> Sequence[int]:
    """Return the dash pattern of run number ``index``. Runs with the same colour have different patterns."""
    return DASHES[index // COLOURS % len(DASHES)]


def curves(
    comparison: Comparison,
    title: str,
    axis: Axis,
    value: Callable[[Point], float | None],
    *,
    crossed: Callable[[Point], bool] | None = None,
) -> Plot | None:
    """Return the plot of ``value`` along ``axis`` for all runs, or None where no run has a value. A point for which
    ``crossed`` is true becomes a cross at the upper edge."""
    rows: list[dict[str, Any]] = []
    crosses: list[dict[str, Any]] = []
    said = []
    for index, item in enumerate(comparison.runs):
        points = item.points
        thinned = _thinned([(axis.of(point), found) for point in points if (found := value(point)) is not None])
        few = len(thinned) <= FEW_POINTS
        rows += [{"run": index, "x": x, "y": y, "low": low, "high": high, "few": few} for x, y, low, high in thinned]
        if crossed is not None:
            places = [_short(axis.of(point)) for point in points if crossed(point)]
            crosses += [{"run": index, "x": x} for x in places[:: max(1, len(places) // MOST_CROSSES)]]
        if thinned:
            said.append(f"{item.label} goes from {thinned[0][1]:.4g} to {thinned[-1][1]:.4g}")
        if crossed is not None and any(map(crossed, points)):
            said.append(f"{item.label} has steps that were not finite, shown as crosses")
    if not rows:
        return None
    lowest, highest = min(row["low"] for row in rows), max(row["high"] for row in rows)
    ticks = log_ticks(lowest, highest) if lowest > 0 and highest / lowest > LOG_SPAN else []
    layers = [_line(len(comparison.runs)), _dots()]
    if len(comparison.runs) <= MOST_BANDS:
        layers.insert(0, _band())
    layers = [_with_axis(layer, title, ticks) for layer in layers]
    if crosses:
        layers.append(_crosses(crosses))
    spec = {
        "data": {"values": rows},
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "axis": {"title": axis.title, "tickCount": 5, "labelExpr": axis.label},
            },
            "color": _runs_scale(len(comparison.runs)),
        },
        "layer": layers,
    }
    return Plot(f"{title} against {axis.title}", f"{title} against {axis.title}. {'; '.join(said)}.", _svg(spec))


def _with_axis(layer: dict[str, Any], title: str, ticks: Sequence[float]) -> dict[str, Any]:
    """Return ``layer`` with the scale of its y axis, which is logarithmic where there are ``ticks``."""
    axis: dict[str, Any] = {"title": title, "tickCount": 5, "labelExpr": PLAIN}
    if ticks:
        axis |= {"values": ticks, "labelExpr": SHORT_POWERS}
    scale = {"type": "log", "nice": False} if ticks else {"zero": False}
    y = layer["encoding"]["y"] | {"type": "quantitative", "axis": axis, "scale": scale}
    return {**layer, "encoding": {**layer["encoding"], "y": y}}


def log_ticks(low: float, high: float) -> list[float]:
    """Return the ticks of a logarithmic axis from ``low`` to ``high``, which are positive: powers of ten and, on a
    short axis, their multiples by 2 and 5. Vega's own ticks have a line for each digit."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(powers) <= SHORT_AXIS else (1,)
    return [found for power in powers for digit in digits if low <= (found := float(f"{digit}e{power}")) <= high]


def _line(count: int) -> dict[str, Any]:
    scale = {"domain": list(range(count)), "range": [dash_of(index) for index in range(count)]}
    return {
        "mark": {"type": "line", "strokeWidth": 2},
        "encoding": {
            "y": {"field": "y"},
            "strokeDash": {"field": "run", "type": "nominal", "legend": None, "scale": scale},
        },
    }


def _dots() -> dict[str, Any]:
    return {
        "transform": [{"filter": "datum.few"}],
        "mark": {"type": "point", "filled": True, "size": 40, "opacity": 1},
        "encoding": {"y": {"field": "y"}},
    }


def _crosses(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mark = {"type": "point", "shape": "M-1,-1L1,1M1,-1L-1,1", "size": 60, "strokeWidth": 2, "opacity": 1}
    return {"data": {"values": rows}, "mark": mark, "encoding": {"y": {"value": 6}}}


def _band() -> dict[str, Any]:
    return {
        "mark": {"type": "area", "opacity": 0.18, "line": False},
        "encoding": {"y": {"field": "low"}, "y2": {"field": "high"}},
    }


def _runs_scale(count: int) -> dict[str, Any]:
    return {
        "field": "run",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": list(range(count)), "range": [colour_of(index) for index in range(count)]},
    }


def _thinned(values: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Return at most BUCKETS points of the curve ``values``: the place of the last value of each part, and the mean,
    the lowest and the highest value. The numbers have as many digits as a plot can show."""
    found = []
    count = min(BUCKETS, len(values))
    for bucket in range(count):
        part = values[bucket * len(values) // count : (bucket + 1) * len(values) // count]
        heights = [y for _, y in part]
        found.append((_short(part[-1][0]), _short(fmean(heights)), _short(min(heights)), _short(max(heights))))
    return found


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def scores_plot(comparison: Comparison, task_name: str) -> Plot | None:
    """Return the plot of the main score of ``task_name``: one line for each run, with the base model as a hollow and
    the tuned model as a filled circle, and their intervals. None where no run has such a score."""
    rows: list[dict[str, Any]] = []
    said = []
    for index, item in enumerate(comparison.runs):
        if item.run.task_name != task_name or item.run.scores is None:
            continue
        for model, scores in (("base", item.run.scores.base), ("tuned", item.run.scores.tuned)):
            value = main_score(item.run, scores)
            if value is None or scores is None:
                continue
            name = item.run.task.main if item.run.task is not None else ""
            interval = score_interval(item.run.task, name, value, scores.graded)
            low, high = (interval.low, interval.high) if interval is not None else (value, value)
            rows.append(
                {"run": index, "name": _name(index, item), "model": model, "x": value, "low": low, "high": high}
            )
            said.append(f"{model} model of {item.label} {value:.3g}")
    if not rows:
        return None
    is_share = all(0 <= row["x"] <= 1 for row in rows)
    axis: dict[str, Any] = {
        "title": f"{plain(task_name)}: main score",
        "format": ".0%" if is_share else "~g",
        "tickCount": 5,
    }
    names = [_name(index, item) for index, item in enumerate(comparison.runs)]
    y = {"field": "name", "type": "nominal", "sort": names, "axis": {"title": None}}
    spec = {
        "data": {"values": rows},
        "height": {"step": 14},
        "encoding": {
            "y": y,
            "yOffset": {"field": "model", "type": "nominal", "sort": ["base", "tuned"], "scale": {"paddingOuter": 0.4}},
            "color": _runs_scale(len(comparison.runs)),
        },
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {
                    "x": {
                        "field": "low",
                        "type": "quantitative",
                        "axis": axis,
                        "scale": {"domain": [0, 1]} if is_share else {"zero": False},
                    },
                    "x2": {"field": "high"},
                },
            },
            {
                "transform": [{"filter": "datum.model == 'tuned'"}],
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {"x": {"field": "x", "type": "quantitative"}},
            },
            {
                "transform": [{"filter": "datum.model == 'base'"}],
                "mark": {"type": "point", "filled": False, "size": 80, "strokeWidth": 2, "opacity": 1},
                "encoding": {"x": {"field": "x", "type": "quantitative"}},
            },
        ],
    }
    return Plot(f"{task_name}: base and tuned model", f"Main score of {task_name}. {'; '.join(said)}.", _svg(spec))


def _name(index: int, item: FiguredRun) -> str:
    """Return a name for the axis that no other run has."""
    return f"{index + 1} {plain(item.label)}"


def plain(text: str) -> str:
    """Return ``text`` with at most `NAME_LENGTH` characters, and with `?` in place of each character that is no ASCII
    letter, no digit, no blank and none of `.`, `_` and `-`. Names of jobs and tasks have no other ones. The library
    gets no other text of somebody else, because it ends the whole process at some characters."""
    return re.sub(r"[^A-Za-z0-9 ._-]", "?", text)[:NAME_LENGTH]


def _svg(spec: Mapping[str, Any]) -> str:
    """Return ``spec`` as SVG that takes the width of the page, and whose text is part of the page."""
    svg: str = vl_convert.vegalite_to_svg(
        {"width": WIDTH, "height": HEIGHT, "config": CONFIG, **spec}, vl_version=VEGA_LITE
    )
    # The page describes the whole plot in words, so that a screen reader need not read every mark.
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
