"""A second node of the cluster, for tests in which a node is lost.

The node has a network and a mount namespace of its own inside the cluster, and its own containerd, kubelet and device
plugin. A veth pair connects the node to the first node's bridge, and tests can cut this connection. The node always
ends together with the cluster, because its processes are in the cluster's PID namespace and the cgroups of its pods are
below the cluster's cgroup folder.
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
"""The toleration with which a pod can be placed on a reserved second node."""
END_SECONDS = 30


@dataclass(frozen=True)
class Surroundings:
    """What a second node needs from the cluster in which it runs."""

    layout: Layout
    credentials: Credentials
    api: Api
    namespaces: Namespaces
    """The namespaces of the cluster, in which the first node also runs."""
    run: Callable[[list[str]], object]
    """A function that runs a program inside the cluster's namespaces and waits for its end."""
    cgroup: str
    environment: Mapping[str, str]
    """Environment variables that all programs of the node get."""


class SecondNode:
    """A second node. ``name`` is the name of its Node object.

    ``components`` holds its programs containerd, kubelet and device-plugin. ``components["kubelet"].stop()`` kills only
    the kubelet. The processes of the pods keep running, as on a machine whose kubelet has died.
    """

    name = SECOND_NODE.name

    def __init__(self, around: Surroundings, *, reserved: bool) -> None:
        """Prepare the node without starting it. If ``reserved`` is True, only pods with `TOLERATION` are placed on the
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
        """The node's programs by name. The mapping is empty until ``start`` has created the namespaces in which the
        programs run."""

    def start(self, import_images: Callable[[SecondNode], None]) -> None:
        """Start the node and wait until pods can be placed on it.

        As soon as containerd runs, ``import_images`` is called with this node. This function must import the images
        that every node has.

        Raises:
            ClusterError: a program of the node did not start; the message holds the end of the program's log.
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
        """The namespaces in which the node's programs run: its own network and mount namespaces, and the cluster's PID
        namespace."""
        return Namespaces(self._anchor.pid)

    def cut_off(self) -> None:
        """Cut the node's network connection. The node and its pods keep running, but they can't be reached."""
        self._set_link("down")

    def reconnect(self) -> None:
        """Restore the node's network connection after `cut_off`."""
        self._set_link("up")

    def refuse_devices(self) -> None:
        """Make the device plugin fail when it allocates GPUs, as on a node whose GPUs are broken. The node's status
        still lists the GPUs."""
        self._refusal.touch()

    def allocate_devices(self) -> None:
        """Make the device plugin allocate GPUs again after `refuse_devices`."""
        self._refusal.unlink(missing_ok=True)

    @property
    def _refusal(self) -> Path:
        return Path(f"/proc/{self.namespaces.pid}/root{node.REFUSE_DEVICES}")

    def stop(self) -> None:
        """Kill all processes of the node and of its pods. The Node object stays in the API server, as after the loss of
        a machine."""
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
        """Return the last log lines of each of the node's programs and of the process that holds the namespaces."""
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
        """Kill all processes of the node that are found. Return True if no process was found.

        `stop` calls this method until it returns True. One call may not be enough, because containerd runs a process
        beside each container (the shim), and the shim may start another process during the call.
        """
        left = self.processes()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # The process has ended since it was listed.
        return not left

    def processes(self) -> set[int]:
        """Return the ids of the processes of the node's programs and pods, which are all processes in the node's cgroup
        folder or in its mount namespace, except the process that holds the namespaces."""
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
