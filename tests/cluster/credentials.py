"""The certificates of all programs of one cluster, and kubeconfig files with these certificates. `cluster.py` calls
`issue` once for each cluster."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.layout import API_URL, FIRST_NODE, HOST_ADDRESS, SECOND_NODE, SERVICE_ADDRESS, Layout, NodePlace
from tests.cluster.pki import Authority, Pair

ADMINISTRATORS = "system:masters"


@dataclass(frozen=True)
class Credentials:
    """All certificates with their keys, and all kubeconfig files, of one cluster."""

    authority: Pair
    service_accounts: Pair
    administrator: Pair
    api_server: Pair
    api_server_to_kubelet: Pair
    aggregation: Pair
    # Certificates with which the kubelets serve HTTPS, by the name of the node.
    kubelet_servers: dict[str, Pair]
    webhook: Pair
    # Paths of the kubeconfig files. The key is ``"administrator"`` or the name of the program that uses the file, for
    # example ``"scheduler"``.
    kubeconfigs: dict[str, Path]

    def kubelet_config(self, node: NodePlace) -> Path:
        """Return the path of the kubeconfig for the kubelet of ``node``."""
        return self.kubeconfigs[_kubelet_name(node)]


def issue(layout: Layout) -> Credentials:
    """Make a new certificate authority, all certificates of a cluster and all kubeconfig files, and write them below
    the cluster's state folder."""
    authority = Authority(layout.certificates)
    administrator = authority.issue("administrator", "administrator", organizations=[ADMINISTRATORS])
    clients = {
        "administrator": administrator,
        "controller-manager": authority.issue("controller-manager", "system:kube-controller-manager"),
        "scheduler": authority.issue("scheduler", "system:kube-scheduler"),
        **{_kubelet_name(node): _kubelet_client(authority, node) for node in (FIRST_NODE, SECOND_NODE)},
        "coredns": authority.issue("coredns", "system:coredns"),
        "training-operator": authority.issue("training-operator", "training-operator", organizations=[ADMINISTRATORS]),
    }
    names = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ]
    return Credentials(
        authority=authority.pair,
        service_accounts=authority.service_account_keys(),
        administrator=administrator,
        api_server=authority.issue(
            "api-server", "api-server", hosts=[*names, "127.0.0.1", HOST_ADDRESS, SERVICE_ADDRESS]
        ),
        api_server_to_kubelet=authority.issue(
            "api-server-to-kubelet", "api-server-to-kubelet", organizations=[ADMINISTRATORS]
        ),
        aggregation=authority.issue("aggregation", "front-proxy-client"),
        kubelet_servers={
            node.name: authority.issue(f"{node.name}-server", node.name, hosts=[node.name, node.address])
            for node in (FIRST_NODE, SECOND_NODE)
        },
        webhook=authority.issue(
            "webhook",
            "training-operator.kubeflow.svc",
            old_format=True,
            hosts=[
                HOST_ADDRESS,
                "training-operator.kubeflow.svc",
                "training-operator.kubeflow.svc.cluster.local",
            ],
        ),
        kubeconfigs={name: _kubeconfig(layout, name, authority.pair, pair) for name, pair in clients.items()},
    )


def _kubelet_name(node: NodePlace) -> str:
    return f"kubelet-{node.name}"


def _kubelet_client(authority: Authority, node: NodePlace) -> Pair:
    return authority.issue(_kubelet_name(node), f"system:node:{node.name}", organizations=["system:nodes"])


def _kubeconfig(layout: Layout, name: str, authority: Pair, client: Pair) -> Path:
    """Write a kubeconfig for ``name``, the administrator or a program, and return the file's path. The file
    contains the certificates and the key themselves instead of their paths. It is JSON, which is also valid YAML."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "test",
                "cluster": {"server": API_URL, "certificate-authority-data": _encoded(authority.certificate)},
            }
        ],
        "users": [
            {
                "name": name,
                "user": {
                    "client-certificate-data": _encoded(client.certificate),
                    "client-key-data": _encoded(client.key),
                },
            }
        ],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
        "current-context": "test",
    }
    path = layout.kubeconfigs / f"{name}.yaml"
    path.touch(mode=0o600)
    path.write_text(json.dumps(content, indent=2))
    return path


def _encoded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()
