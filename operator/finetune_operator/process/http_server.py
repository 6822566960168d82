"""Base class of the operator's two HTTP servers: `process/health.py` (plain HTTP) and `reports/server.py` (HTTPS)."""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod

from aiohttp import web


class HttpServer(ABC):
    """Serves an aiohttp application on one port until `stop`."""

    _runner: web.AppRunner | None = None

    @abstractmethod
    def application(self) -> web.Application:
        """Return the web application with its routes."""

    async def start(self, port: int, address: str = "", context: ssl.SSLContext | None = None) -> None:
        """Listen on ``port`` of the IP address ``address``, or of all addresses where ``address`` is empty.

        The server speaks HTTPS where ``context`` is given, else HTTP.
        """
        self._runner = web.AppRunner(self.application(), handle_signals=False, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, address or None, port, ssl_context=context).start()

    async def stop(self) -> None:
        """Stop the server; do nothing where it was never started."""
        if self._runner is not None:
            await self._runner.cleanup()
