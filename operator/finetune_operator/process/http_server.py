"""Base class of the operator's two HTTP servers: `process/health.py` (plain HTTP) and `reports/server.py` (HTTPS).

Every pod of the cluster can connect to both servers without a credential, so both serve within the limits of
`connections.py`.
"""

from __future__ import annotations

import logging
import ssl
from abc import ABC, abstractmethod
from http import HTTPStatus
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from finetune_operator.process.connections import ConnectionLimits, Listener
from finetune_operator.process.rate_limit import RateLimiter

LINE_BYTES: Final = 2048
"""Largest number of bytes of the first line of a request. The longest path to which a pod may send a report has fewer
than 300 bytes."""
HEADER_FIELD_BYTES: Final = 8190
"""Largest number of bytes of one header field, for example of Authorization, which holds the token. The tokens of
service accounts have one to three KiB."""
HEADER_FIELDS: Final = 32
READ_BYTES: Final = 16 * 1024
"""Half of the number of bytes that aiohttp reads of a body before the request's handler takes any of them."""
LINGER_SECONDS: Final = 2.0
"""Seconds for which the body of a refused request is read and dropped, so that the client can read the answer."""

STOP_SECONDS: Final = 5.0
"""Longest time in seconds that the server waits for running requests when it stops."""
_logger = logging.getLogger("aiohttp.server")
_logger.addFilter(lambda record: not _is_about_a_bad_request(record))


def _is_about_a_bad_request(record: logging.LogRecord) -> bool:
    """Return whether ``record`` only says that aiohttp could not parse a request, for example because it is not HTTP.

    aiohttp logs each such request with a traceback, so that any client could fill the log.
    """
    return record.exc_info is not None and isinstance(record.exc_info[1], HttpProcessingError)


class HttpServer(ABC):
    """Serves an aiohttp application on one port until `stop`."""

    limits: ConnectionLimits = ConnectionLimits()
    """How many connections, requests, bytes and seconds clients may take."""
    _runner: web.AppRunner | None = None
    _listener: Listener | None = None
    _requests: RateLimiter | None = None

    @abstractmethod
    def application(self) -> web.Application:
        """Return the web application that `start` serves, with its routes."""

    @property
    def port(self) -> int:
        """The port that clients connect to. The server must have been started."""
        assert self._listener is not None, "start() comes first"
        return self._listener.port

    @property
    def connections(self) -> int:
        """Number of open connections, including those whose handshake is not done."""
        return len(self._listener) if self._listener is not None else 0

    async def start(self, port: int, address: str = "", context: ssl.SSLContext | None = None) -> None:
        """Listen on ``port`` of the IP address ``address``, or of all addresses where ``address`` is empty.

        The server speaks HTTPS where ``context`` is given, else HTTP. Raises OSError where the port is taken.
        """
        application = self.application()
        application.middlewares.append(self._note_request)
        self._runner = web.AppRunner(
            application,
            handle_signals=False,
            access_log=None,
            logger=_logger,
            # aiohttp would decompress a body before the handler has authenticated its client, and the body could grow
            # without bound.
            auto_decompress=False,
            shutdown_timeout=STOP_SECONDS,
            keepalive_timeout=self.limits.idle_seconds,
            max_line_size=LINE_BYTES,
            max_field_size=HEADER_FIELD_BYTES,
            max_headers=HEADER_FIELDS,
            read_bufsize=READ_BYTES,
            lingering_time=LINGER_SECONDS,
        )
        await self._runner.setup()
        server = self._runner.server
        assert server is not None, "setup() makes it"
        self._requests = RateLimiter(self.limits.requests_per_second, 4 * self.limits.requests_per_second)
        self._listener = Listener(server, self.limits, context)
        self._listener.start(port, address)

    async def stop(self) -> None:
        """Stop the server; do nothing where it was never started."""
        if self._listener is not None:
            await self._listener.stop()
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _note_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note the beginning and the end of the request, for the deadlines of the request's connection.

        A request is answered with 429 where its client sends too many requests.
        """
        assert self._listener is not None, "start() comes first"
        connection = self._listener.by_transport.get(request.transport) if request.transport is not None else None
        if connection is None:
            return await handler(request)
        connection.request_started()
        assert self._requests is not None, "start() comes first"
        response: web.StreamResponse | web.HTTPException
        try:
            if self._requests.allows(connection.client):
                response = await handler(request)
            else:
                response = web.Response(status=HTTPStatus.TOO_MANY_REQUESTS, headers={"Retry-After": "5"})
                response.force_close()
        except web.HTTPException as answer:
            response = answer
        finally:
            connection.request_finished()
        if request.can_read_body and not request.content.at_eof():
            # What is left of the body would otherwise be taken for the header of the next request.
            response.force_close()
        if isinstance(response, web.HTTPException):
            raise response
        return response
