"""The folders and files below a cluster's state folder, and the addresses inside the cluster's network namespace.

The addresses are the same in every cluster, because each cluster has a network namespace of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BRIDGE = "cni0"
BRIDGE_MAC = "0a:58:0a:f4:00:01"
"""A locally administered MAC address, whose last four bytes are `HOST_ADDRESS`."""
POD_NETWORK = "10.244.0.0/24"
POD_PREFIX_LENGTH = 24
CLUSTER_PODS = "10.244.0.0/16"
"""The network of the pods of all nodes."""
# The address of the machine as pods see it. The API server, MinIO and the registry listen on this address.
HOST_ADDRESS = "10.244.0.1"

SERVICE_NETWORK = "10.96.0.0/16"
SERVICE_ADDRESS = "10.96.0.1"
DNS_ADDRESS = "10.96.0.10"
CLUSTER_DOMAIN = "cluster.local"

API_PORT = 443
ETCD_PORT = 2379
ETCD_PEER_PORT = 2380
KUBELET_PORT = 10250
MINIO_PORT = 9000
REGISTRY_PORT = 5000
DNS_READY_PORT = 8181
WEBHOOK_PORT = 9443
TRAINING_OPERATOR_PROBE_PORT = 9444
TRAINING_OPERATOR_METRICS_PORT = 9445

API_URL = f"https://{HOST_ADDRESS}:{API_PORT}"

GPU_COUNT = 8
GPU_RESOURCE = "nvidia.com/gpu"
GPU_PRODUCT = "NVIDIA-A100-SXM4-80GB"
NODE_LABELS = {
    "nvidia.com/gpu.product": GPU_PRODUCT,
    "nvidia.com/gpu.count": str(GPU_COUNT),
    "nvidia.com/gpu.memory": "81920",
}

CONTAINERD_SOCKET = "/run/containerd/containerd.sock"


@dataclass(frozen=True)
class NodePlace:
    """A node's name, and the addresses of the node and of its pods."""

    name: str
    address: str
    """Address of the node's kubelet, for example ``"10.244.0.1"``."""
    pod_network: str
    gateway: str
    """Address of the node's own bridge, which is the default gateway of the node's pods."""
    last_pod: str
    """Highest address that a pod of the node gets."""


# The addresses above `last_pod` are free for machines that are connected to the first node's bridge. The second node
# has one of these addresses.
FIRST_NODE = NodePlace("node-1", HOST_ADDRESS, POD_NETWORK, HOST_ADDRESS, "10.244.0.239")
SECOND_NODE = NodePlace("node-2", "10.244.0.240", "10.244.1.0/24", "10.244.1.1", "10.244.1.239")
SECOND_NODE_LINK = "node-2"
"""Name of the network interface that connects the first node's bridge to the second node."""


@dataclass(frozen=True)
class Layout:
    """The folders and files below one cluster's state folder."""

    state: Path

    @property
    def logs(self) -> Path:
        """Folder with one log file for each program."""
        return self.state / "logs"

    @property
    def certificates(self) -> Path:
        return self.state / "pki"

    @property
    def kubeconfigs(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def config(self) -> Path:
        """Folder with the configuration files of the programs."""
        return self.state / "config"

    @property
    def audit_policy(self) -> Path:
        """File with the audit policy, which says what the API server records; see `audit.py`."""
        return self.config / "audit-policy.json"

    @property
    def audit_log(self) -> Path:
        """The API server's audit log, with one JSON object in each line."""
        return self.logs / "audit.log"

    @property
    def temporary(self) -> Path:
        """Folder that the programs get as TMPDIR."""
        return self.state / "tmp"

    @property
    def var_lib(self) -> Path:
        """Folder that is mounted over /var/lib and holds the kubelet's and containerd's data."""
        return self.state / "var-lib"

    @property
    def var_log(self) -> Path:
        """Folder that is mounted over /var/log and holds the pods' logs."""
        return self.state / "var-log"

    @property
    def second_node(self) -> Layout:
        """The layout of the second node's folders, whose names are the same as those of a cluster."""
        return Layout(self.state / SECOND_NODE.name)

    @property
    def resolver(self) -> Path:
        """File that is mounted over /etc/resolv.conf."""
        return self.state / "resolv.conf"

    @property
    def namespaces_ready(self) -> Path:
        """Empty file that the cluster's first process creates once network and mounts are configured."""
        return self.state / "namespaces-ready"

    @property
    def init_pid(self) -> Path:
        """File with the process id, in the machine's PID namespace, of the cluster's first process."""
        return self.state / "init.pid"

    @property
    def owner_pid(self) -> Path:
        """File with the process id of the program that started the cluster."""
        return self.state / "owner.pid"

    @property
    def kept_up(self) -> Path:
        """Empty file that exists if the command `up` started the cluster, and does not exist in a test run."""
        return self.state / "kept-up"

    @property
    def programs(self) -> Path:
        """Folder with links to kubectl and helm, which is on the PATH inside the cluster."""
        return self.state / "programs"

    @property
    def enter_script(self) -> Path:
        """Shell script that runs its arguments inside the cluster, with KUBECONFIG set and kubectl and helm on the
        PATH."""
        return self.state / "enter"

    def create(self) -> None:
        """Create the folders that the programs of a cluster or node need."""
        for folder in (self.logs, self.certificates, self.kubeconfigs, self.config, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)
