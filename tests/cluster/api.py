"""`Api`, a small client for the API server, and `answers`, which checks whether an HTTP server answers. They are used
above all while a cluster, its second node or a registry starts.

Callers run in a thread inside the network namespace of the server (see `Namespaces.network`).
"""

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

# The empty ProxyHandler makes urllib ignore the proxies that environment variables name. No proxy could reach an
# address inside the cluster.
_HANDLERS = [urllib.request.ProxyHandler({})]


def answers(url: str, context: ssl.SSLContext | None = None) -> bool:
    """Send a GET to ``url`` and return whether the status code of the answer is 2xx. If no answer comes, return
    False."""
    try:
        with _opener(context).open(url, timeout=CALL_TIMEOUT_SECONDS):
            return True
    except (OSError, http.client.HTTPException):
        return False


class Api:
    """A client of the Kubernetes API that authenticates with the administrator's certificate."""

    def __init__(self, authority: Pair, administrator: Pair) -> None:
        self._context = ssl.create_default_context(cafile=str(authority.certificate))
        self._context.load_cert_chain(administrator.certificate, administrator.key)

    def ready(self) -> bool:
        return answers(f"{API_URL}/readyz", self._context)

    def get(self, path: str) -> Object | None:
        """Return the object at ``path``, such as ``/api/v1/namespaces/default``, or None if the API server answers
        404."""
        try:
            return self._call("GET", path)
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.NOT_FOUND:
                return None
            raise

    def apply(self, path: str, manifest: Object | str) -> Object:
        """Create or change one object by server-side apply, and return the object as stored.

        ``path`` is the URL path of the object. ``manifest`` is a mapping or YAML text.
        """
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
