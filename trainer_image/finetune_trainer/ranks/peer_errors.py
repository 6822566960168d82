"""Errors that concern several ranks: the errors with which torch reports a lost rank, and errors of one rank that are
raised on all ranks.

`ranks/gang.py` and `worker.py` use this module. An error travels between ranks as JSON through the rendezvous store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import (
    Diverged,
    NewerRun,
    OutOfMemory,
    OutsideFailure,
    PeerLost,
    StopAgreed,
    Stopped,
    first_line,
)
from finetune_trainer.ranks.device_errors import DeviceFault, diagnose

SHARED_ERRORS: Mapping[str, type[Exception]] = {
    kind.__name__: kind for kind in (OutsideFailure, NewerRun, Diverged, OutOfMemory, StopAgreed, Stopped)
}
"""Errors, by class name, that every rank raises as the same class when one rank raises them. UserError is raised on
every rank too, but is handled apart, because it consists of two texts."""
PEER_MARKS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe", "tcpstore")
"""A RuntimeError of torch whose message, in lower case, contains one of these texts says that another rank is gone."""


@contextlib.contextmanager
def convert_peer_failures() -> Iterator[None]:
    """Inside the block, raise PeerLost in place of what torch raises when another rank is gone."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if is_peer_failure(error):
            raise peer_lost(error) from error
        raise


def is_peer_failure(error: BaseException) -> bool:
    """Return whether torch raised ``error`` because another rank is gone.

    Where `device_errors.py` knows the text, the text decides. NCCL, for example, also reports a GPU without memory.
    Otherwise every DistError counts. For the gloo backend torch has no exception class for a lost rank, so there the
    message decides.
    """
    diagnosis = diagnose(str(error))
    if diagnosis.known:
        return diagnosis.fault is DeviceFault.PEER_LEFT
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(mark in text for mark in PEER_MARKS)


def peer_lost(error: BaseException) -> PeerLost:
    """Return the PeerLost to raise in place of torch's ``error``. The message has the line that names the cause, which
    NCCL writes last."""
    diagnosis = diagnose(str(error))
    return PeerLost(f"another rank left: {diagnosis.cause if diagnosis.known else torch_message(error)}")


def torch_message(error: BaseException) -> str:
    """Return the message of ``error`` without the C++ stack trace that torch appends, at most 200 characters."""
    return first_line(error, limit=200)


def describe_error(error: Exception) -> dict[str, Any]:
    """Return a JSON object that describes ``error``. From this object, `unpack_answer` makes the error that another
    rank raises."""
    return {"error": _error_name(error), "message": _error_parts(error)}


def unpack_answer(answer: Mapping[str, Any]) -> Any:
    """Return the value that another rank sent, or raise the error that the other rank described."""
    if "error" in answer:
        raise _shared_error(answer["error"], answer["message"])
    return answer["value"]


def _error_name(error: Exception) -> str:
    """Return the name of the most specific class of ``error`` that another rank can raise. If there is none, return the
    name of the error's own class."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return next((name for name in names if name == "UserError" or name in SHARED_ERRORS), names[0])


def _error_parts(error: Exception) -> list[str]:
    return [error.subject, error.problem] if isinstance(error, UserError) else [str(error)]


def _shared_error(name: str, parts: Sequence[str]) -> Exception:
    """Return the error that this rank must raise because another rank raised an error of the class ``name``. The error
    is PeerLost where the class is neither UserError nor in `SHARED_ERRORS`, for example `KeyError` after a programming
    error.
    """
    if name == "UserError":
        return UserError(*parts)
    if name == StopAgreed.__name__:
        return StopAgreed()
    if name in SHARED_ERRORS:
        return SHARED_ERRORS[name](*parts)
    return PeerLost(f"another rank failed: {name}: {parts[0]}")
