"""Wait until a condition holds, with a time limit. When the time is up, the error message names what was waited for,
and can contain evidence such as the end of a log."""

from __future__ import annotations

import errno
import http.client
import re
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from urllib3.exceptions import HTTPError

T = TypeVar("T")

LOG_TAIL_LINES = 25
TELLING_SECONDS = 5


class ClusterError(RuntimeError):
    """A part of the cluster failed. The message contains all that is known about the failure, for people."""


class UnreachableError(ClusterError):
    """A server did not answer: it refused the connection, broke the connection, or took too long. This says nothing
    about the state that a test looks for, so ``wait_for`` asks again."""


NO_ANSWER = re.compile(
    r"connection refused|connection reset by peer|broken pipe|no route to host|i/o timeout|TLS handshake timeout"
    r"|Client\.Timeout exceeded|context deadline exceeded|request canceled|unexpected EOF|: EOF$|GOAWAY"
    r"|client connection lost|[Tt]imeout: request did not complete|etcdserver: request timed out"
    r"|etcdserver: leader changed|apiserver not ready|the server is currently unable to handle the request"
    r"|error dialing backend|was refused - did you specify the right host or port",
    re.MULTILINE,
)
"""Matches what kubectl and helm print if the API server, or a server behind the API server, gave no answer. The words
are those of Go's net packages, of etcd's client and of apimachinery's `errors.NewTimeoutError` and
`errors.NewGenericServerResponse`."""

NOT_ANSWERED = (ConnectionError, TimeoutError, http.client.HTTPException, ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""Errors of Python's own clients for a connection that was refused, broken or too slow."""
NO_WAY = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ENETRESET})
"""Numbers of the errors for a server to which no packet gets, for example while a node is cut off. Python raises these
errors as plain OSError."""


def was_not_answered(error: BaseException) -> bool:
    """Return whether ``error`` says that a server did not answer.

    The errors of urllib, urllib3 and requests wrap the error of the socket. They are OSErrors or urllib3's HTTPErrors.
    For errors of these two kinds, the function therefore also checks the ``reason``, the cause and the context. For
    other errors it does not, because an assertion that fails in the handler of a broken connection is still a failed
    assertion. A response with an HTTP status code is an answer, no matter which code it is.
    """
    if isinstance(error, (UnreachableError, *NOT_ANSWERED)):
        return True
    if not isinstance(error, (OSError, HTTPError)):
        return False
    if isinstance(error, OSError) and error.errno in NO_WAY:
        return True
    inner = [getattr(error, "reason", None), error.__cause__, error.__context__]
    return any(isinstance(found, BaseException) and was_not_answered(found) for found in inner)


def wait_for(
    what: str,
    condition: Callable[[], T | None],
    timeout: float,
    *,
    evidence: Callable[[], str] | None = None,
    interval: float = 0.05,
) -> T:
    """Call ``condition`` again and again until its result is truthy, and return the result.

    ``what`` completes the sentence "waited N s for ..." of the error. If ``evidence`` is given, it is called when the
    time is up, and its result becomes part of the error's message. ``condition`` may raise ``ClusterError`` if further
    waiting is useless. If ``condition`` raises because a server did not answer (see ``was_not_answered``), the wait
    continues, because on a busy machine connections may be refused and requests may time out.

    Raises:
        ClusterError: ``condition`` had no truthy result within ``timeout`` seconds, or raised ClusterError itself.
    """
    deadline = time.monotonic() + timeout
    while True:
        value, unanswered = _ask(condition)
        if value:
            return value
        if time.monotonic() >= deadline:
            last = f"; the last question was not answered: {unanswered}" if unanswered else ""
            reason = f"\n{evidence()}" if evidence else ""
            raise ClusterError(f"waited {timeout:g} s for {what}{last}{reason}") from unanswered
        # This is only the pause between two calls of `condition`. The deadline above bounds the whole wait.
        time.sleep(interval)


def _ask(condition: Callable[[], T | None]) -> tuple[T | None, Exception | None]:
    """Return the condition's result and None. If the condition raises because a server did not answer, return None and
    this error. All other errors are raised."""
    try:
        return condition(), None
    except Exception as error:
        if not was_not_answered(error):
            raise
        return None, error


def wait_while_it_moves(
    what: str,
    condition: Callable[[], T | None],
    progress: Callable[[], object],
    quiet: float,
    *,
    tell: Callable[[str], None] | None = None,
    interval: float = 0.2,
) -> T:
    """Call ``condition`` again and again until its result is truthy, and return the result. Give up when ``progress``
    has returned the same value for ``quiet`` seconds.

    ``progress`` returns for example the number of files that are left. ``tell`` gets a line with the new value when the
    value has changed, but at most one line every five seconds.

    Raises:
        ClusterError: ``progress`` did not change for ``quiet`` seconds; the message holds its value.
    """
    value, changed, told = progress(), time.monotonic(), time.monotonic()
    while True:
        result = condition()
        if result:
            return result
        latest, now = progress(), time.monotonic()
        if latest != value:
            value, changed = latest, now
            if tell and now - told >= TELLING_SECONDS:
                tell(f"{what}: {value}")
                told = now
        if now - changed >= quiet:
            raise ClusterError(f"waited for {what}, and nothing moved for {quiet:g} s; the last progress: {value}")
        # This is only the pause between two calls of `condition`. The check of `quiet` above ends the wait.
        time.sleep(interval)


def tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """Return the path of a log file and its last lines, as text for an error message."""
    if not log.exists():
        return f"--- {log}: does not exist"
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 64 * 1024))
        text = file.read().decode(errors="replace")
    return "\n".join([f"--- the end of {log}", *text.splitlines()[-lines:]])
