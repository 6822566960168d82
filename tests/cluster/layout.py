"""The paths of a cluster's files, which are all below the cluster's state folder, and the addresses of the cluster's
programs.

The addresses are the same in every cluster, because each cluster has a network namespace of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BRIDGE = "cni0"
BRIDGE_MAC = "0a:58:0a:f4:00:01"
"""MAC address of the bridge: the bytes 0a:58, of which the first marks a locally administered address, and the four
bytes of `HOST_ADDRESS`."""
POD_NETWORK = "10.244.0.0/24"
POD_PREFIX_LENGTH = 24
CLUSTER_PODS = "10.244.0.0/16"
"""The IP network that holds the pod networks of all nodes."""
# IP address of the first node. The API server, MinIO and the registry run outside of pods and listen on this address,
# so that pods reach them.
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
    """The name of a node, its IP address, and the IP addresses that its pods get."""

    name: str
    address: str
    """IP address of the node, on which its kubelet listens, for example ``"10.244.0.1"``."""
    pod_network: str
    gateway: str
    """IP address of the bridge on this node, which is the default gateway of the node's pods."""
    last_pod: str
    """Highest IP address that a pod of the node can get."""


# Pods of the first node get no addresses above `last_pod`. So the higher addresses are free for other machines at the
# first node's bridge. The second node has one of the higher addresses.
FIRST_NODE = NodePlace("node-1", HOST_ADDRESS, POD_NETWORK, HOST_ADDRESS, "10.244.0.239")
SECOND_NODE = NodePlace("node-2", "10.244.0.240", "10.244.1.0/24", "10.244.1.1", "10.244.1.239")
SECOND_NODE_LINK = "node-2"
"""Name of the network interface at the first node's bridge that leads to the second node."""


@dataclass(frozen=True)
class Layout:
    """The paths of files and folders below the state folder of a cluster, or below the folder of its second node."""

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
        """Folder with the configuration files of the cluster's programs."""
        return self.state / "config"

    @property
    def audit_policy(self) -> Path:
        """File with the audit policy, which selects the requests that the API server writes into its audit log. See
        `audit.py`."""
        return self.config / "audit-policy.json"

    @property
    def audit_log(self) -> Path:
        """The API server's audit log, with one JSON object in each line."""
        return self.logs / "audit.log"

    @property
    def temporary(self) -> Path:
        """Folder for temporary files, which the cluster's programs get as TMPDIR."""
        return self.state / "tmp"

    @property
    def var_lib(self) -> Path:
        """Folder that is mounted over /var/lib inside the cluster. It holds the data of the kubelet and containerd."""
        return self.state / "var-lib"

    @property
    def var_log(self) -> Path:
        """Folder that is mounted over /var/log inside the cluster. It holds the logs of the pods."""
        return self.state / "var-log"

    @property
    def second_node(self) -> Layout:
        """The same paths for the second node, in a folder of its own below this state folder."""
        return Layout(self.state / SECOND_NODE.name)

    @property
    def resolver(self) -> Path:
        """File that is mounted over /etc/resolv.conf inside the cluster."""
        return self.state / "resolv.conf"

    @property
    def namespaces_ready(self) -> Path:
        """Empty file that appears as soon as network and mounts are configured. The cluster's first process creates it
        for the cluster, and the process of `join.py` for the second node."""
        return self.state / "namespaces-ready"

    @property
    def init_pid(self) -> Path:
        """File with the process id of the cluster's first process, as the machine's PID namespace numbers it."""
        return self.state / "init.pid"

    @property
    def owner_pid(self) -> Path:
        """File with the process id of the cluster's owner, which is the process that called `Cluster.start`."""
        return self.state / "owner.pid"

    @property
    def kept_up(self) -> Path:
        """Empty file. It exists only in clusters that the command `up` started, and not in clusters of test runs."""
        return self.state / "kept-up"

    @property
    def programs(self) -> Path:
        """Folder with links to kubectl and helm. It is on the PATH of the programs that `Cluster.popen` and the script
        `enter` start."""
        return self.state / "programs"

    @property
    def enter_script(self) -> Path:
        """Shell script that runs the command in its arguments inside the cluster. The command gets KUBECONFIG, and a
        PATH with kubectl and helm."""
        return self.state / "enter"

    def create(self) -> None:
        """Create the folders that the programs of a cluster or node need."""
        for folder in (self.logs, self.certificates, self.kubeconfigs, self.config, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)
