"""A replacement for Kueue in tests. It makes the changes to PyTorchJobs that Kueue 0.19 makes. The operator sees
nothing of Kueue except these changes. With the real Kueue the tests would also need its CRDs, quotas and a queue.

A webhook sets `runPolicy.suspend` to true in each new PyTorchJob that has a queue label. Admission sets
`runPolicy.suspend` to false, and merges a `PodSetInfo` into every pod template. Eviction restores the pod templates and
suspends the PyTorchJob. Admission and eviction each update the whole object at once.
"""

from __future__ import annotations

import base64
import copy
import json
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from finetune_operator.reports.certificates import load_certificate, renew_if_due, server_context
from tests.cluster.cluster import Cluster
from tests.cluster.layout import HOST_ADDRESS
from tests.cluster.waiting import ClusterError, wait_for

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
FIELD_MANAGER = "kueue-admission"
CONFLICT = "Error from server (Conflict)"
"""What kubectl says where somebody else has changed an object since it was read."""

Manifest = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PodSetInfo:
    """What admission adds to a pod template: node selector and tolerations of the flavor (Kueue's name for a kind of
    nodes), and Kueue's own labels and annotations."""

    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Mapping[str, str]] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


class Kueue:
    """Replaces Kueue's controller. The methods of this class admit and evict the PyTorchJobs of one namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        """Manage the PyTorchJobs of ``namespace``."""
        self._cluster = cluster
        self._namespace = namespace
        self._originals: dict[str, Manifest] = {}

    def get(self, name: str) -> Manifest:
        """Return the PyTorchJob ``name`` as the API server stores it, including its managed fields."""
        found: Manifest = self._cluster.get("pytorchjob", name, "-n", self._namespace, "--show-managed-fields")
        return found

    def is_held(self, name: str) -> bool:
        """Return whether the PyTorchJob ``name`` exists and is suspended, so that it can be admitted."""
        items: list[Manifest] = self._cluster.get("pytorchjobs", "-n", self._namespace)["items"]
        return any(job["spec"]["runPolicy"]["suspend"] for job in items if job["metadata"]["name"] == name)

    def admit(self, name: str, info: PodSetInfo) -> Manifest:
        """Admit the PyTorchJob ``name``: merge ``info`` into its pod templates and set `suspend` to false. Return the
        job as stored."""

        def admitted(job: Manifest) -> None:
            # The pod templates are kept at the first try only. At a second try they may already be merged with `info`,
            # because a write that got no answer may have been carried out.
            self._originals.setdefault(name, copy.deepcopy(job["spec"]["pytorchReplicaSpecs"]))
            for replica in job["spec"]["pytorchReplicaSpecs"].values():
                _merge(replica["template"], info)
            job["spec"]["runPolicy"]["suspend"] = False

        return self._update(name, admitted)

    def evict(self, name: str) -> Manifest:
        """Evict the PyTorchJob ``name``: restore the pod templates from before its admission and set `suspend` to true.
        Return the job as stored."""
        originals = self._originals.pop(name)

        def evicted(job: Manifest) -> None:
            job["spec"]["pytorchReplicaSpecs"] = originals
            job["spec"]["runPolicy"]["suspend"] = True

        return self._update(name, evicted)

    def is_active(self, name: str) -> bool:
        """Return whether the PyTorchJob ``name`` has active pods according to its status. Kueue admits an evicted
        PyTorchJob again only when it has no active pods."""
        replicas = self.get(name).get("status", {}).get("replicaStatuses") or {}
        return any(status.get("active") for status in replicas.values())

    def _update(self, name: str, change: Callable[[Manifest], None]) -> Manifest:
        """Read the PyTorchJob ``name``, let ``change`` change the object, replace it, and return it as stored.

        training-operator may write the status between the reading and the replacing. The API server then refuses the
        old resourceVersion, and this method reads and changes the object anew, as Kueue does.
        """

        def replaced() -> Manifest | None:
            job = self.get(name)
            change(job)
            job.pop("status", None)
            job["metadata"].pop("managedFields", None)
            arguments = ("replace", "-f", "-", f"--field-manager={FIELD_MANAGER}", "--output=json")
            try:
                stored: Manifest = json.loads(self._cluster.kubectl(*arguments, stdin=json.dumps(job)))
            except ClusterError as error:
                if CONFLICT not in str(error):
                    raise
                return None
            return stored

        return wait_for(f"a write of the PyTorchJob {name} without a conflict", replaced, 60)


def _merge(template: Manifest, info: PodSetInfo) -> None:
    """Merge ``info`` into a pod template. Raise ValueError if the template already has a label, annotation or node
    selector key of ``info`` with another value."""
    metadata, spec = template.setdefault("metadata", {}), template["spec"]
    for place, name, added in (
        (metadata, "labels", info.labels),
        (metadata, "annotations", info.annotations),
        (spec, "nodeSelector", info.node_selector),
    ):
        known = place.setdefault(name, {})
        for key, value in added.items():
            if known.setdefault(key, value) != value:
                raise ValueError(f"conflict for {name} {key}: {known[key]} and {value}")
    tolerations = spec.setdefault("tolerations", [])
    tolerations += [dict(toleration) for toleration in info.tolerations if dict(toleration) not in tolerations]


@contextmanager
def suspending_webhook(cluster: Cluster, namespace: str) -> Iterator[None]:
    """Serve a mutating webhook like Kueue's during the block. It suspends the PyTorchJobs that are created in
    ``namespace`` with a queue label."""
    certificates = renew_if_due(None, hostname=HOST_ADDRESS, now=datetime.now(UTC))
    context = server_context()
    load_certificate(context, certificates.serving)
    with cluster.enter():
        server = _Server((HOST_ADDRESS, 0), _Handler, context)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    name = f"kueue-{namespace}"
    configuration = _configuration(name, namespace, server.server_port, certificates.ca_certificate)
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(configuration))
    try:
        yield
    finally:
        cluster.kubectl("delete", "mutatingwebhookconfiguration", name)
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], context: ssl.SSLContext):
        super().__init__(address, handler)
        self.socket = context.wrap_socket(self.socket, server_side=True)


class _Handler(BaseHTTPRequestHandler):
    """Answers the API server's AdmissionReview requests for new PyTorchJobs."""

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps(_answer(review)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing. The method of the base class would print every request to standard error."""


def _answer(review: Manifest) -> Manifest:
    request = review["request"]
    response: Manifest = {"uid": request["uid"], "allowed": True}
    if QUEUE_LABEL in request["object"]["metadata"].get("labels", {}):
        patch = [{"op": "add", "path": "/spec/runPolicy/suspend", "value": True}]
        response |= {"patchType": "JSONPatch", "patch": base64.b64encode(json.dumps(patch).encode()).decode()}
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}


def _configuration(name: str, namespace: str, port: int, ca: str) -> Manifest:
    rule = {
        "apiGroups": ["kubeflow.org"],
        "apiVersions": ["v1"],
        "operations": ["CREATE"],
        "resources": ["pytorchjobs"],
        "scope": "Namespaced",
    }
    webhook = {
        "name": "mpytorchjob.kb.io",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Fail",
        "clientConfig": {
            "url": f"https://{HOST_ADDRESS}:{port}/mutate",
            "caBundle": base64.b64encode(ca.encode()).decode(),
        },
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "rules": [rule],
    }
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": name},
        "webhooks": [webhook],
    }
