"""Runs the operator's report server over TLS on this machine, and sends it requests, also requests that no normal
client sends."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import cache

from kubernetes.aio import client as kubernetes_client

from finetune_operator.process.connections import ConnectionLimits
from finetune_operator.reports.certificates import CertificateSet, load_certificate, renew_if_due, server_context
from finetune_operator.reports.server import ReportServer

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@cache
def certificates() -> CertificateSet:
    """Return certificates for 127.0.0.1, which all tests of a process share."""
    return renew_if_due(None, hostname="127.0.0.1", now=datetime.now(UTC))


def api_configuration(host: str) -> kubernetes_client.Configuration:
    """Return what `KubeClient` needs for an API server at the address ``host``, such as `http://127.0.0.1:8001`.

    The configuration contains one certificate authority, as in a pod. Without it, the client would read all certificate
    authorities of the machine, even for a server without TLS. Reading them takes longer than most tests.
    """
    configuration = kubernetes_client.Configuration(host=host)
    configuration.ca_cert_data = certificates().ca_certificate
    return configuration


@cache
def client_context() -> ssl.SSLContext:
    """Return a TLS context for clients that trust any server, because a hostile client does not check certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@asynccontextmanager
async def serving(server: ReportServer, limits: ConnectionLimits | None = None) -> AsyncIterator[int]:
    """Run ``server`` on a free port of 127.0.0.1 and yield the port. ``limits`` replace those of the server."""
    server.limits = limits or server.limits
    context = server_context()
    load_certificate(context, certificates().serving)
    await server.start(0, "127.0.0.1", context)
    try:
        yield server.port
    finally:
        await server.stop()


async def connect(port: int, source: str = "127.0.0.1") -> Streams:
    """Open a TLS connection from the address ``source``; every address of 127.0.0.0/8 is this machine."""
    return await asyncio.open_connection("127.0.0.1", port, ssl=client_context(), local_addr=(source, 0))


def request(path: str | bytes, token: str | None = None, body: str = "", *more: str) -> bytes:
    """Return the bytes of a POST request with ``path`` unchanged. HTTP clients would quote or resolve parts of the
    path. ``more`` are additional lines of the header, such as ``"Connection: close"``."""
    target = path.encode() if isinstance(path, str) else path
    fields = ["Host: operator", f"Content-Length: {len(body.encode())}", *more]
    if token is not None:
        fields.append(f"Authorization: Bearer {token}")
    return b"POST " + target + b" HTTP/1.1\r\n" + "\r\n".join(fields).encode() + b"\r\n\r\n" + body.encode()


async def exchange(streams: Streams, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes, and return status, header fields and body of the answer. The status is 0 if the server ends the
    connection without an answer."""
    reader, writer = streams
    try:
        writer.write(sent)
        await writer.drain()
        line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0, {}, b""
    fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(line.split()[1]), fields, await reader.readexactly(int(fields.get("content-length", 0)))


async def answer_to(port: int, sent: bytes, source: str = "127.0.0.1") -> tuple[int, dict[str, str], bytes]:
    """Open a connection, send bytes, return the answer as `exchange` does, and close the connection."""
    streams = await connect(port, source)
    try:
        return await exchange(streams, sent)
    finally:
        streams[1].transport.abort()


async def ended(streams: Streams) -> bool:
    """Wait until the server ends the connection or sends a byte of data; return whether it ended the connection."""
    try:
        return await streams[0].read(1) == b""
    except ConnectionError:
        return True
