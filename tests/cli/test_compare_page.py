"""The page of `finetune compare` is one file without scripts and requests, whatever names and settings contain, and it
stays small with many long runs."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_cli.compare.claims.findings import Comparison
from finetune_cli.compare.claims.study import findings_of
from finetune_cli.compare.plots import AXES, BUCKETS, curves, log_ticks, scores_plot
from finetune_cli.compare.table import as_table
from finetune_cli.terminal import SafeConsole, printable
from tests.cli.made_comparison import large_page, made_run, page_of, run_with_text, steps_of_a_run

MOST_BYTES, MOST_ELEMENTS = 1_000_000, 8_000
"""Budget of the page for 20 runs of 10,000 steps. Such a page opens in a fraction of 2 seconds: `make bench` measures
it (tests/bench/compare.py)."""
TAGS = frozenset(
    re.findall(
        r"\S+",
        "html head meta title style body a header h1 h2 h3 p code nav ul li main section div table caption "
        "thead tr th tbody td svg g path line text details summary dl dt dd figure figcaption fieldset legend "
        "label input span strong footer tspan defs clippath rect circle",
    )
)
"""The elements of a page. None of them runs a script or loads something."""
ATTRIBUTES = frozenset(
    re.findall(
        r"\S+",
        "lang charset http-equiv content name class id href for type checked open role tabindex scope focusable "
        "colspan aria-label aria-labelledby aria-hidden aria-roledescription",
    )
)
DRAWING = frozenset(
    re.findall(
        r"\S+",
        "xmlns xmlns:xlink version width height viewbox fill stroke stroke-width stroke-dasharray stroke-miterlimit "
        "stroke-linecap opacity fill-opacity transform d x x1 x2 y y1 y2 text-anchor font-family font-size "
        "font-weight pointer-events display dx dy clip-path rx ry cx cy r",
    )
)
"""The attributes of the template and of plots. None of them runs a script or loads something."""
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'</style><style>*{display:none}</style>",
    "</title><iframe src=//example.com>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "&lt;b&gt;&#x3c;b>",
    "\x1b]0;title\x07\x1b[2J\u202eabc\u2066",
    "]]><!--<svg onload=alert(1)>-->",
    "${alert(1)}`",
    "a" * 300,
)


class Found(HTMLParser):
    """Collects elements, attributes and texts of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.comments: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def found_in(html: str) -> Found:
    parser = Found()
    parser.feed(html)
    parser.close()
    return parser


def assert_harmless(html: str) -> Found:
    """Assert that a page has only the elements and attributes of the template and of plots, and links into itself."""
    found = found_in(html)
    assert set(found.tags) <= TAGS
    for tag, name, value in found.attributes:
        assert name in ATTRIBUTES | DRAWING, (tag, name)
        assert name != "href" or re.fullmatch("#[a-z]+", value or ""), value
    assert found.comments == []
    assert found.tags.count("style") == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    return found


TEXTS = st.text(max_size=40) | st.lists(st.sampled_from([*HOSTILE[:10], "<", ">", "&", '"', "'", "/"])).map("".join)


@settings(max_examples=10)
@given(st.lists(TEXTS, min_size=1, max_size=3))
@example(list(HOSTILE))
def test_no_text_becomes_an_element_an_attribute_or_a_control_character(texts: list[str]) -> None:
    comparison = Comparison.of(run_with_text(text, index) for index, text in enumerate(texts))
    found = assert_harmless(page_of(comparison))
    shown = "".join(found.texts)
    for text in texts:
        assert printable(text) in shown


def test_a_plot_has_hostile_names_as_text_only() -> None:
    comparison = Comparison.of(run_with_text(text, index) for index, text in enumerate(HOSTILE))
    for text in HOSTILE:
        plot = scores_plot(comparison, text)
        assert plot is not None
        assert set(found_in(plot.svg).tags) <= TAGS


@settings(max_examples=25)
@given(st.lists(TEXTS, min_size=1, max_size=3))
@example(list(HOSTILE))
def test_no_text_reaches_the_terminal_as_a_control_character_or_markup(texts: list[str]) -> None:
    comparison = Comparison.of(run_with_text(text, index) for index, text in enumerate(texts))
    output = io.StringIO()
    SafeConsole(file=output, width=200).print(as_table(comparison, findings_of(comparison), 2.5))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", output.getvalue())


def test_the_page_forbids_scripts_and_requests() -> None:
    html = page_of(Comparison.of([made_run(0, steps_of_a_run(60, 0))]))
    found = assert_harmless(html)
    (policy,) = (value for _, name, value in found.attributes if name == "content" and "default-src" in (value or ""))
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "script-src" not in policy
    assert "url(" not in html
    assert "@import" not in html


def test_the_page_of_many_long_runs_keeps_its_budget() -> None:
    html = large_page()
    assert len(html.encode()) <= MOST_BYTES
    assert len(found_in(html).tags) <= MOST_ELEMENTS


def test_a_long_curve_is_thinned_and_keeps_its_spikes() -> None:
    steps = [*steps_of_a_run(5000, 0)]
    comparison = Comparison.of([made_run(0, steps)])
    plot = curves(comparison, "training loss", AXES[0], lambda point: 9.0 if point.step == 2500 else 1.0)
    assert plot is not None
    lines = [path for path in re.findall(r'<path[^>]* d="([^"]*)"[^>]*>', plot.svg) if path.count("L") > 10]
    assert max(path.count("L") for path in lines) <= 2 * BUCKETS
    # The band behind the line reaches from the lowest value to the spike.
    heights = [float(y) for path in lines for y in re.findall(r"[ML][-\d.]+,([-\d.]+)", path)]
    assert min(heights) < 40
    assert max(heights) > 180


def test_a_step_that_was_not_finite_is_a_cross() -> None:
    comparison = Comparison.of([made_run(0, steps_of_a_run(60, 0))])
    with_crosses, without = (
        curves(comparison, "loss", AXES[0], lambda point: point.row.loss, crossed=crossed)
        for crossed in (lambda point: point.step == 30, lambda point: False)
    )
    assert with_crosses is not None
    assert without is not None
    assert "not finite" in with_crosses.description
    assert "not finite" not in without.description
    assert with_crosses.svg.count("<path") > without.svg.count("<path")


def test_values_that_nobody_measured_have_no_plot() -> None:
    comparison = Comparison.of([made_run(0)])
    assert curves(comparison, "training loss", AXES[0], lambda point: point.row.loss) is None
    assert "No step is in a step log yet" in page_of(comparison)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.02, 3, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]),
        (1e-7, 0.5, [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
        (1, 30, [1, 2, 5, 10, 20]),
    ],
)
def test_the_ticks_of_a_logarithmic_axis_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == ticks


def test_one_run_is_shown_alone_and_says_so() -> None:
    assert "One run is shown alone" in page_of(Comparison.of([made_run(0)]))
    assert "One run is shown alone" not in page_of(Comparison.of([made_run(0), made_run(1)]))


def test_equal_runs_make_equal_pages() -> None:
    comparison = Comparison.of([made_run(0, steps_of_a_run(60, 0)), made_run(1, steps_of_a_run(60, 1))])
    assert page_of(comparison) == page_of(comparison)
