"""The command lines of the control plane: etcd, API server, controller manager and scheduler. `cluster.py` starts the
programs."""

from __future__ import annotations

import json

from tests.cluster import audit, tools
from tests.cluster.credentials import Credentials
from tests.cluster.layout import (
    API_PORT,
    CLUSTER_PODS,
    ETCD_PEER_PORT,
    ETCD_PORT,
    HOST_ADDRESS,
    SERVICE_NETWORK,
    Layout,
)

ISSUER = "https://kubernetes.default.svc"
ETCD_URL = f"http://127.0.0.1:{ETCD_PORT}"


def etcd(layout: Layout) -> list[str]:
    peers = f"http://127.0.0.1:{ETCD_PEER_PORT}"
    return [
        str(tools.ETCD.path()),
        f"--data-dir={layout.state / 'etcd'}",
        f"--listen-client-urls={ETCD_URL}",
        f"--advertise-client-urls={ETCD_URL}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
        # etcd does not call fsync, because the data of a test cluster need not survive a crash of the machine.
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def api_server(layout: Layout, credentials: Credentials) -> list[str]:
    accounts, kubelet, aggregation = (
        credentials.service_accounts,
        credentials.api_server_to_kubelet,
        credentials.aggregation,
    )
    authority = credentials.authority.certificate
    layout.audit_policy.write_text(json.dumps(audit.POLICY))
    return [
        str(tools.API_SERVER.path()),
        f"--etcd-servers={ETCD_URL}",
        "--bind-address=0.0.0.0",
        f"--secure-port={API_PORT}",
        f"--advertise-address={HOST_ADDRESS}",
        f"--service-cluster-ip-range={SERVICE_NETWORK}",
        f"--tls-cert-file={credentials.api_server.certificate}",
        f"--tls-private-key-file={credentials.api_server.key}",
        f"--client-ca-file={authority}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--service-account-issuer={ISSUER}",
        f"--api-audiences={ISSUER}",
        f"--service-account-key-file={accounts.certificate}",
        f"--service-account-signing-key-file={accounts.key}",
        f"--kubelet-certificate-authority={authority}",
        f"--kubelet-client-certificate={kubelet.certificate}",
        f"--kubelet-client-key={kubelet.key}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--requestheader-client-ca-file={authority}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={aggregation.certificate}",
        f"--proxy-client-key-file={aggregation.key}",
        "--endpoint-reconciler-type=lease",
        f"--audit-policy-file={layout.audit_policy}",
        f"--audit-log-path={layout.audit_log}",
        "--profiling=false",
    ]


def controller_manager(credentials: Credentials) -> list[str]:
    config = credentials.kubeconfigs["controller-manager"]
    return [
        str(tools.CONTROLLER_MANAGER.path()),
        f"--kubeconfig={config}",
        f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}",
        "--bind-address=127.0.0.1",
        f"--cluster-cidr={CLUSTER_PODS}",
        f"--service-account-private-key-file={credentials.service_accounts.key}",
        f"--root-ca-file={credentials.authority.certificate}",
        "--use-service-account-credentials",
        "--leader-elect=false",
        "--profiling=false",
    ]


def scheduler(credentials: Credentials) -> list[str]:
    config = credentials.kubeconfigs["scheduler"]
    return [
        str(tools.SCHEDULER.path()),
        f"--kubeconfig={config}",
        f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}",
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
        "--profiling=false",
    ]
