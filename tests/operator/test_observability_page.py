"""docs/observability.md explains every Prometheus metric that the operator serves, and no other metric."""

from __future__ import annotations

import re
from pathlib import Path

from finetune_operator.process.metrics import Metrics

PAGE = Path(__file__).resolve().parents[2] / "docs" / "observability.md"


def test_every_metric_is_explained_and_every_explained_metric_exists() -> None:
    explained = set(re.findall(r"`(finetune_\w+)(?:\{\w+\})?`", PAGE.read_text(encoding="utf-8")))
    rendered = Metrics().render().decode()
    served = set(re.findall(r"^# TYPE (finetune_\w+) \w+$", rendered, re.MULTILINE))
    # prometheus_client adds a `_created` series to every counter and histogram.
    assert explained == {name for name in served if not name.endswith("_created")}
