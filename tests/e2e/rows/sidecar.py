"""A mutating webhook that adds a sidecar container to every pod of a labelled namespace, as a service mesh does. The
sidecar never ends by itself. A thread of the tests serves the webhook inside the cluster's network namespace."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.cluster import Cluster
from tests.cluster.layout import HOST_ADDRESS
from tests.cluster.oci import BUSYBOX_IMAGE
from tests.cluster.pki import Authority

PORT = 9543
LABEL = "tests.finetune.dev/sidecar"
"""Label key of the namespaces whose pods get the sidecar. The label's value must be ``"inject"``."""
NAME = "sidecar-injector.tests.finetune.dev"
SIDECAR = {
    "name": "mesh",
    "image": BUSYBOX_IMAGE,
    "command": ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1; done"],
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    },
}
PATCH = [{"op": "add", "path": "/spec/containers/-", "value": SIDECAR}]


class _Injector(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        patch = base64.b64encode(json.dumps(PATCH).encode()).decode()
        answer = {"uid": review["request"]["uid"], "allowed": True, "patchType": "JSONPatch", "patch": patch}
        body = json.dumps({"apiVersion": review["apiVersion"], "kind": review["kind"], "response": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the signature of http.server)
        """Log nothing. The method of the base class would print every request to standard error."""


@contextmanager
def injecting(cluster: Cluster, folder: Path) -> Iterator[None]:
    """Serve the webhook during the block. ``folder`` receives the webhook's certificate and key."""
    authority = Authority(folder)
    serving = authority.issue("injector", "injector", hosts=[HOST_ADDRESS])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(serving.certificate, serving.key)
    with cluster.enter():
        server = ThreadingHTTPServer((HOST_ADDRESS, PORT), _Injector)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        # The thread is started inside the cluster's network namespace, so that the threads that it starts for requests
        # are inside too.
        threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(_configuration(authority.pair.certificate)))
    try:
        yield
    finally:
        cluster.kubectl("delete", "mutatingwebhookconfiguration", NAME)
        server.shutdown()
        server.server_close()


def _configuration(authority: Path) -> dict[str, Any]:
    bundle = base64.b64encode(authority.read_bytes()).decode()
    webhook = {
        "name": NAME,
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Fail",
        "clientConfig": {"url": f"https://{HOST_ADDRESS}:{PORT}/", "caBundle": bundle},
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
        "namespaceSelector": {"matchLabels": {LABEL: "inject"}},
    }
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": NAME},
        "webhooks": [webhook],
    }
