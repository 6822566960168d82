"""What everything that crosses the wire between operator and trainer is made of: one base model, one version.

A trainer refuses a run file of another version with exit code 64, an operator counts a report of another version as
malformed. Nothing here holds a secret.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

CONTRACT_VERSION: Literal[1] = 1
RESULT_LIMIT_BYTES = 1024
"""SHORT"""


class ContractModel(BaseModel):
    """Base of everything that crosses the wire: camelCase, immutable, unknown fields refused, NaN refused."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    def to_json(self) -> str:
        """Return the object as one line of JSON, absent instead of null."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class TerminationMessage(ContractModel):
    """SHORT"""

    @property
    def excess_bytes(self) -> int:
        """SHORT"""
        return len(self.to_json().encode()) - RESULT_LIMIT_BYTES

    @classmethod
    def from_termination_message(cls, text: str) -> Self | None:
        """SHORT"""
        try:
            return cls.model_validate_json(text)
        except ValueError:
            return None
