"""The first examples of a job as text and tokens, which `finetune run --dry-run` shows.

The check before the first attempt writes them into a file where it is asked to, because it has made the examples by the
code of the training anyway.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from finetune_core.contract.contract_model import ContractModel


class TokenUse(StrEnum):
    """What the training does with a token."""

    READ = "Read"
    """The token is only read: no loss is computed for it."""
    LEARNED = "Learned"
    CUT_OFF = "CutOff"
    """The token is left out, because the example is too long."""


class TextPiece(ContractModel):
    """Tokens of an example that follow each other and are used in the same way."""

    use: TokenUse
    text: str
    ids: list[int]
    tokens: list[str]
    """The entries of the tokenizer's vocabulary, one for each item of ``ids``."""


class ShownExample(ContractModel):
    """One example, or a row that is left out."""

    place: str
    """The place of the row, for example `rows.jsonl line 3`."""
    pieces: list[TextPiece]
    """The tokens in their order. Empty for a row that is left out."""
    left_out: str = ""
    """Why the row is left out; empty for an example."""


class FirstExamples(ContractModel):
    """The first examples of the training rows, and what the plan needs to know of the base model."""

    examples: list[ShownExample]
    model_config_file: dict[str, Any]
    """Content of the base model's `config.json`."""
