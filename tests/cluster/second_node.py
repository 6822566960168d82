"""A second node, started by tests that lose one: its own network and mount namespace inside the cluster's, with a
containerd, kubelet and device plugin of its own, joined to the first node's bridge by a cable that can be cut.

``Cluster.second_node`` makes one. Its processes live in the cluster's PID namespace and its pods' cgroups below the
cluster's, so it vanishes with the cluster, however that ends.
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
"""What a pod needs to be placed on a reserved second node."""
END_SECONDS = 30


@dataclass(frozen=True)
class Surroundings:
    """What a second node needs of the cluster that it joins."""

    layout: Layout
    credentials: Credentials
    api: Api
    namespaces: Namespaces
    """Of the cluster, and so of the first node."""
    run: Callable[[list[str]], object]
    """Runs a program in them to its end."""
    cgroup: str
    environment: Mapping[str, str]
    """Of every program of the node."""


class SecondNode:
    """A running second node; its name is that of the Node object.

    ``components`` are its containerd, kubelet and device plugin by name: ``components["kubelet"].stop()`` kills
    exactly that one, and leaves its pods' processes running, as on a machine whose kubelet has died.
    """

    name = SECOND_NODE.name

    def __init__(self, around: Surroundings, *, reserved: bool) -> None:
        """Prepare the node. ``reserved``: only pods with ``TOLERATION`` are placed on it."""
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
        """Filled by ``start``: what runs inside needs the namespaces first."""

    def start(self, import_images: Callable[[SecondNode], None]) -> None:
        """Bring the node up and wait until pods can be placed on it.

        ``import_images`` puts the images that every node has into its containerd.

        Raises:
            ClusterError: a part of it did not come up; the message holds the end of its log.
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
        """Network and mounts of the node."""
        return Namespaces(self._anchor.pid)

    def cut_off(self) -> None:
        """Pull the cable: nothing reaches the node or its pods any more, and all of them go on running."""
        self._set_link("down")

    def reconnect(self) -> None:
        """Plug the cable in again."""
        self._set_link("up")

    def stop(self) -> None:
        """Switch the machine off: every process of the node and of its pods is killed, by its id. The Node object
        stays, as it does when a machine is lost."""
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
        """Return the ends of its logs."""
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
        """Kill what is left of the node; a shim may start a process while we look, so the caller looks again."""
        left = self.processes()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended while we looked
        return not left

    def processes(self) -> set[int]:
        """Return the ids of what runs on the node, its pods included: all in its cgroup or its mount namespace."""
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
                continue  # it has ended, or belongs to somebody else
        return found
