"""Where everything of a cluster lies: the folders below its state folder, and the addresses inside its network
namespace.

The addresses are the same in every cluster, because each has a network of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BRIDGE = "cni0"
BRIDGE_MAC = "0a:58:0a:f4:00:01"
"""Locally administered; its last four bytes are HOST_ADDRESS."""
POD_NETWORK = "10.244.0.0/24"
POD_PREFIX_LENGTH = 24
CLUSTER_PODS = "10.244.0.0/16"
"""The pods of every node."""
# The machine as the pods see it; API server, MinIO and the registry listen here.
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
    """A node's name, and where it and its pods lie in the network."""

    name: str
    address: str
    """Of the kubelet."""
    pod_network: str
    gateway: str
    """Of the pods, on the node's own bridge."""
    last_pod: str
    """Highest address that a pod gets."""


# The addresses above its pods' are free for machines beside the bridge: the second node's is one.
FIRST_NODE = NodePlace("node-1", HOST_ADDRESS, POD_NETWORK, HOST_ADDRESS, "10.244.0.239")
SECOND_NODE = NodePlace("node-2", "10.244.0.240", "10.244.1.0/24", "10.244.1.1", "10.244.1.239")
SECOND_NODE_LINK = "node-2"
"""The bridge's end of the cable to the second node."""


@dataclass(frozen=True)
class Layout:
    """The folders and files below one cluster's state folder."""

    state: Path

    @property
    def logs(self) -> Path:
        """One file per program."""
        return self.state / "logs"

    @property
    def certificates(self) -> Path:
        return self.state / "pki"

    @property
    def kubeconfigs(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def config(self) -> Path:
        """Configuration files of the programs."""
        return self.state / "config"

    @property
    def audit_policy(self) -> Path:
        """What the API server records: see `audit`."""
        return self.config / "audit-policy.json"

    @property
    def audit_log(self) -> Path:
        """The API server's record of requests, one JSON object a line."""
        return self.logs / "audit.log"

    @property
    def temporary(self) -> Path:
        """TMPDIR of the programs."""
        return self.state / "tmp"

    @property
    def var_lib(self) -> Path:
        """Mounted over /var/lib: the kubelet's and containerd's data."""
        return self.state / "var-lib"

    @property
    def var_log(self) -> Path:
        """Mounted over /var/log: the pods' logs."""
        return self.state / "var-log"

    @property
    def second_node(self) -> Layout:
        """Folders of the second node's own, laid out as these."""
        return Layout(self.state / SECOND_NODE.name)

    @property
    def resolver(self) -> Path:
        """Mounted over /etc/resolv.conf."""
        return self.state / "resolv.conf"

    @property
    def namespaces_ready(self) -> Path:
        """Exists once the first process has laid out network and mounts."""
        return self.state / "namespaces-ready"

    @property
    def init_pid(self) -> Path:
        """Holds the id of the cluster's first process, as the machine counts."""
        return self.state / "init.pid"

    @property
    def owner_pid(self) -> Path:
        """Holds the id of the process that the cluster belongs to."""
        return self.state / "owner.pid"

    @property
    def kept_up(self) -> Path:
        """Exists when a person keeps the cluster up, rather than a test run."""
        return self.state / "kept-up"

    @property
    def programs(self) -> Path:
        """kubectl and helm, for the PATH."""
        return self.state / "programs"

    @property
    def enter_script(self) -> Path:
        """Runs its arguments inside the cluster, with KUBECONFIG set and kubectl and helm on the PATH."""
        return self.state / "enter"

    def create(self) -> None:
        """Make the folders."""
        for folder in (self.logs, self.certificates, self.kubeconfigs, self.config, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)
