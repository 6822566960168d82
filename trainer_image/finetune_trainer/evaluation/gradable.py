"""Finds out whether answers to the rows of an evaluation set can be graded at all. The preflight check does this for
the first rows. The trainer does this before its first step, for the rows to which answers are generated.

The module does not import torch, because the preflight pod has none.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from finetune_core.api.evaluation import LOWER_IS_BETTER
from finetune_core.contract import EvaluationConfig
from finetune_trainer.evaluation.graders import Grading

T = TypeVar("T")

TRIED_SECONDS = 60.0
"""Time in seconds after which no further row is tried. If no row that was tried until then can be graded, the remaining
rows count as rows that can't be graded either."""


def needed_by(config: EvaluationConfig, field: str, scored: str) -> str:
    """Return the field of the spec that needs graded answers to the rows of ``field``. Empty if no field needs them.

    ``field`` is the path of the rows in the spec, such as `dataset.validation`. ``scored`` is the path of the rows on
    which base model and tuned model are scored.
    """
    if config.best_by == "TaskScore" and field == "dataset.validation":
        return "evaluation.bestBy"
    required = any(requirement.score not in LOWER_IS_BETTER for requirement in config.require or ())
    return "evaluation.require" if required and field == scored else ""


def asked_rows(config: EvaluationConfig, rows: Sequence[T]) -> Sequence[T]:
    """Return those of ``rows`` to which answers are generated: the first `evaluation.generation.maxExamples`."""
    return rows[: config.generation.max_examples]


def why_ungradable(
    grading: Grading,
    rows: Sequence[Mapping[str, object]],
    *,
    seconds: float = TRIED_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Return why no answer to ``rows`` can be graded, with the number of rows that were tried. Empty if an answer to
    one of the tried rows can be graded, or if there are no rows. After ``seconds`` no further row is tried."""
    reasons: Counter[str] = Counter()
    deadline = clock() + seconds
    for row in rows:
        problem = grading.why_left_out(row)
        if not problem:
            return ""
        reasons[problem] += 1
        if clock() > deadline:
            break
    tried = sum(reasons.values())
    if not tried:
        return ""
    reason, count = reasons.most_common(1)[0]
    which = "the only row" if tried == 1 else f"none of {tried} rows"
    can = "can't be graded" if tried == 1 else "can be graded"
    return f"{which} {can} ({count} because {reason})"
