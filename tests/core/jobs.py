"""FineTuneJobs for tests, as parsed YAML: `examples/quickstart.yaml` with a uid, and with at most one field of the spec
changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def quickstart(path: str = "", value: Any = None) -> dict[str, Any]:
    """Return `examples/quickstart.yaml` with the uid `1234` and with the field ``path`` (below `spec`, with dots) set
    to ``value``. The value None removes the field. Without ``path`` the spec stays as it is."""
    document: dict[str, Any] = yaml.safe_load((EXAMPLES / "quickstart.yaml").read_text(encoding="utf-8"))
    document["metadata"] |= {"uid": "1234"}
    if path:
        set_at(document["spec"], path.split("."), value)
    return document


def set_at(node: dict[str, Any], path: list[str], value: Any) -> None:
    """Set the field at ``path`` below ``node`` to ``value``, and create missing sections. None removes the field."""
    for part in path[:-1]:
        node = node.setdefault(part, {})
    if value is None:
        node.pop(path[-1], None)
    else:
        node[path[-1]] = value
