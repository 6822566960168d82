"""JSON logs on standard output: one line for each record. A line about a job has the field job and, where they are
known, the fields uid and attempt.

`__main__.py` configures the logs. `controller.py`, `reconcile.py` and `reports/server.py` set the fields of all further
lines with `set_log_fields`. A logging call may also pass the fields in `extra=`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime

JOB_FIELDS = ("job", "uid", "attempt")
"""Names of the fields that a logging call may pass in `extra=` and that are written into the JSON line."""
_fields: ContextVar[Mapping[str, object]] = ContextVar("fields", default={})  # noqa: B039  (never changed in place)


def set_log_fields(**fields: object) -> None:
    """Add ``fields`` to every further log line of the running asyncio task, also to lines that libraries log.

    The fields of an earlier call are removed, so that a call without fields leaves none.
    """
    _fields.set(fields)


class JsonFormatter(logging.Formatter):
    """Formats a log record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON line of ``record``."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _fields.get()
        line |= {field: getattr(record, field) for field in JOB_FIELDS if hasattr(record, field)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(level: str) -> None:
    """Log records of at least ``level`` (for example ``"info"``), but fewer records of some libraries, to standard
    output and to nowhere else."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # The client library's election is silenced, because it logs a traceback for every failed call.
    # `leader_election.py` logs each cause once instead.
    logging.getLogger("kubernetes.aio.leaderelection").setLevel(logging.CRITICAL)
    # Of these loggers nothing below a warning is logged, because a line for each HTTP request and each watch event
    # would hide the lines that a person looks for.
    for noisy in ("aiohttp.access", "kopf.objects", "kopf._core", "kopf._cogs"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
