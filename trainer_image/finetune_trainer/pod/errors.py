"""The exceptions that end a run early. The message of an exception is the sentence that users see in the job's status.

Every package of the trainer may raise these exceptions. `pod/outcomes.py` turns all of them but StopAgreed into
outcomes (values of `finetune_core.contract.Outcome`). Errors that a user can correct in the job or its data are raised
as `finetune_core.errors.UserError` instead (exit code 64).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from finetune_core.errors import UserError, valid_text


class OutsideFailure(Exception):  # noqa: N818  (named after the outcome, not after Python's errors)
    """Something outside of the spec and the data fails or is missing, for example the object store, the network or
    credentials (exit code 75)."""


class NodeFault(OutsideFailure):
    """A GPU or the driver of this rank's node is broken, so that the next attempt should avoid the node (exit code
    75)."""


class PeerLost(OutsideFailure):
    """Another rank exited or stopped answering (exit code 75). The loss of a rank is only the consequence of an error
    elsewhere, so this error counts only if no worker of the pod reports a cause of its own."""


class Diverged(Exception):  # noqa: N818
    """The stability monitor raised an alarm about the loss or the gradient, and the run ends because of it (exit code
    65)."""


class OutOfMemory(Exception):  # noqa: N818
    """The device or the pod has no memory left (exit code 66)."""


class Stopped(Exception):  # noqa: N818
    """This process or another rank was asked to stop with SIGTERM (exit code 143). All steps that were finished are in
    a committed checkpoint."""


class StopAgreed(Exception):  # noqa: N818
    """All ranks stop training together, because a rank received SIGTERM, or because the upload of a checkpoint failed
    on a rank. The code that catches this error saves what is not saved yet, and raises `Stopped`. After a failed upload
    it raises the error of the upload instead."""


class NewerRun(OutsideFailure):
    """A later run of the same job has taken a higher run number, so this run must not write to the bucket any more
    (exit code 75)."""


class Damaged(OutsideFailure):
    """A folder in the bucket does not hold what was written to it, or its content can't be read (exit code 75). The
    message says what is damaged."""


@contextmanager
def library_boundary(failure: Callable[[BaseException], Exception], *known: type[Exception]) -> Iterator[None]:
    """Turn any exception that another library raises in the `with` block into the exception that ``failure`` returns.
    Put only calls of the library into the block, because this function would also convert an error of the trainer
    itself.

    MemoryError, UserError, OutsideFailure and the exceptions ``known`` pass as they are. Exceptions that end a thread
    or a process, such as KeyboardInterrupt, pass too. A panic of a library that is written in Rust, such as tokenizers,
    is turned although `except Exception` does not catch a panic.
    """
    passing: tuple[type[BaseException], ...] = (MemoryError, UserError, OutsideFailure, *known)
    try:
        yield
    except passing:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or _is_panic(error):
            raise failure(error) from error
        raise


def _is_panic(error: BaseException) -> bool:
    """Return whether ``error`` is a panic of Rust code. Each library has its own class for panics, which can't be
    imported."""
    return type(error).__module__ == "pyo3_runtime" and type(error).__name__ == "PanicException"


def first_line(error: BaseException, *, limit: int = 300) -> str:
    """Return the first line of another library's error message. A line of more than ``limit`` characters is cut off
    between two words and ends with an ellipsis. The line becomes part of a sentence for the user. If the line ends with
    a colon, the next line is added, which says what is wrong."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    if len(text) > limit:
        text = text[: limit - 1]
        text = (text.rsplit(None, 1)[0] if " " in text else text) + "…"
    return valid_text(text)


def reason_of(error: OSError) -> str:
    """Return the reason of an error of a file system as a phrase, such as "No space left on device"."""
    return error.strerror or os.strerror(error.errno or 0)


def one_line(text: str, *, limit: int = 1000) -> str:
    """Return ``text``, parts of which another program may have written, as one line of valid text for a message. Each
    run of white space and control characters becomes one space, and the line is cut off after ``limit`` characters."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in valid_text(text)).split())[:limit]
