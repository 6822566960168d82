"""A small client for the cluster's own HTTP interfaces, used to bring it up. Every call comes from a thread inside
the network namespace."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from typing import Any

from tests.cluster.layout import API_URL
from tests.cluster.pki import Pair
from tests.cluster.waiting import ClusterError

CALL_TIMEOUT_SECONDS = 10
FIELD_MANAGER = "test-cluster"

Object = dict[str, Any]

# Nothing here goes through a proxy that the environment may name for the world outside.
_HANDLERS = [urllib.request.ProxyHandler({})]


def answers(url: str, context: ssl.SSLContext | None = None) -> bool:
    """Tell whether a GET of ``url`` gives a 2xx answer just now."""
    try:
        with _opener(context).open(url, timeout=CALL_TIMEOUT_SECONDS):
            return True
    except (OSError, http.client.HTTPException):
        return False


class Api:
    """The Kubernetes API as the cluster's administrator."""

    def __init__(self, authority: Pair, administrator: Pair) -> None:
        self._context = ssl.create_default_context(cafile=str(authority.certificate))
        self._context.load_cert_chain(administrator.certificate, administrator.key)

    def ready(self) -> bool:
        return answers(f"{API_URL}/readyz", self._context)

    def get(self, path: str) -> Object | None:
        """Return an object, or None where there is none."""
        try:
            return self._call("GET", path)
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.NOT_FOUND:
                return None
            raise

    def apply(self, path: str, manifest: Object | str) -> Object:
        """Server-side apply of one object, given as a mapping or as YAML, to the path that names it."""
        body = manifest if isinstance(manifest, str) else json.dumps(manifest)
        try:
            return self._call("PATCH", f"{path}?fieldManager={FIELD_MANAGER}&force=true", body)
        except urllib.error.HTTPError as error:
            raise ClusterError(f"applying {path}: {error.code} {error.read().decode(errors='replace')}") from error

    def _call(self, method: str, path: str, body: str | None = None) -> Object:
        data = body.encode() if body is not None else None
        request = urllib.request.Request(f"{API_URL}{path}", method=method, data=data)  # noqa: S310 - always https
        if data is not None:
            request.add_header("Content-Type", "application/apply-patch+yaml")
        with _opener(self._context).open(request, timeout=CALL_TIMEOUT_SECONDS) as response:
            answer: Object = json.load(response)
            return answer


def _opener(context: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(*_HANDLERS, urllib.request.HTTPSHandler(context=context))
