"""Pairs the answers of the base model with those of the tuned model to the same rows, for the page. Pure.

The trainer stores some answers of each model, and not those to all rows. `compared_run.py` calls `pairs_of`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_cli.compare.stored_files import StoredAnswer

MOST_ANSWERS = 12
"""Largest number of rows of a run that the page shows."""
MOST_COLUMNS = 12
TEXT_LENGTH = 600
"""A value of a row or an answer is cut off after this many characters."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer as the page shows it."""

    text: str
    scores: Mapping[str, float]
    """Value of each score of the task. Empty where the answer could not be graded."""
    problem: str


@dataclass(frozen=True, slots=True)
class AnsweredRow:
    """A row of the evaluation set with the answers of both models."""

    columns: tuple[tuple[str, str], ...]
    """The columns of the row, with the reference answer, as texts."""
    base: Answer | None
    tuned: Answer | None


def pairs_of(base: Sequence[StoredAnswer], tuned: Sequence[StoredAnswer]) -> tuple[AnsweredRow, ...]:
    """Return up to `MOST_ANSWERS` rows in the order in which the tuned model answered them, or else the base model.
    Rows that both models answered come first. A row that occurs several times gets one answer of each model at each
    occurrence."""
    waiting: dict[str, list[StoredAnswer]] = {}
    for answer in base:
        waiting.setdefault(_identity(answer), []).append(answer)
    paired, alone = [], []
    for answer in tuned:
        same = waiting.get(_identity(answer))
        if same:
            paired.append(AnsweredRow(_columns(answer.gold), _shown(same.pop(0)), _shown(answer)))
        else:
            alone.append(AnsweredRow(_columns(answer.gold), None, _shown(answer)))
    alone += [AnsweredRow(_columns(item.gold), _shown(item), None) for items in waiting.values() for item in items]
    return tuple([*paired, *alone][:MOST_ANSWERS])


def _identity(answer: StoredAnswer) -> str:
    return json.dumps(answer.gold, sort_keys=True)


def _columns(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    found = ((name, value if isinstance(value, str) else json.dumps(value)) for name, value in row.items())
    return tuple((_cut(name), _cut(text)) for name, text in found)[:MOST_COLUMNS]


def _shown(answer: StoredAnswer) -> Answer:
    scores = {name: float(value) for name, value in answer.scores.items() if value is not None}
    return Answer(_cut(answer.answer), scores, _cut(answer.problem))


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]}…"
