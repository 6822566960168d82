"""Measure how long the page of `finetune compare` takes until it is loaded in headless Chromium, for 20 runs of 10,000
steps against 2 runs of 100 steps.

The table has the size of each page, the number of its elements, and the median of the seconds from the navigation to
the end of the load event, and to the first picture.

    python -m tests.bench --only compare
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from playwright.sync_api import Browser
from rich.console import Console
from rich.table import Table

from finetune_cli.commands.compare_command import MARKER
from finetune_cli.compare.claims.findings import Comparison
from tests.cli.browser.chromium import fetched, running
from tests.cli.made_comparison import large_page, made_run, page_of, steps_of_a_run

OPENINGS = 9
LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"
PAINTED = "(performance.getEntriesByName('first-contentful-paint')[0] || {startTime: NaN}).startTime / 1000"


def main() -> None:
    """Print the table."""
    small = Comparison.of(made_run(index, steps_of_a_run(100, index)) for index in range(2))
    table = Table(title="the page of finetune compare in Chromium")
    for column in ("runs", "kB", "elements", "loaded (s)", "first picture (s)"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder, running(fetched()) as browser:
        for name, text in (("2 of 100 steps", page_of(small)), ("20 of 10,000 steps", large_page())):
            file = Path(folder) / "page.html"
            file.write_text(MARKER + text, encoding="utf-8")
            loaded, painted, elements = _opened(browser, file)
            table.add_row(name, f"{file.stat().st_size / 1000:.0f}", str(elements), f"{loaded:.2f}", f"{painted:.2f}")
    Console().print(table)


def _opened(browser: Browser, file: Path) -> tuple[float, float, int]:
    """Return the median of the seconds until the load event and until the first picture, and the number of
    elements."""
    loaded, painted, elements = [], [], 0
    for _ in range(OPENINGS):
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.goto(file.as_uri())
        page.screenshot()  # waits until the page is painted; the page's policy forbids scripts that could wait
        loaded.append(float(page.evaluate(LOADED)))
        painted.append(float(page.evaluate(PAINTED)))
        elements = int(page.evaluate("document.querySelectorAll('*').length"))
        page.close()
    return statistics.median(loaded), statistics.median(painted), elements


if __name__ == "__main__":
    main()
