"""A second node, for tests in which a node is lost. The node has a network and a mount namespace inside the cluster's,
with a containerd, kubelet and device plugin of its own. A veth pair, which tests can cut, connects the node to the
first node's bridge.

``Cluster.second_node`` starts the node. The node's processes are in the cluster's PID namespace and its pods' cgroups
are below the cluster's, so that the node always ends together with the cluster.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.cluster import cgroups, node
from tests.cluster.api import Api
from tests.cluster.component import Component
from tests.cluster.credentials import Credentials
from tests.cluster.layout import CONTAINERD_SOCKET, SECOND_NODE, SECOND_NODE_LINK, Layout
from tests.cluster.namespaces import Namespaces
from tests.cluster.waiting import wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
TAINT_KEY = "tests.finetune.dev/second-node"
TAINT = f"{TAINT_KEY}=:NoSchedule"
TOLERATION = {"key": TAINT_KEY, "operator": "Exists", "effect": "NoSchedule"}
"""The toleration that a pod needs to be placed on a reserved second node."""
END_SECONDS = 30


@dataclass(frozen=True)
class Surroundings:
    """The parts of the cluster that a second node needs."""

    layout: Layout
    credentials: Credentials
    api: Api
    namespaces: Namespaces
    """The namespaces of the cluster, which are also those of the first node."""
    run: Callable[[list[str]], object]
    """Runs a program inside the cluster's namespaces and waits for its end."""
    cgroup: str
    environment: Mapping[str, str]
    """Environment variables of every program of the node."""


class SecondNode:
    """A second node. ``name`` is the name of its Node object.

    ``components`` holds containerd, kubelet and device-plugin. ``components["kubelet"].stop()`` kills only the kubelet
    and leaves the processes of the pods running, as on a machine whose kubelet has died.
    """

    name = SECOND_NODE.name

    def __init__(self, around: Surroundings, *, reserved: bool) -> None:
        """Prepare the node without starting it. With ``reserved`` only pods with ``TOLERATION`` are placed on the
        node."""
        self._around = around
        self._reserved = reserved
        self._layout = around.layout.second_node
        self._cgroup = f"{around.cgroup}/{self.name}"
        self._anchor = Component(
            self.name,
            ["unshare", "--net", "--mount", "--", sys.executable, "-m", "tests.cluster.join", str(around.layout.state)],
            self._layout.namespaces_ready.exists,
            around.namespaces,
            self._log("namespaces"),
            {**around.environment, "PYTHONPATH": str(REPOSITORY)},
        )
        self.components: dict[str, Component] = {}
        """The node's programs by name. ``start`` fills the dictionary, because the programs need the node's namespaces
        first."""

    def start(self, import_images: Callable[[SecondNode], None]) -> None:
        """Start the node and wait until pods can be placed on the node.

        ``import_images`` puts the images that every node has into the node's containerd.

        Raises:
            ClusterError: a program of the node did not start; the message holds the end of its log.
        """
        self._layout.create()
        cgroups.create(self._cgroup)
        self._anchor.start()
        self._anchor.wait_ready()
        self._define_components()
        self.components["containerd"].start()
        self.components["containerd"].wait_ready()
        import_images(self)
        self.components["kubelet"].start()
        self.components["kubelet"].wait_ready()
        self.components["device-plugin"].start()
        self.components["device-plugin"].wait_ready()

    @property
    def namespaces(self) -> Namespaces:
        """The node's network and mount namespaces."""
        return Namespaces(self._anchor.pid)

    def cut_off(self) -> None:
        """Cut the network connection. The node and its pods can't be reached any more and keep running."""
        self._set_link("down")

    def reconnect(self) -> None:
        """Restore the network connection that `cut_off` cut."""
        self._set_link("up")

    def stop(self) -> None:
        """Kill every process of the node and of its pods. The Node object stays in the API server, as it does when a
        machine is lost."""
        if not self._anchor.running:
            return
        for component in self.components.values():
            component.stop()
        wait_for(
            f"the processes of {self.name} to end", self._killed, END_SECONDS, evidence=lambda: str(self.processes())
        )
        self._anchor.stop()
        cgroups.remove(self._cgroup)
        self._layout.namespaces_ready.unlink(missing_ok=True)

    def evidence(self) -> str:
        """Return the last lines of the logs of the node's programs."""
        return "\n".join(component.evidence() for component in (self._anchor, *self.components.values()))

    def _define_components(self) -> None:
        around, inside = self._around, self.namespaces
        socket = Path(f"/proc/{inside.pid}/root{CONTAINERD_SOCKET}")
        kubelet = node.kubelet(
            self._layout,
            SECOND_NODE,
            around.credentials.kubelet_config(SECOND_NODE),
            around.credentials.authority,
            around.credentials.kubelet_servers[self.name],
            self._cgroup,
            taint=TAINT if self._reserved else "",
        )
        programs: dict[str, tuple[list[str], Callable[[], bool]]] = {
            "containerd": (node.containerd(self._layout, SECOND_NODE), socket.exists),
            "kubelet": (kubelet, partial(node.is_ready, around.api, self.name)),
            "device-plugin": (node.device_plugin(), partial(node.has_devices, around.api, self.name)),
        }
        self.components = {
            name: Component(f"{self.name}/{name}", argv, ready, inside, self._log(name), around.environment)
            for name, (argv, ready) in programs.items()
        }

    def _log(self, name: str) -> Path:
        return self._around.layout.logs / f"{self.name}-{name}.log"

    def _set_link(self, state: str) -> None:
        self._around.run(["ip", "link", "set", SECOND_NODE_LINK, state])

    def _killed(self) -> bool:
        """Kill all processes of the node and return whether none was found. The caller repeats the call, because a
        container's shim may start a process during the loop."""
        left = self.processes()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # The process ended during the loop.
        return not left

    def processes(self) -> set[int]:
        """Return the process ids of the node, including those of its pods: all processes in the node's cgroup or mount
        namespace."""
        anchor = self._anchor.pid
        own = Path(f"/proc/{anchor}/ns/mnt").readlink()
        found = cgroups.processes(self._cgroup)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == anchor:
                continue
            try:
                if (entry / "ns/mnt").readlink() == own:
                    found.add(int(entry.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # The process has ended, or it belongs to another user.
        return found
