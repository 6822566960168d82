"""The base classes of all messages between operator and trainer, and the version number of these messages.

Each message contains the version number. A trainer ends with exit code 64 where the version of the run file is not its
own version. The operator treats a report with another version as malformed. No message contains a secret.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

CONTRACT_VERSION: Literal[1] = 1
RESULT_LIMIT_BYTES = 1024
"""Largest number of bytes of a termination message. The limit is small because the kubelet shares 12 KiB among all
containers of a pod."""

LARGEST_NUMBER: Final = 10**15
"""Largest count of steps, bytes or seconds in a message. The bound exists because a pod can send any number. If the
operator wrote a number into the status that the API server can't store, the API server would refuse the whole
status."""
Count = Annotated[int, Field(ge=0, le=LARGEST_NUMBER)]
PositiveCount = Annotated[int, Field(ge=1, le=LARGEST_NUMBER)]
_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)


def _within_range(time: datetime) -> datetime:
    if not _EARLIEST <= time <= _LATEST:
        raise ValueError("must be a time between the years 1970 and 9000")
    return time


Time = Annotated[AwareDatetime, AfterValidator(_within_range)]
"""A time with a time zone, because the API server accepts no time without one. The time is between the years 1970 and
9000, so that it stays within the limits of datetime when it is converted to another time zone or a duration is
added."""


class ContractModel(BaseModel):
    """The base class of all messages: keys are camelCase and objects are immutable. Unknown fields, NaN and infinity
    are refused."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    def to_json(self) -> str:
        """Return the object as one line of JSON, without the fields that are None."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class TerminationMessage(ContractModel):
    """A message that a container writes into its termination log. The kubelet copies the message into the pod's
    status."""

    @property
    def excess_bytes(self) -> int:
        """Number of bytes by which the JSON text is longer than `RESULT_LIMIT_BYTES`. 0 or negative where the text
        fits."""
        return len(self.to_json().encode()) - RESULT_LIMIT_BYTES

    @classmethod
    def from_termination_message(cls, text: str) -> Self | None:
        """Return the message in ``text``, a container's termination message. Return None where ``text`` is something
        else, such as a traceback."""
        try:
            return cls.model_validate_json(text)
        except ValueError:
            return None
