"""JSON logs on standard output: one line a record, with job, uid and attempt where a record speaks of a job."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime

JOB_FIELDS = ("job", "uid", "attempt")
"""Names that `extra=` may carry; they become fields of the line."""
_subject: ContextVar[Mapping[str, object]] = ContextVar("subject", default={})  # noqa: B039  (never changed in place)


def set_log_fields(**fields: object) -> None:
    """Give every further line of the running task these job fields, also lines of libraries; none ends it."""
    _subject.set(fields)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of ``record``."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _subject.get()
        line |= {field: getattr(record, field) for field in JOB_FIELDS if hasattr(record, field)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(level: str) -> None:
    """Send every record from ``level`` on to standard output, replacing earlier handlers."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # The election's library writes a traceback for every call that fails; `leadership` says what matters once.
    logging.getLogger("kubernetes.aio.leaderelection").setLevel(logging.CRITICAL)
    # Every request of the report server and every watch line would drown what a person looks for.
    for noisy in ("aiohttp.access", "kopf.objects", "kopf._core", "kopf._cogs"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
