"""Errors that ranks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import Diverged, NewerRun, OutOfMemory, OutsideFailure, PeerLost, StopAgreed, Stopped

SHARED_ERRORS: Mapping[str, type[Exception]] = {
    kind.__name__: kind for kind in (OutsideFailure, NewerRun, Diverged, OutOfMemory, StopAgreed, Stopped)
}


class peers:  # noqa: N801  (reads as a block: `with peers():`)
    """Turns what torch raises when another rank is gone into PeerLost."""

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        """Raise PeerLost in place of a failed collective."""
        if isinstance(error, RuntimeError | dist.DistError) and is_peer_failure(error):
            raise PeerLost(f"another rank left: {first_line(error)}") from error


PEER_MARKS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe", "tcpstore")


def is_peer_failure(error: BaseException) -> bool:
    """Return whether torch reports a lost rank: it has no class of its own for gloo, only a text."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(mark in text for mark in PEER_MARKS)


def first_line(error: BaseException) -> str:
    """Return the first line of an error, shortened: what a person needs of a C++ error."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def describe_error(error: Exception) -> dict[str, Any]:
    """Return an error as JSON, so that other ranks can raise it too."""
    return {"error": _error_name(error), "message": _error_parts(error)}


def _error_name(error: Exception) -> str:
    """Return the name of the nearest class that can be raised again on another rank."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return next((name for name in names if name == "UserError" or name in SHARED_ERRORS), names[0])


def _error_parts(error: Exception) -> list[str]:
    return [error.subject, error.problem] if isinstance(error, UserError) else [str(error)]


def unpack_answer(answer: Mapping[str, Any]) -> Any:
    """Return the value that rank 0 made, or raise what it raised."""
    if "error" in answer:
        raise _shared_error(answer["error"], answer["message"])
    return answer["value"]


def _shared_error(name: str, parts: Sequence[str]) -> Exception:
    """Return the error that another rank had; a crash there is a lost peer here."""
    if name == "UserError":
        return UserError(*parts)
    if name == StopAgreed.__name__:
        return StopAgreed()
    if name in SHARED_ERRORS:
        return SHARED_ERRORS[name](*parts)
    return PeerLost(f"another rank failed: {name}: {parts[0]}")
