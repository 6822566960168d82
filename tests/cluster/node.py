"""The configuration files and command lines of the programs of a node: containerd, the kubelet and the device
plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cluster import tools
from tests.cluster.api import Api
from tests.cluster.layout import (
    BRIDGE,
    CLUSTER_DOMAIN,
    CONTAINERD_SOCKET,
    DNS_ADDRESS,
    GPU_COUNT,
    GPU_RESOURCE,
    HOST_ADDRESS,
    KUBELET_PORT,
    NODE_LABELS,
    REGISTRY_PORT,
    Layout,
    NodePlace,
)
from tests.cluster.oci import PAUSE_IMAGE
from tests.cluster.pki import Pair
from tests.cluster.waiting import ClusterError

CNI_FOLDERS = ("/usr/lib/cni", "/opt/cni/bin")
REFUSE_DEVICES = "/var/lib/kubelet/refuse-devices"
"""Path of a file on a node. While the file exists, the device plugin of the node allocates no GPU to any container."""
REGISTRY = f"{HOST_ADDRESS}:{REGISTRY_PORT}"


def containerd(layout: Layout, place: NodePlace) -> list[str]:
    config = layout.config / "containerd.toml"
    config.write_text(_containerd_config(layout))
    network = layout.config / "cni"
    network.mkdir(exist_ok=True)
    (network / "10-pods.conflist").write_text(json.dumps(_pod_network(place), indent=2))
    hosts = layout.config / "registries" / REGISTRY
    hosts.mkdir(parents=True, exist_ok=True)
    capabilities = 'capabilities = ["pull", "resolve"]'
    (hosts / "hosts.toml").write_text(f'server = "http://{REGISTRY}"\n[host."http://{REGISTRY}"]\n{capabilities}\n')
    return ["containerd", "--config", str(config)]


def _containerd_config(layout: Layout) -> str:
    folder = next((folder for folder in CNI_FOLDERS if (Path(folder) / "bridge").exists()), None)
    if folder is None:
        raise ClusterError(f"no CNI plugin `bridge` in {' or '.join(CNI_FOLDERS)}: install containernetworking-plugins")
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "{CONTAINERD_SOCKET}"

[{cri}]
  sandbox_image = "{PAUSE_IMAGE}"
  # Without CAP_SYS_RESOURCE no process may lower its oom_score_adj, and every pod would fail.
  restrict_oom_score_adj = true
  disable_apparmor = true
  # The blobs of an image are not kept once it is unpacked: half the disk.
  [{cri}.containerd]
    snapshotter = "overlayfs"
    discard_unpacked_layers = true
    default_runtime_name = "runc"
    [{cri}.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [{cri}.cni]
    bin_dir = "{folder}"
    conf_dir = "{layout.config / "cni"}"
  [{cri}.registry]
    config_path = "{layout.config / "registries"}"
"""


def _pod_network(place: NodePlace) -> dict[str, object]:
    addresses = {"subnet": place.pod_network, "rangeEnd": place.last_pod, "gateway": place.gateway}
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": "/run/cni",
            "ranges": [[addresses]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}


def kubelet(
    layout: Layout, place: NodePlace, kubeconfig: Path, authority: Pair, server: Pair, cgroup: str, *, taint: str = ""
) -> list[str]:
    """Write the configuration of a node's kubelet and return the kubelet's command.

    The kubelet puts the cgroups of its pods below the cgroup folder ``cgroup``. With ``taint`` the node takes only pods
    with a matching toleration.
    """
    config = layout.config / "kubelet.json"
    config.write_text(json.dumps(_kubelet_config(layout, authority, server, cgroup), indent=2))
    labels = ",".join(f"{name}={value}" for name, value in NODE_LABELS.items())
    return [
        str(tools.KUBELET.path()),
        f"--config={config}",
        f"--kubeconfig={kubeconfig}",
        f"--hostname-override={place.name}",
        f"--node-ip={place.address}",
        f"--node-labels={labels}",
        *([f"--register-with-taints={taint}"] if taint else []),
    ]


def _kubelet_config(layout: Layout, authority: Pair, server: Pair, cgroup: str) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "port": KUBELET_PORT,
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroup}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": CLUSTER_DOMAIN,
        "resolvConf": str(layout.resolver),
        # The kubelet reports new devices only with its next status update. With this short interval, the devices of the
        # device plugin soon appear in the node's status.
        "nodeStatusUpdateFrequency": "2s",
        # The thresholds are low, because the node's disk is the machine's disk. Files of other programs must not make
        # the kubelet evict pods.
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "serializeImagePulls": False,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(authority.certificate)},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(server.certificate),
        "tlsPrivateKeyFile": str(server.key),
    }


def device_plugin() -> list[str]:
    options = [f"-resource={GPU_RESOURCE}", f"-count={GPU_COUNT}", f"-refuse={REFUSE_DEVICES}"]
    return [str(tools.DEVICE_PLUGIN.path()), *options]


def is_ready(api: Api, name: str) -> bool:
    """Return whether the condition Ready of the node ``name`` is True."""
    conditions = _status(api, name).get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def has_devices(api: Api, name: str) -> bool:
    """Return whether the status of the node ``name`` lists all GPUs that the device plugin simulates."""
    allocatable: dict[str, str] = _status(api, name).get("allocatable", {})
    return allocatable.get(GPU_RESOURCE) == str(GPU_COUNT)


def _status(api: Api, name: str) -> dict[str, Any]:
    found = api.get(f"/api/v1/nodes/{name}") or {}
    status: dict[str, Any] = found.get("status", {})
    return status
