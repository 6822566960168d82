"""Judges attempts of two pods, for the tests of verdicts."""

from __future__ import annotations

from typing import Any

from finetune_core.api.run_policy import RunPolicySpec
from finetune_operator.decide.evidence import Evidence
from finetune_operator.decide.rules import judge
from finetune_operator.decide.verdict import Ruling
from tests.operator.builders import CHILD_UID, NOW, child, current


def ruled(pods: list[Any], **changes: Any) -> tuple[str, str] | None:
    """Judge an attempt of two pods, and return its verdict and reason, or None if no rule ends the attempt."""
    ruling = judged(pods, **changes)
    return (str(ruling.verdict), ruling.reason) if ruling else None


def judged(pods: list[Any], **changes: Any) -> Ruling | None:
    """Judge an attempt of two pods, and return the ruling, or None if no rule ends the attempt."""
    return judge(evidence_of(pods, **changes))


def evidence_of(pods: list[Any], **changes: Any) -> Evidence:
    """Return the evidence of an attempt of two pods. ``changes`` replaces fields of the evidence."""
    values: dict[str, Any] = {
        "current": current(),
        "child": child(),
        "child_uid": CHILD_UID,
        "pods": pods,
        "nodes": 2,
        "final_result": None,
        "policy": RunPolicySpec(),
        "now": NOW,
    }
    return Evidence(**(values | changes))
