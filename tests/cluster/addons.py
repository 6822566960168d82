"""The programs that run beside Kubernetes in the test cluster: CoreDNS, MinIO, the image registry and Kubeflow's
training-operator.

For each program, except the registry, a function returns the command line. `apply_objects` creates the API objects of
all four. `cluster.py` calls the functions while a cluster starts.
"""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

from tests.cluster import tools
from tests.cluster.api import Api, Object
from tests.cluster.credentials import Credentials
from tests.cluster.layout import (
    CLUSTER_DOMAIN,
    DNS_ADDRESS,
    DNS_READY_PORT,
    HOST_ADDRESS,
    MINIO_PORT,
    REGISTRY_PORT,
    TRAINING_OPERATOR_METRICS_PORT,
    TRAINING_OPERATOR_PROBE_PORT,
    WEBHOOK_PORT,
    Layout,
)

KUBEFLOW_NAMESPACE = "kubeflow"
WEBHOOK_SECRET = "training-operator-webhook-cert"
WEBHOOK = "validator.training-operator.kubeflow.org"
PYTORCHJOB_CRD = "pytorchjobs.kubeflow.org"
CRD_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def coredns(layout: Layout, credentials: Credentials) -> list[str]:
    corefile = layout.config / "Corefile"
    # The Corefile does not use the plugin `cache`. If CoreDNS cached the answer "no such name", a name that is created
    # shortly afterwards would seem to be missing.
    corefile.write_text(f""".:53 {{
    bind {DNS_ADDRESS}
    errors
    ready 127.0.0.1:{DNS_READY_PORT}
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa ip6.arpa {{
        kubeconfig {credentials.kubeconfigs["coredns"]}
        pods insecure
        ttl 5
    }}
}}
""")
    return [str(tools.COREDNS.path()), "-conf", str(corefile)]


def minio(layout: Layout) -> list[str]:
    return [str(tools.MINIO.path()), "server", str(layout.state / "minio"), f"--address={HOST_ADDRESS}:{MINIO_PORT}"]


def training_operator(layout: Layout, credentials: Credentials) -> list[str]:
    """Copy the training-operator's files into a folder, and return the command that runs it with this folder as /tmp.

    The program reads its certificate from a fixed folder below /tmp. The machine's /tmp can't be used for this, because
    the training-operator of another test cluster may need the same folder at the same time.
    """
    own = layout.state / "training-operator"
    serving = own / "k8s-webhook-server" / "serving-certs"
    serving.mkdir(parents=True)
    for name, file in _webhook_files(credentials).items():
        shutil.copyfile(file, serving / name)
    # All files that the training-operator reads are copied into `own`. `own` is mounted over the machine's /tmp, and
    # this mount hides the original files if they are below /tmp.
    shutil.copy(tools.TRAINING_OPERATOR.path(), own / "training-operator")
    shutil.copyfile(credentials.kubeconfigs["training-operator"], own / "kubeconfig.yaml")
    # In a PyTorchJob with a Master, the training-operator by default adds an init container to the workers. With this
    # empty list it adds none. The cluster could not pull the image of the init container.
    (own / "init-container.yaml").write_text("[]\n")
    return [
        *("unshare", "--mount", "--", "sh", "-c", 'mount --bind "$0" /tmp && cd / && TMPDIR=/tmp exec "$@"', str(own)),
        "/tmp/training-operator",
        "--enable-scheme=pytorchjob",
        "--kubeconfig=/tmp/kubeconfig.yaml",
        f"--webhook-server-port={WEBHOOK_PORT}",
        f"--health-probe-bind-address={HOST_ADDRESS}:{TRAINING_OPERATOR_PROBE_PORT}",
        f"--metrics-bind-address={HOST_ADDRESS}:{TRAINING_OPERATOR_METRICS_PORT}",
        "--pytorch-init-container-template-file=/tmp/init-container.yaml",
        "--zap-log-level=info",
    ]


def _webhook_files(credentials: Credentials) -> dict[str, Path]:
    return {
        "ca.crt": credentials.authority.certificate,
        "ca.key": credentials.authority.key,
        "tls.crt": credentials.webhook.certificate,
        "tls.key": credentials.webhook.key,
    }


def apply_objects(api: Api, credentials: Credentials) -> None:
    """Create the API objects of CoreDNS, MinIO, the registry and the training-operator."""
    for path, manifest in _dns_objects():
        api.apply(path, manifest)
    for name, port in (("minio", MINIO_PORT), ("registry", REGISTRY_PORT)):
        for path, manifest in _machine_service(name, port):
            api.apply(path, manifest)
    (definition,) = tools.TRAINING_OPERATOR.data_files()
    api.apply(f"{CRD_PATH}/{PYTORCHJOB_CRD}", definition.read_text())
    for path, manifest in _training_operator_objects(credentials):
        api.apply(path, manifest)


def crd_established(api: Api) -> bool:
    crd = api.get(f"{CRD_PATH}/{PYTORCHJOB_CRD}") or {}
    conditions = crd.get("status", {}).get("conditions") or []
    return any(condition["type"] == "Established" and condition["status"] == "True" for condition in conditions)


def _dns_objects() -> list[tuple[str, Object]]:
    rbac = "rbac.authorization.k8s.io"
    readable = [
        {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    name = "system:coredns"
    role = {"apiVersion": f"{rbac}/v1", "kind": "ClusterRole", "metadata": {"name": name}, "rules": readable}
    binding = {
        "apiVersion": f"{rbac}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": name},
        "subjects": [{"apiGroup": rbac, "kind": "User", "name": name}],
    }
    # CoreDNS itself listens on the cluster IP of this Service. The only purpose of the Service is to reserve this
    # address, so that the API server gives it to no other Service.
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system"},
        "spec": {"clusterIP": DNS_ADDRESS, "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}]},
    }
    return [
        (f"/apis/{rbac}/v1/clusterroles/{name}", role),
        (f"/apis/{rbac}/v1/clusterrolebindings/{name}", binding),
        ("/api/v1/namespaces/kube-system/services/kube-dns", service),
    ]


def _machine_service(name: str, port: int) -> list[tuple[str, Object]]:
    """Return the objects that give a DNS name, such as ``minio.minio.svc``, to a program that runs outside of pods. The
    result contains pairs of the URL path at which an object is created and the object."""
    metadata = {"name": name, "namespace": name}
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [HOST_ADDRESS], "conditions": {"ready": True}}],
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"clusterIP": "None", "ports": [{"name": "http", "port": port}]},
    }
    return [
        (f"/api/v1/namespaces/{name}", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}),
        (f"/api/v1/namespaces/{name}/services/{name}", service),
        (f"/apis/discovery.k8s.io/v1/namespaces/{name}/endpointslices/{name}", endpoints),
    ]


def _training_operator_objects(credentials: Credentials) -> list[tuple[str, Object]]:
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": KUBEFLOW_NAMESPACE}}
    files = {name: base64.b64encode(file.read_bytes()).decode() for name, file in _webhook_files(credentials).items()}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": WEBHOOK_SECRET, "namespace": KUBEFLOW_NAMESPACE},
        "data": files,
    }
    rule = {
        "apiGroups": ["kubeflow.org"],
        "apiVersions": ["v1"],
        "operations": ["CREATE", "UPDATE"],
        "resources": ["pytorchjobs"],
    }
    url = f"https://{HOST_ADDRESS}:{WEBHOOK_PORT}/validate-kubeflow-org-v1-pytorchjob"
    webhook = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": WEBHOOK},
        "webhooks": [
            {
                "name": "validator.pytorchjob.training-operator.kubeflow.org",
                "admissionReviewVersions": ["v1"],
                "sideEffects": "None",
                "failurePolicy": "Fail",
                "rules": [rule],
                "clientConfig": {"url": url, "caBundle": files["ca.crt"]},
            }
        ],
    }
    return [
        (f"/api/v1/namespaces/{KUBEFLOW_NAMESPACE}", namespace),
        (f"/api/v1/namespaces/{KUBEFLOW_NAMESPACE}/secrets/{WEBHOOK_SECRET}", secret),
        (f"/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/{WEBHOOK}", webhook),
    ]
