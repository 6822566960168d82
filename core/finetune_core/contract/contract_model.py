"""The base models and the version of everything that operator and trainer send each other.

A trainer refuses a run file of another version with exit code 64. An operator counts a report of another version as
malformed. No message contains a secret.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

CONTRACT_VERSION: Literal[1] = 1
RESULT_LIMIT_BYTES = 1024
"""Largest termination message in bytes, because the kubelet shares 12 KiB among all containers of a pod."""


class ContractModel(BaseModel):
    """Base of all messages: camelCase keys, immutable objects, and no unknown fields, NaN or infinity."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    def to_json(self) -> str:
        """Return the object as one line of JSON without absent fields."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class TerminationMessage(ContractModel):
    """A message that a container leaves in its termination log, from where the kubelet copies it into the pod's
    status."""

    @property
    def excess_bytes(self) -> int:
        """Number of bytes by which the JSON text exceeds the limit; at most 0 when the text fits."""
        return len(self.to_json().encode()) - RESULT_LIMIT_BYTES

    @classmethod
    def from_termination_message(cls, text: str) -> Self | None:
        """Parse a container's termination message. Return None for any other text, such as a traceback."""
        try:
            return cls.model_validate_json(text)
        except ValueError:
            return None
