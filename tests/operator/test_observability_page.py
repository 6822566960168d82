"""docs/observability.md explains every Prometheus metric that the operator serves, and no other metric, and shows the
alert rules of the chart. `python -m tests.operator.test_observability_page` writes the rules into the page.
"""

from __future__ import annotations

import re

import yaml

from finetune_operator.process.metrics import Metrics
from tests.operator.builders import REPOSITORY

PAGE = REPOSITORY / "docs/observability.md"
RUNBOOK = REPOSITORY / "docs/runbook.md"
RULES = REPOSITORY / "charts/finetune-operator/files/alerts.yaml"
SHOWN = re.compile(r"<!-- generated: alerts -->\n.*?<!-- end -->", re.DOTALL)


def with_rules(page: str) -> str:
    """Return ``page`` with the alert rules of the chart between the markers."""
    rules = RULES.read_text(encoding="utf-8").strip()
    section = f"<!-- generated: alerts -->\n\n```yaml\n{rules}\n```\n\n<!-- end -->"
    return SHOWN.sub(lambda _: section, page)


def test_every_metric_is_explained_and_every_explained_metric_exists() -> None:
    explained = set(re.findall(r"`(finetune_\w+)(?:\{\w+\})?`", PAGE.read_text(encoding="utf-8")))
    rendered = Metrics().render().decode()
    served = set(re.findall(r"^# TYPE (finetune_\w+) \w+$", rendered, re.MULTILINE))
    # prometheus_client adds a `_created` series to every counter and histogram.
    assert explained == {name for name in served if not name.endswith("_created")}


def test_the_page_shows_the_alert_rules_of_the_chart() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- generated: alerts -->") == 1
    assert page == with_rules(page), "run: make docs"


def test_the_rules_use_only_metrics_that_the_operator_serves() -> None:
    used = set(re.findall(r"finetune_\w+", "".join(rule["expr"] for rule in _rules())))
    served = set(re.findall(r"^# TYPE (finetune_\w+) \w+$", Metrics().render().decode(), re.MULTILINE))
    assert used <= served


def test_the_runbook_says_what_to_do_about_every_alert() -> None:
    told = re.findall(r"^\*\*(FineTune\w+)\*\*:", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    assert told == [rule["alert"] for rule in _rules()]


def _rules() -> list[dict[str, str]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


if __name__ == "__main__":
    PAGE.write_text(with_rules(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
